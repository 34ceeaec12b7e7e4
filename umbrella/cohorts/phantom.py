"""The phantom cohort: subjects simulated from the MNI152 T1 template, with effects of sex and age of known size.

Nothing is downloaded: nilearn contains the template, which is brain-extracted. Positions are MNI millimetres (RAS+),
arrays are (X, Y, Z) and (X, Y, Z, T).
"""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage

from umbrella.base import UserError
from umbrella.cohorts.phantom_subjects import SPLITS, Subject, draw_subjects, generator, split_conversations
from umbrella.cohorts.settings import CohortSettings

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
            if modality == "fMRI":
                data, spacing = _functional(coarse, subject, settings), 2 * settings.spacing
            else:
                make = _structural if modality == "sMRI" else _diffusion
                data, spacing = make(fine, subject, settings), settings.spacing
            orientation = STORED_ORIENTATION.get(subject.number % 10, "RAS")
            slope = STORED_UNIT if modality == "dMRI" else None
            _write_nifti(folder / subject.path(modality), data, spacing, orientation, slope)

    rows = ["participant_id\tsex\tage\tsplit", *(f"{s.id}\t{s.sex}\t{s.age}\t{s.split}" for s in subjects)]
    _write_text(folder / "participants.tsv", "\n".join(rows))
    for split in SPLITS:
        samples = split_conversations([s for s in subjects if s.split == split], settings.seed)
        _write_text(folder / "conversations" / f"{split}.jsonl", "\n".join(json.dumps(sample) for sample in samples))
    _write_text(folder / "cohort.json", json.dumps(_description(settings), indent=2))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


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
    rng = generator(settings.seed, subject.number, "anatomy")
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
    return _stored(tissue * bias, tissue > 0, settings.noise, generator(settings.seed, subject.number, "sMRI"))


def _diffusion(template: tuple[Array, Array], subject: Subject, settings: CohortSettings) -> NDArray[np.int16]:
    """A map similar to fractional anisotropy: high in white matter, which is the bright tissue of the template."""
    tissue, _, _ = _anatomy(template, subject, settings, _axes(settings.spacing))
    anisotropy = 0.1 + 0.6 / (1 + np.exp((0.77 - tissue) / 0.04))
    stored = _stored(anisotropy, tissue > 0, settings.noise, generator(settings.seed, subject.number, "dMRI"))
    return np.minimum(stored, round(1 / STORED_UNIT)).astype(np.int16)


def _functional(template: tuple[Array, Array], subject: Subject, settings: CohortSettings) -> NDArray[np.int16]:
    """A series (X, Y, Z, T): T2*-like contrast, bright in fluid, and six regions with slow time courses."""
    axes = _axes(2 * settings.spacing)
    tissue, bias, _ = _anatomy(template, subject, settings, axes)
    rng = generator(settings.seed, subject.number, "fMRI")
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


def _write_nifti(
    path: Path, data: NDArray[np.int16], spacing: float, orientation: str, slope: float | None = None
) -> None:
    """Write (X, Y, Z[, T]) data in RAS order to a file with the given orientation. Equal data give equal bytes."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [low for low, _ in FIELD_OF_VIEW]
    image = nib.Nifti1Image(data, affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation)))
    image.set_sform(image.affine, code="scanner")
    image.set_qform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], REPETITION_TIME))
    image.header.set_slope_inter(slope, 0 if slope else None)
    # Without name and time, which the gzip header holds by default.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped:
        zipped.write(image.to_bytes())
