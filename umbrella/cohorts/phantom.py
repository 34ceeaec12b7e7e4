"""The phantom cohort: a BIDS dataset simulated from the MNI152 T1 template, with effects of sex and age of known size.

Nothing is downloaded: nilearn contains the template, which is brain-extracted. Positions are MNI millimetres (RAS+),
arrays are (X, Y, Z) and (X, Y, Z, T).
"""

import gzip
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage

from umbrella.base import ProgressBar, UserError, no_progress
from umbrella.cohorts.make import make_conversations
from umbrella.cohorts.reading import Request
from umbrella.cohorts.settings import CohortSettings
from umbrella.fileio import write_atomic

FILES = {"sMRI": ("anat", "T1w"), "dMRI": ("dwi", "model-DTI_param-FA_dwimap"), "fMRI": ("func", "task-rest_bold")}
"""Modality to the folder and the end of the name of its images."""

SIBLINGS = 12
"""Number of pairs that are families; all later subjects have a family of their own."""
FORMAT_VERSION = 3
"""Increased when the same settings give other files."""
REPETITION_TIME = 2.0
"""Seconds between the frames of a functional series."""
FRAMES = 12
TEMPLATE_SPACING = 2

# The field of view, with a margin around the largest head that the settings allow.
FIELD_OF_VIEW = ((-88.0, 88.0), (-124.0, 92.0), (-90.0, 100.0))
HEAD_CENTRE = np.array([0.0, -21.0, 11.0])
VENTRICLE_CENTRE, VENTRICLE_REACH = np.array([0.0, -15.0, 14.0]), np.array([30.0, 50.0, 30.0])
FRONTAL_CENTRE, FRONTAL_REACH = np.array([30.0, 40.0, 20.0]), np.array([30.0, 30.0, 30.0])
POSTERIOR_CENTRE, POSTERIOR_REACH = np.array([0.0, -60.0, 30.0]), np.array([60.0, 30.0, 40.0])
KNOT_DISTANCE = 30.0
KNOTS = [np.arange(low, high + KNOT_DISTANCE, KNOT_DISTANCE) for low, high in FIELD_OF_VIEW]
# By the last digit of the subject number; the others are RAS. Readers of the cohort have to use the affine.
STORED_ORIENTATION = {5: "LAS", 0: "PIR"}
# Stored integers are thousandths: of the brightest tissue for sMRI and fMRI, of 1 for the diffusion map.
STORED_UNIT = 0.001

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """One subject. Seed and number determine all but site and modalities."""

    number: int
    """1 for the first subject."""
    sex: str
    """"male" or "female"."""
    age: int
    """Years, 20 to 80."""
    site: str
    family: str
    modalities: tuple[str, ...]
    """Modalities with a volume, in the order of ``FILES``; sMRI is always the first."""

    @property
    def id(self) -> str:
        """The identifier in file names and tables, such as "sub-0001"."""
        return f"sub-{self.number:04d}"

    @property
    def row(self) -> dict[str, object]:
        """The subject's row of participants.tsv."""
        return {
            "participant_id": self.id,
            "sex": "n/a" if self.number % 40 == 33 else self.sex[0].upper(),
            "age": "n/a" if self.number % 30 == 27 else self.age,
            "site": self.site,
            "family_id": self.family,
        }

    def paths(self, modality: str) -> list[str]:
        """Paths of the volumes of a modality, relative to the dataset: one for each session."""
        folder, name = FILES[modality]
        if self.number % 32 != 15:
            return [f"{self.id}/{folder}/{self.id}_{name}.nii.gz"]
        sessions = ("ses-1", "ses-2") if modality == "sMRI" else ("ses-1",)
        return [f"{self.id}/{session}/{folder}/{self.id}_{session}_{name}.nii.gz" for session in sessions]


def _generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """The random generator of one subject (or pair of subjects) for one purpose.

    Samples do not depend on earlier ones, so a larger cohort contains the volumes of a smaller one.
    """
    return np.random.default_rng([seed, number, *purpose.encode()])


def draw_subjects(settings: CohortSettings) -> list[Subject]:
    """Sample the subjects of a cohort, in the order of their numbers.

    Subjects 1 and 2, 3 and 4, ... are pairs of one male and one female subject of one site.
    """
    multimodal = {"dMRI": settings.diffusion_subjects, "fMRI": settings.functional_subjects}
    subjects = []
    for number in range(1, settings.subjects + 1):
        pair, second = divmod(number - 1, 2)
        male_first = _generator(settings.seed, pair, "sex").random() < 0.5
        sex = "female" if male_first == second else "male"
        age = int(_generator(settings.seed, number, "age").integers(20, 81))
        # The first subjects of pairs come before the second ones, and all of them at one site: so each split has some.
        rank = pair + second * settings.subjects // 2
        modalities = ("sMRI", *(name for name, count in multimodal.items() if rank < count))
        family = f"fam-{2 * pair + 1 if pair < SIBLINGS else number:04d}"
        site = "east" if pair < max(multimodal.values()) else "west" if pair % 2 else "north"
        subjects.append(Subject(number, sex, age, site, family, modalities))
    return subjects


def make_cohort(folder: Path, settings: CohortSettings, progress: ProgressBar, volumes: bool = True) -> Path:
    """Make the phantom cohort in ``folder``, unless the folder already holds it, and return the folder.

    The folder is a BIDS dataset: sMRI is (X, Y, Z) int16 at ``settings.spacing``; dMRI (X, Y, Z) with values from 0 to
    1; fMRI (X, Y, Z, T) int16 at twice the spacing. Its folder ``conversations`` is the output of
    ``make_conversations``. The same settings give the same bytes. The folder appears when it is complete.

    Args:
        progress: wraps the iteration over subjects.
        volumes: make the volumes; otherwise their files are empty.

    Raises:
        UserError: the folder holds a cohort of other settings, or other files.
    """
    folder = Path(folder).absolute()
    if is_made(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        building = Path(temporary) / "cohort"
        subjects = draw_subjects(settings)
        _write_tables(building, subjects, settings)
        if volumes:
            _write_volumes(building, subjects, settings, progress)
        # Of four subjects, two have the same sex, as comparisons with the same sex need.
        held_out, output = max(4, round(0.2 * len(subjects))), building / "conversations"
        shares = (len(subjects) - 2 * held_out, held_out, held_out)
        request = Request(building, ("sex", "age"), output, compare=("sex",), split=shares, seed=settings.seed)
        make_conversations(request, no_progress, lambda line: None)
        # The settings name the dataset by its absolute path.
        text = (output / "data.yaml").read_text(encoding="utf-8")
        write_atomic(output / "data.yaml", text.replace(f"{building.parent.name}/{building.name}", folder.name))
        try:
            building.rename(folder)
        except OSError:
            # Another process may have made the same cohort in the meantime.
            if not is_made(folder, settings):
                raise
    return folder


def _description(settings: CohortSettings) -> dict[str, Any]:
    """Return the content of dataset_description.json, which identifies the cohort."""
    made_by = {"Name": "umbrella.cohorts.phantom", "Version": str(FORMAT_VERSION), "Settings": settings.model_dump()}
    return {"Name": "Phantom", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [made_by]}


def is_made(folder: Path, settings: CohortSettings) -> bool:
    """Whether the folder holds the cohort of these settings. Raises UserError if it holds anything else."""
    remedy = "Choose another folder for the phantom cohort (resources.storage), or remove this one."
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: not a phantom cohort of this version: dataset_description.json cannot be read ({error})."
            f" {remedy}"
        ) from error
    if found != _description(settings):
        raise UserError(f"{folder}: holds a phantom cohort of other settings or another version. {remedy}")
    return True


def _write_tables(folder: Path, subjects: Sequence[Subject], settings: CohortSettings) -> None:
    """Write the BIDS dataset, with empty files in place of the volumes."""
    for path in (path for subject in subjects for modality in subject.modalities for path in subject.paths(modality)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    rows = [subject.row for subject in subjects]
    table = ["\t".join(map(str, row)) + "\n" for row in (rows[0], *(row.values() for row in rows))]
    write_atomic(folder / "participants.tsv", "".join(table))
    descriptions: dict[str, Any] = {
        "dataset_description": _description(settings),
        "participants": {"sex": {"Levels": {"M": "male", "F": "female"}}, "age": {"Units": "years"}},
        "task-rest_bold": {"TaskName": "rest", "RepetitionTime": REPETITION_TIME},
    }
    for name, content in descriptions.items():
        write_atomic(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")


def _write_volumes(folder: Path, subjects: Sequence[Subject], settings: CohortSettings, progress: ProgressBar) -> None:
    template = _load_template()
    fine, coarse = (_at_spacing(template, spacing) for spacing in (settings.spacing, 2 * settings.spacing))
    for subject in progress(subjects, "making the synthetic cohort"):
        for modality in subject.modalities:
            make = {"sMRI": _structural, "dMRI": _diffusion, "fMRI": _functional}[modality]
            for session, path in enumerate(subject.paths(modality)):
                rng = _generator(settings.seed, subject.number, f"{modality}{session or ''}")
                data = make(coarse if modality == "fMRI" else fine, subject, settings, rng)
                _write_nifti(folder / path, subject, modality, data, settings.spacing)


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
    scale *= 1 + settings.size * np.clip(_generator(settings.seed, subject.number, "size").standard_normal(), -2, 2)
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


def _structural(
    template: tuple[Array, Array], subject: Subject, settings: CohortSettings, rng: np.random.Generator
) -> NDArray[np.int16]:
    tissue, bias, positions = _anatomy(template, subject, settings, _axes(settings.spacing))
    if subject.sex == "male":
        tissue = tissue * (1 + settings.sex_region * _bump(positions, FRONTAL_CENTRE, FRONTAL_REACH))
    fading = settings.age_region * (subject.age - 20) / 60
    tissue = tissue * (1 - fading * _bump(positions, POSTERIOR_CENTRE, POSTERIOR_REACH))
    return _stored(tissue * bias, tissue > 0, settings.noise, rng)


def _diffusion(
    template: tuple[Array, Array], subject: Subject, settings: CohortSettings, rng: np.random.Generator
) -> NDArray[np.int16]:
    """A map similar to fractional anisotropy: high in white matter, which is the bright tissue of the template."""
    tissue, _, _ = _anatomy(template, subject, settings, _axes(settings.spacing))
    anisotropy = 0.1 + 0.6 / (1 + np.exp((0.77 - tissue) / 0.04))
    stored = _stored(anisotropy, tissue > 0, settings.noise, rng)
    return np.minimum(stored, round(1 / STORED_UNIT)).astype(np.int16)


def _functional(
    template: tuple[Array, Array], subject: Subject, settings: CohortSettings, rng: np.random.Generator
) -> NDArray[np.int16]:
    """A series (X, Y, Z, T): T2*-like contrast, bright in fluid, and six regions with slow time courses."""
    axes = _axes(2 * settings.spacing)
    tissue, bias, _ = _anatomy(template, subject, settings, axes)
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


def _write_nifti(path: Path, subject: Subject, modality: str, data: NDArray[np.int16], spacing: float) -> None:
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
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped:
        zipped.write(image.to_bytes())
