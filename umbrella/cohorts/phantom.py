"""The phantom cohort: subjects simulated from the MNI152 T1 template, with effects of sex and age of known size.

Nothing is downloaded: nilearn contains the template, which is brain-extracted. Positions are MNI millimetres (RAS+),
arrays are (X, Y, Z) and (X, Y, Z, T).
"""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage

from umbrella.base import UserError
from umbrella.cohorts.settings import CohortSettings

SPLITS = ("train", "validation", "test")
SUFFIXES = {"sMRI": "T1w", "dMRI": "FA", "fMRI": "bold"}
# Tokens are bytes in the tiny model, so the texts are short.
SEX_QUESTIONS = ("What is the sex of this subject?", "Is this subject male or female?")
AGE_QUESTIONS = ("How old is this subject, in years?", "What is the age of this subject, in years?")

FORMAT_VERSION = 1
"""Increased when the same settings give other files."""
REPETITION_TIME = 2.0
"""Seconds between the frames of a functional series."""
FRAMES = 12
TEMPLATE_SPACING = 2

# The field of view, with a margin around the largest head that the settings allow.
FIELD_OF_VIEW = ((-88.0, 88.0), (-124.0, 92.0), (-90.0, 100.0))
HEAD_CENTRE = np.array([0.0, -21.0, 11.0])
VENTRICLE_CENTRE, VENTRICLE_REACH = np.array([0.0, -15.0, 14.0]), np.array([30.0, 50.0, 30.0])
FRONTAL_CENTRE, FRONTAL_REACH = np.array([28.0, 40.0, 14.0]), np.array([15.0, 15.0, 15.0])
KNOT_DISTANCE = 30.0
KNOTS = [np.arange(low, high + KNOT_DISTANCE, KNOT_DISTANCE) for low, high in FIELD_OF_VIEW]
# By the last digit of the subject number; the others are RAS. Readers of the cohort have to use the affine.
STORED_ORIENTATION = {5: "LAS", 0: "PIR"}
# Stored integers are thousandths: of the brightest tissue for sMRI and fMRI, of 1 for the diffusion map.
STORED_UNIT = 0.001

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """One subject. Seed and number determine sex and age; all settings determine split and modalities."""

    number: int
    """1 for the first subject."""
    sex: str
    """"male" or "female"."""
    age: int
    """Years, 20 to 80."""
    split: str
    """One of ``SPLITS``."""
    modalities: tuple[str, ...]
    """Modalities with a volume, in the order of ``SUFFIXES``; sMRI is always the first."""

    @property
    def id(self) -> str:
        """The identifier in file names and tables, such as "sub-0001"."""
        return f"sub-{self.number:04d}"

    def path(self, modality: str) -> str:
        """Path of the volume of a modality, relative to the folder of the cohort."""
        return f"volumes/{self.id}_{SUFFIXES[modality]}.nii.gz"

    def image(self, modality: str) -> dict[str, str]:
        """The image item of a modality in conversations."""
        return {"type": "image", "modality": modality, "image_path": self.path(modality)}


def _generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """The random generator of one subject (or pair of subjects) for one purpose.

    Samples do not depend on earlier ones, so a larger cohort contains the volumes of a smaller one.
    """
    return np.random.default_rng([seed, number, *purpose.encode()])


def draw_subjects(settings: CohortSettings) -> list[Subject]:
    """Sample the subjects of a cohort, in the order of their numbers.

    Subjects 1 and 2, 3 and 4, ... are pairs of one male and one female subject. Splits are made of pairs, so each is
    balanced; where the number is odd, the subject without a partner is in the training split.
    """
    numbers = range(1, settings.subjects + 1)
    pairs = settings.subjects // 2
    # A held-out split needs two pairs: a comparison with the same sex needs two subjects of that sex.
    held_out = max(2, round(0.2 * pairs))
    shuffled = _generator(settings.seed, 0, "split").permutation(pairs)
    split_of_pair = dict.fromkeys(shuffled[:held_out].tolist(), "validation")
    split_of_pair |= dict.fromkeys(shuffled[held_out : 2 * held_out].tolist(), "test")
    splits = {number: split_of_pair.get((number - 1) // 2, "train") for number in numbers}

    # Take the first subjects of each split, in proportion to its size: sort by the rank within the split over its size.
    members = {split: [number for number in numbers if splits[number] == split] for split in SPLITS}
    early = sorted(numbers, key=lambda number: members[splits[number]].index(number) / len(members[splits[number]]))
    having = {
        "sMRI": set(numbers),
        "dMRI": set(early[: settings.diffusion_subjects]),
        "fMRI": set(early[: settings.functional_subjects]),
    }

    subjects = []
    for number in numbers:
        male_first = _generator(settings.seed, (number - 1) // 2, "sex").random() < 0.5
        sex = "male" if male_first == (number % 2 == 1) else "female"
        age = int(_generator(settings.seed, number, "age").integers(20, 81))
        modalities = tuple(modality for modality in SUFFIXES if number in having[modality])
        subjects.append(Subject(number, sex, age, splits[number], modalities))
    return subjects


def split_conversations(subjects: Sequence[Subject], seed: int) -> list[dict[str, Any]]:
    """Make all conversations about the subjects of one split, as samples of the v2 conversation format.

    ``subjects`` are all members of the split, in pairs as ``draw_subjects`` makes them. Of each pair, one is compared
    with a reference of the same sex and the other with one of the other sex, so repeating the reference's label is
    right half of the time. Image paths are relative to the cohort's folder.
    """
    samples = []
    for position, subject in enumerate(subjects):
        rng = _generator(seed, subject.number, "conversations")
        sex_question = SEX_QUESTIONS[rng.integers(2)]
        age_question = AGE_QUESTIONS[rng.integers(2)]
        samples += [
            _sample(subject, "sex_classification", [[subject.image("sMRI"), sex_question]]),
            _sample(subject, "age_estimation", [[subject.image("sMRI"), age_question]]),
        ]

        # Alternate between pairs which sex is compared with a reference of the same sex.
        same = (position // 2 + (subject.sex == "male")) % 2 == 0
        candidates = [other for other in subjects if other != subject and (other.sex == subject.sex) == same]
        reference = candidates[rng.integers(len(candidates))]
        turns: list[list[Any]] = [
            [f"This is a scan of a {reference.sex} subject, for reference.", reference.image("sMRI")],
            ["I have looked at the reference scan."],
            [f"Compare with it. {sex_question}", subject.image("sMRI")],
        ]
        samples.append(_sample(subject, "sex_classification_via_comparison", turns, reference))

        if len(subject.modalities) > 1:
            others = [subject.image(modality) for modality in subject.modalities[1:]]
            turns = [[subject.image("sMRI"), "More scans of this subject:", *others, sex_question]]
            samples.append(_sample(subject, "sex_classification_multimodal", turns))
    return samples


def _sample(subject: Subject, task: str, turns: list[list[Any]], reference: Subject | None = None) -> dict[str, Any]:
    """Make a sample of the given turns (texts and image items), user first, followed by the correct answer."""
    target = "age" if task == "age_estimation" else "sex"
    answer = f"{subject.age} years." if target == "age" else f"{subject.sex}."
    metadata: dict[str, Any] = {
        "subject_id": subject.id,
        "subject_label": subject.age if target == "age" else subject.sex,
        "task": task,
        "target": target,
        "age": subject.age,
        "sex": subject.sex,
    }
    task_type = "T2" if task == "sex_classification_multimodal" else "T1"
    if reference is not None:
        task_type = "T3"
        metadata |= {
            "reference_id": reference.id,
            "reference_label": reference.sex,
            "comparison_type": "same" if reference.sex == subject.sex else "different",
        }
    contents = [
        [{"type": "text", "text": item} if isinstance(item, str) else item for item in turn]
        for turn in (*turns, [answer])
    ]
    images = [item for content in contents for item in content if item["type"] == "image"]
    return {
        "task_id": f"{subject.id}_{task}",
        "task_type": task_type,
        "subject_ids": [subject.id] if reference is None else [reference.id, subject.id],
        "modalities": [item["modality"] for item in images],
        "images": [{"path": i["image_path"], "token": "<image>", "modality": i["modality"]} for i in images],
        "conversations": [
            {"role": "user" if i % 2 == 0 else "assistant", "content": content} for i, content in enumerate(contents)
        ],
        "metadata": metadata,
    }


def make_cohort(
    folder: Path, settings: CohortSettings, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Path:
    """Make the phantom cohort in ``folder``, unless the folder already holds it, and return the folder.

    The folder gets ``volumes/*.nii.gz``, ``participants.tsv``, ``conversations/{train,validation,test}.jsonl`` (the v2
    format, image paths relative to the folder) and ``cohort.json``. sMRI is (X, Y, Z) int16 at ``settings.spacing``;
    dMRI (X, Y, Z) with values from 0 to 1; fMRI (X, Y, Z, T) int16 at twice the spacing. The same settings give the
    same bytes. The folder appears when it is complete. ``progress`` wraps the iteration over subjects, as tqdm does.

    Raises:
        UserError: the folder holds a cohort of other settings, or other files.
    """
    folder = Path(folder)
    if _is_made(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        building = Path(temporary) / "cohort"
        _build(building, settings, progress)
        try:
            building.rename(folder)
        except OSError:
            # Another process may have made the same cohort in the meantime.
            if not _is_made(folder, settings):
                raise
    return folder


def _description(settings: CohortSettings) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "settings": settings.model_dump()}


def _is_made(folder: Path, settings: CohortSettings) -> bool:
    """Whether the folder holds the cohort of these settings. Raises UserError if it holds anything else."""
    remedy = "Choose another folder for the phantom cohort, or remove this one."
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a phantom cohort: cohort.json cannot be read ({error}). {remedy}") from error
    if found != _description(settings):
        raise UserError(f"{folder}: holds a phantom cohort of other settings ({found}). {remedy}")
    return True


def _build(folder: Path, settings: CohortSettings, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> None:
    (folder / "volumes").mkdir(parents=True)
    (folder / "conversations").mkdir()
    subjects = draw_subjects(settings)
    template = _load_template()
    fine, coarse = (_at_spacing(template, spacing) for spacing in (settings.spacing, 2 * settings.spacing))
    for subject in progress(subjects):
        for modality in subject.modalities:
            make = {"sMRI": _structural, "dMRI": _diffusion, "fMRI": _functional}[modality]
            data = make(coarse if modality == "fMRI" else fine, subject, settings)
            _write_nifti(folder, subject, modality, data, settings.spacing)

    rows = ["participant_id\tsex\tage\tsplit", *(f"{s.id}\t{s.sex}\t{s.age}\t{s.split}" for s in subjects)]
    texts = {"participants.tsv": rows, "cohort.json": [json.dumps(_description(settings), indent=2)]}
    for split in SPLITS:
        samples = split_conversations([s for s in subjects if s.split == split], settings.seed)
        texts[f"conversations/{split}.jsonl"] = list(map(json.dumps, samples))
    for name, lines in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _load_template() -> tuple[Array, Array]:
    """The template, scaled to 1 in the brightest tissue, and the position of its first voxel in millimetres."""
    # Imported here because the import takes seconds, and an existing cohort does not need it.
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=TEMPLATE_SPACING)
    data = image.get_fdata()
    return data / data.max(), image.affine[:3, 3]


def _at_spacing(template: tuple[Array, Array], spacing: float) -> tuple[Array, Array]:
    """Smooth the template for a voxel size: a voxel is an average over its extent. Point samples would alias."""
    data, origin = template
    return ndimage.gaussian_filter(data, 0.4 * np.sqrt(max(0.0, (spacing / TEMPLATE_SPACING) ** 2 - 1))), origin


def _axes(spacing: float) -> list[Array]:
    """Positions of the voxel centres along each axis, in millimetres."""
    return [low + spacing * np.arange(np.ceil((high - low) / spacing) + 1) for low, high in FIELD_OF_VIEW]


def _smooth_fields(coefficients: Array, axes: list[Array]) -> Array:
    """Smooth random fields (C, X, Y, Z) from coefficients (C, *knots); standard normal ones give unit variance."""
    bases = []
    for axis, knots in zip(axes, KNOTS, strict=True):
        weights = np.exp(-0.5 * ((axis[:, None] - knots) / (0.6 * KNOT_DISTANCE)) ** 2)
        bases.append(weights / np.sqrt((weights**2).sum(axis=1, keepdims=True)))
    return np.einsum("cijk,xi,yj,zk->cxyz", coefficients, *bases, optimize=True)


def _bump(positions: Array, centre: Array, reach: Array, order: int = 2) -> Array:
    """1 at a centre, falling with the distance from it (a Gaussian for order 2): (3, X, Y, Z) -> (X, Y, Z)."""
    distance = np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(positions, centre, reach, strict=True)))
    return np.exp(-0.5 * distance**order)


def _anatomy(
    template: tuple[Array, Array], subject: Subject, settings: CohortSettings, axes: list[Array]
) -> tuple[Array, Array, Array]:
    """The subject's tissue (0 outside the brain), bias field, and the template position of each voxel (3, X, Y, Z).

    The random coefficients do not depend on the grid: a subject has the same shape at every spacing and modality.
    """
    rng = _generator(settings.seed, subject.number, "anatomy")
    fields = _smooth_fields(rng.standard_normal((4, *(len(knots) for knots in KNOTS))), axes)

    # Map from subject to template: the inverse of scaling the head and then enlarging the ventricles.
    ratio = np.sqrt(1 + settings.sex_scale)
    scale = ratio if subject.sex == "male" else 1 / ratio
    head = HEAD_CENTRE[:, None, None, None]
    positions = (np.stack(np.meshgrid(*axes, indexing="ij")) - head) / scale + head
    positions += settings.deformation * fields[:3]
    ventricles = VENTRICLE_CENTRE[:, None, None, None]
    grown = settings.age_ventricle * (subject.age - 20) / 60
    # Constant near the centre and zero at the cortex: the ventricles grow evenly, and the head keeps its size.
    growth = grown * _bump(positions, VENTRICLE_CENTRE, VENTRICLE_REACH, order=4)
    positions = (positions - ventricles) / (1 + growth) + ventricles

    data, origin = template
    voxels = (positions - origin[:, None, None, None]) / TEMPLATE_SPACING
    tissue = ndimage.map_coordinates(data, voxels, order=1)
    return np.where(tissue > 0.1, tissue, 0.0), np.exp(settings.bias * fields[3]), positions


def _structural(template: tuple[Array, Array], subject: Subject, settings: CohortSettings) -> NDArray[np.int16]:
    tissue, bias, positions = _anatomy(template, subject, settings, _axes(settings.spacing))
    if subject.sex == "male":
        tissue = tissue * (1 + settings.sex_region * _bump(positions, FRONTAL_CENTRE, FRONTAL_REACH))
    return _stored(tissue * bias, tissue > 0, settings.noise, _generator(settings.seed, subject.number, "sMRI"))


def _diffusion(template: tuple[Array, Array], subject: Subject, settings: CohortSettings) -> NDArray[np.int16]:
    """A map similar to fractional anisotropy: high in white matter, which is the bright tissue of the template."""
    tissue, _, _ = _anatomy(template, subject, settings, _axes(settings.spacing))
    anisotropy = 0.1 + 0.6 / (1 + np.exp((0.77 - tissue) / 0.04))
    stored = _stored(anisotropy, tissue > 0, settings.noise, _generator(settings.seed, subject.number, "dMRI"))
    return np.minimum(stored, round(1 / STORED_UNIT)).astype(np.int16)


def _functional(template: tuple[Array, Array], subject: Subject, settings: CohortSettings) -> NDArray[np.int16]:
    """A series (X, Y, Z, T): T2*-like contrast, bright in fluid, and six regions with slow time courses."""
    axes = _axes(2 * settings.spacing)
    tissue, bias, _ = _anatomy(template, subject, settings, axes)
    rng = _generator(settings.seed, subject.number, "fMRI")
    regions = _smooth_fields(rng.standard_normal((6, *(len(knots) for knots in KNOTS))), axes)
    courses = ndimage.gaussian_filter1d(rng.standard_normal((6, FRAMES)), sigma=1.0, axis=1)
    fluctuation = 0.05 * np.einsum("cxyz,ct->xyzt", regions, courses)
    # A voxel below the intensity of fluid is partly outside the brain and must not look like fluid.
    mean = (1.2 - 0.8 * tissue) * np.minimum(tissue / 0.3, 1) * bias
    return _stored(mean[..., None] * (1 + fluctuation), tissue > 0, settings.noise, rng)


def _stored(data: Array, brain: NDArray[np.bool_], noise: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """Add noise, set the background to 0 as after brain extraction, and convert to units of ``STORED_UNIT``."""
    noisy = data + noise * rng.standard_normal(data.shape)
    noisy[~brain] = 0
    return np.rint(np.maximum(noisy, 0) / STORED_UNIT).astype(np.int16)


def _write_nifti(folder: Path, subject: Subject, modality: str, data: NDArray[np.int16], spacing: float) -> None:
    """Write (X, Y, Z[, T]) data in RAS order, stored in the orientation of the subject. Equal data give equal bytes."""
    edge = 2 * spacing if modality == "fMRI" else spacing
    affine = np.diag([edge, edge, edge, 1.0])
    affine[:3, 3] = [low for low, _ in FIELD_OF_VIEW]
    orientation = STORED_ORIENTATION.get(subject.number % 10, "RAS")
    image = nib.Nifti1Image(data, affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation)))
    image.set_sform(image.affine, code="scanner")
    image.set_qform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    if modality == "fMRI":
        image.header.set_zooms((*image.header.get_zooms()[:3], REPETITION_TIME))
    if modality == "dMRI":
        image.header.set_slope_inter(STORED_UNIT, 0)
    # Without name and time, which the gzip header holds by default.
    path = folder / subject.path(modality)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped:
        zipped.write(image.to_bytes())
