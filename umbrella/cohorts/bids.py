"""Images of a dataset: raw BIDS, derivatives, FreeSurfer subjects, and which scan each file is.

Folders are read by ``os.scandir``; docs/decisions.md has the comparison with libraries.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from umbrella.base import ProgressBar, UserError, pluralise
from umbrella.conversations.formats import SUFFIXES

MODALITIES = {**SUFFIXES, **dict.fromkeys(("PDw", "T2starw", "UNIT1"), "sMRI"), "asl": "ASL", "cbf": "ASL"}
"""BIDS suffix to the modality that it has by default."""
SERIES = ("bold", "asl", "dwi")
"""Suffixes of 4D images."""
DEFAULT_SUFFIXES = ("T1w", "FA", "bold")
EXTENSIONS = (".nii.gz", ".nii", ".mgz")
FREESURFER = ("brain", "norm", "T1")
"""Names of FreeSurfer volumes, the preferred one first."""
PREFERRED = ("preproc", *FREESURFER)
"""Values of ``desc``, the preferred one first."""
SCAN_ENTITIES = ("ses", "task", "run")
"""Entities in which files of one subject and suffix are different scans. Other entities are variants of one scan."""
BRAIN_LITRES = 2.0
"""A brain has 1.0 to 1.8 litres; a head in the field of view of a scanner has 2.5 to 5."""


@dataclass(frozen=True, slots=True)
class Scan:
    """One image of a subject."""

    subject: str
    """As in the name of its folder ("sub-01"), or as in the table that lists the images."""
    session: str
    task: str
    run: str
    """These three without "ses-" and so on; empty if the file name does not have them."""
    suffix: str
    """BIDS suffix, such as "T1w"."""
    modality: str
    path: str
    """Relative to the dataset, or absolute if it is outside of the dataset."""
    mask: str = ""
    """The brain mask beside a derivative, if asked for."""

    @property
    def name(self) -> str:
        """The BIDS name without variants, such as "sub-01_ses-pre_run-1_T1w"."""
        parts = zip(SCAN_ENTITIES, (self.session, self.task, self.run), strict=True)
        return "_".join([self.subject, *(f"{key}-{value}" for key, value in parts if value), self.suffix])


@dataclass
class Images:
    """The scans of each subject, the session tables, and what was left out."""

    scans: dict[str, list[Scan]] = field(default_factory=dict)
    session_files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason to number of files."""
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _File:
    path: str
    entities: dict[str, str]
    mask: str = ""


Found = defaultdict[str, dict[tuple[str, str, str, str], list[_File]]]
"""Suffix to (subject, session, task, run) to its files."""


def find_images(
    dataset: Path,
    folders: Sequence[Path],
    suffixes: Mapping[str, str],
    select: Mapping[str, str],
    masks: bool,
    progress: ProgressBar,
) -> Images:
    """Find the images of a dataset.

    Args:
        dataset: the folder that paths are relative to.
        folders: folders with subject folders: the dataset, or derivatives.
        suffixes: wanted BIDS suffix to modality.
        select: entity to value; "" or "none": without this entity. An entry applies to the suffixes of which any file
            has this value. Two more names are ``derivative``, the name of the folder, and ``extension``.
        masks: also find the brain mask of each derivative.

    Raises:
        UserError: there is no image; ``select`` matches none; or several files are variants of one scan.
    """
    images, found = Images(), Found(dict)
    for folder in folders:
        subjects = sorted(_subject_folders(folder), key=lambda entry: entry.name)
        for entry in progress(subjects, f"reading {folder.name}") if subjects else ():
            for path, entities, suffix in _subject_files(entry):
                if suffix == "sessions":
                    images.session_files.append(Path(path))
                elif suffix not in suffixes:
                    images.left_out[suffix] += suffix in MODALITIES
                elif os.path.islink(path) and not os.path.exists(path):
                    images.left_out["files that are links to nothing (with DataLad: datalad get)"] += 1
                else:
                    entities["derivative"] = folder.name
                    subject = f"sub-{entities['sub']}" if entry.name.startswith("sub-") else entry.name
                    session, task, run = (entities.get(name, "") for name in SCAN_ENTITIES)
                    key = (subject, session, task, run)
                    file = _File(path, entities, _mask_of(path) if masks else "")
                    found[suffix].setdefault(key, []).append(file)
    _explain(images, suffixes)
    if not found:
        raise UserError(_no_image(dataset, folders, suffixes, images.left_out))
    _apply_selection(found, select, images.left_out)
    root = os.path.abspath(dataset) + os.sep

    def relative(path: str) -> str:
        return os.path.abspath(path).removeprefix(root) if path else ""

    problems = []
    for suffix, scans in found.items():
        several = []
        for (subject, session, task, run), files in scans.items():
            if len(files) > 1 and "desc" not in select:
                descs = [file.entities.get("desc", "") for file in files]
                best = next((desc for desc in PREFERRED if desc in descs), None)
                files = [f for f, desc in zip(files, descs, strict=True) if best is None or desc == best]
            if len(files) > 1:
                several.append(files)
            path, mask = relative(files[0].path), relative(files[0].mask)
            scan = Scan(subject, session, task, run, suffix, suffixes[suffix], path, mask)
            images.scans.setdefault(subject, []).append(scan)
        if several:
            problems.append(_describe_variants(suffix, several, len(scans), relative))
    if problems:
        raise UserError("\n".join(problems))
    for scans_of_subject in images.scans.values():
        scans_of_subject.sort(key=lambda scan: (list(suffixes).index(scan.suffix), scan.name))
    return images


def _subject_folders(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; check the path") from None
    for entry in entries:
        if entry.is_dir() and (
            entry.name.startswith("sub-")
            or (os.path.isdir(f"{entry.path}/mri") and not entry.name.startswith("fsaverage"))
        ):
            yield entry


def _subject_files(entry: os.DirEntry[str]) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield (path, entities, suffix) of the images of a subject, and the session table with the suffix "sessions"."""
    own = dict(re.findall(r"(sub|ses)-([A-Za-z0-9+]+)", entry.name))
    if os.path.isdir(f"{entry.path}/mri"):
        for name in FREESURFER:
            if os.path.lexists(path := f"{entry.path}/mri/{name}.mgz"):
                yield path, own | {"desc": name, "extension": ".mgz"} | _longitudinal(entry.name), "T1w"
        return
    stack = [(entry.path, own)]
    while stack:
        folder, inherited = stack.pop()
        for item in sorted(os.scandir(folder), key=lambda item: item.name):
            if item.name.startswith("."):
                continue
            if item.is_dir():
                session = {"ses": item.name[4:]} if item.name.startswith("ses-") else {}
                stack.append((item.path, inherited | session))
            elif item.name.endswith("_sessions.tsv"):
                yield item.path, {}, "sessions"
            elif item.name.endswith(EXTENSIONS):
                entities, suffix = _parse(item.name)
                yield item.path, inherited | entities, suffix


def _longitudinal(name: str) -> dict[str, str]:
    return {"long": "base" if name.endswith(".base") else "long"} if re.search(r"\.(long\.|base$)", name) else {}


def _parse(name: str) -> tuple[dict[str, str], str]:
    """Split a file name into entities and suffix. Diffusion maps have the suffix FA or MD in every naming."""
    extension = next(extension for extension in EXTENSIONS if name.endswith(extension))
    *parts, suffix = name[: -len(extension)].split("_")
    entities = dict(part.split("-", 1) for part in parts if "-" in part)
    if suffix == "dwimap":
        suffix = entities.pop("param", "") or entities.pop("desc", "")
    if suffix.upper() in ("FA", "MD"):
        suffix = suffix.upper()
    return entities | {"extension": extension}, suffix


def _mask_of(path: str) -> str:
    folder, name = os.path.split(path)
    stem = re.sub(r"_(desc-[^_]+_)?[A-Za-z0-9]+(\.nii(\.gz)?)$", r"_desc-brain_mask\2", name)
    mask = os.path.join(folder, stem)
    return mask if os.path.exists(mask) else ""


def _explain(images: Images, suffixes: Mapping[str, str]) -> None:
    """Turn the counts of suffixes that are not wanted into reasons."""
    for suffix in [name for name in images.left_out if name in MODALITIES]:
        number = images.left_out.pop(suffix)
        if not number:
            continue
        reason = f"images with the suffix {suffix}, which --suffixes {','.join([*suffixes, suffix])} adds"
        if suffix == "dwi":
            reason = (
                "raw diffusion series (_dwi): 4D, one volume per gradient, not a map that shows tissue;"
                " compute maps (FA, MD) with QSIPrep or dtifit, or take the series with --suffixes dwi"
            )
        images.left_out[reason] += number


def _no_image(dataset: Path, folders: Sequence[Path], suffixes: Iterable[str], left_out: Counter[str]) -> str:
    where = ", ".join(map(str, folders))
    dicom = next((path for folder in folders for path in _first_files(folder, 200) if is_dicom(path)), None)
    if dicom:
        return (
            f"{where}: holds DICOM files, as {dicom.name}; convert them to NIfTI with dcm2niix, in BIDS folders for"
            " instance with heudiconv or dcm2bids, and give that folder"
        )
    derivatives = sorted(entry.name for entry in (dataset / "derivatives").glob("*") if entry.is_dir())
    hints = [f"{count} {reason}" for reason, count in left_out.items()]
    hints += (
        [f"derivatives are not searched unless named: --derivatives {','.join(derivatives)}"] if derivatives else []
    )
    hints = hints or ["give a folder with sub-*/[ses-*/]{anat,dwi,func,perf}/, of FreeSurfer subjects, or a table"]
    return f"{where}: no image with the suffix {', '.join(suffixes)}; {'; '.join(hints)}"


def _first_files(folder: Path, number: int) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files)[:number]:
            yield Path(parent, name)
            number -= 1
        if number <= 0:
            return


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file: by its suffix, or by the mark at byte 128."""
    if path.suffix.lower() in (".dcm", ".ima") or path.name == "DICOMDIR":
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _apply_selection(found: Found, select: Mapping[str, str], left_out: Counter[str]) -> None:
    for key, value in select.items():
        value = "" if value == "none" else value
        values = Counter(file.entities.get(key, "") for s in found.values() for fs in s.values() for file in fs)
        if value not in values:
            known = ", ".join(f"{key}={name or 'none'} ({number} files)" for name, number in values.most_common(12))
            raise UserError(f"--select {key}={value or 'none'}: matches no image; there are {known}")
        for suffix, scans in found.items():
            kept = {k: [file for file in files if file.entities.get(key, "") == value] for k, files in scans.items()}
            if any(kept.values()):
                reason = f"images that --select {key}={value or 'none'} leaves out"
                left_out[reason] += sum(map(len, scans.values())) - sum(map(len, kept.values()))
                found[suffix] = {k: files for k, files in kept.items() if files}


def _describe_variants(suffix: str, several: list[list[_File]], scans: int, relative: Callable[[str], str]) -> str:
    files = several[0]
    keys = [key for key in dict.fromkeys(k for f in files for k in f.entities) if _differs(files, key)]
    lines = [f"{suffix}: several files match {len(several)} of {pluralise(scans, 'scan')}; choose by one of"]
    for file in files:
        chosen = ",".join(f"{key}={file.entities.get(key) or 'none'}" for key in keys)
        lines.append(f"  --select {chosen or '...'}  for {relative(file.path)}")
    return "\n".join(lines)


def _differs(files: list[_File], key: str) -> bool:
    return len({file.entities.get(key) for file in files}) > 1


def head_note(dataset: Path, scans: Sequence[Scan]) -> str:
    """Return a note if structural scans show whole heads, judged from up to five of them; else "".

    Voxels above a tenth of the 99th percentile count as tissue, and heads have more litres of it than brains.
    """
    structural = [scan for scan in scans if scan.modality == "sMRI"]
    litres = []
    for scan in structural[:: max(1, len(structural) // 5)][:5]:
        try:
            image = nib.load(dataset / scan.path)
            data = np.asanyarray(image.dataobj)
            voxel = abs(np.linalg.det(image.affine[:3, :3]))
        except (OSError, ValueError, EOFError, ImageFileError):
            continue  # prepare.py reports files that cannot be read
        litres.append(np.count_nonzero(data > 0.1 * np.percentile(data, 99)) * voxel / 1e6)
    if not litres or np.median(litres) < BRAIN_LITRES:
        return ""
    derivatives = {path.parent.parent.name for path in (dataset / "derivatives").glob("*/sub-*/mri")}
    remedy = (
        f"--derivatives {sorted(derivatives)[0]}" if derivatives else "brain.mgz of FreeSurfer, or skull-strip them"
    )
    return (
        f"the structural scans look like whole heads ({np.median(litres):.1f} litres of tissue in the field of view, a"
        f" brain has up to 1.8): the face and neck then take part of the grid; use {remedy}"
    )
