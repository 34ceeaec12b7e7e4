"""Images of a dataset: raw BIDS, derivatives, FreeSurfer subjects, and which scan each file is.

Folders are read by ``os.scandir``; docs/decisions.md has the comparison with libraries.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from umbrella.base import ProgressBar, UserError, pluralise
from umbrella.conversations.formats import FREESURFER, SUFFIXES, split_name

SERIES = ("bold", "asl", "dwi")
"""Suffixes of 4D images."""
DEFAULT_SUFFIXES = ("T1w", "FA", "bold")
EXTENSIONS = (".nii.gz", ".nii", ".mgz")
PREFERRED = ("preproc", *FREESURFER)
"""Values of ``desc``, the preferred one first."""
SUBJECT_FOLDER = re.compile(r"(.+?)(?:_ses-([A-Za-z0-9+]+))?(\.long\..*|\.base)?")
"""Name of a subject's folder; FreeSurfer's may have a session, and a version of the longitudinal stream."""
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


@dataclass(slots=True)
class _File:
    path: str
    subject: str
    entities: dict[str, str]

    @property
    def scan(self) -> tuple[str, str, str, str]:
        """Subject, session, task and run. Several files of one suffix with these are variants of one scan."""
        session, task, run = (self.entities.get(name, "") for name in SCAN_ENTITIES)
        return self.subject, session, task, run


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
    images, found, others = Images(), defaultdict[str, list[_File]](list), Counter[str]()
    for folder in folders:
        for entry in progress(_subject_folders(folder), f"reading {folder.name}"):
            for file, suffix in _subject_files(entry):
                if suffix == "sessions":
                    images.session_files.append(Path(file.path))
                elif suffix not in suffixes:
                    others[suffix] += suffix in SUFFIXES
                elif os.path.islink(file.path) and not os.path.exists(file.path):
                    images.left_out["files that are links to nothing (with DataLad: datalad get)"] += 1
                else:
                    file.entities["derivative"] = folder.name
                    found[suffix].append(file)
    for suffix, number in others.items():
        reason = f"images with the suffix {suffix}, which --suffixes {','.join([*suffixes, suffix])} adds"
        if suffix == "dwi":
            reason = (
                "raw diffusion series (_dwi): 4D, one volume per gradient, not a map that shows tissue;"
                " compute maps (FA, MD) with QSIPrep or dtifit, or take the series with --suffixes dwi"
            )
        images.left_out[reason] += number
    if not found:
        raise UserError(_no_image(dataset, folders, suffixes, images.left_out))
    _apply_selection(found, select, images.left_out)
    root = os.path.abspath(dataset) + os.sep

    def relative(path: str) -> str:
        return os.path.abspath(path).removeprefix(root) if path else ""

    problems = []
    for suffix, files_of_suffix in found.items():
        scans: dict[tuple[str, str, str, str], list[_File]] = defaultdict(list)
        for file in files_of_suffix:
            scans[file.scan].append(file)
        several = []
        for scan, files in scans.items():
            descs = {file.entities.get("desc") for file in files}
            best = next((desc for desc in PREFERRED if desc in descs and "desc" not in select), None)
            if best and len(descs) > 1 and len({file.entities["derivative"] for file in files}) == 1:
                preferred = [file for file in files if file.entities.get("desc") == best]
                reason = f"variants of {suffix} beside desc-{best}, which --select desc=NAME takes in its place"
                images.left_out[reason] += len(files) - len(preferred)
                files = preferred
            if len(files) > 1:
                several.append(files)
            mask = relative(_mask_of(files[0].path)) if masks else ""
            chosen = Scan(*scan, suffix, suffixes[suffix], relative(files[0].path), mask)
            images.scans.setdefault(chosen.subject, []).append(chosen)
        if several:
            share = f"{len(several)} of {pluralise(len(scans), 'scan')}"
            problems.append(f"{suffix}: several files match {share}; choose by one of")
            problems += [f"  --select {choice}  for {relative(path)}" for choice, path in _variants(several[0])]
    if problems:
        raise UserError("\n".join(problems))
    for of_subject in images.scans.values():
        of_subject.sort(key=lambda scan: (list(suffixes).index(scan.suffix), scan.name))
    return images


def _variants(files: Sequence[_File]) -> Iterator[tuple[str, str]]:
    """Yield the selection of each file, by the entities in which they differ, and its path."""
    keys = dict.fromkeys(key for file in files for key in file.entities)
    differing = [key for key in keys if len({file.entities.get(key) for file in files}) > 1]
    if len({file.entities["derivative"] for file in files}) == len(files):
        differing = ["derivative"]
    for file in files:
        yield ",".join(f"{key}={file.entities.get(key) or 'none'}" for key in differing), file.path


def _subject_folders(folder: Path) -> list[os.DirEntry[str]]:
    """Return the folders sub-* and those of FreeSurfer subjects, sorted."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; check the path") from None
    return [
        entry
        for entry in entries
        if (entry.name.startswith("sub-") or os.path.isdir(f"{entry.path}/mri"))
        and entry.is_dir()
        and not entry.name.startswith("fsaverage")
    ]


def _subject_files(entry: os.DirEntry[str]) -> Iterator[tuple[_File, str]]:
    """Yield the images of a subject with their suffixes, and the session table with the suffix "sessions"."""
    subject, session, version = SUBJECT_FOLDER.fullmatch(entry.name).groups()  # type: ignore[union-attr]
    own = {"ses": session} if session else {}
    if os.path.isdir(f"{entry.path}/mri"):
        own |= {"long": version.split(".")[1], "extension": ".mgz"} if version else {"extension": ".mgz"}
        for name in FREESURFER:
            if os.path.lexists(path := f"{entry.path}/mri/{name}.mgz"):
                entities, suffix = split_name(path)
                yield _File(path, subject, own | entities), suffix
        return
    stack = [(entry.path, own)]
    while stack:
        folder, inherited = stack.pop()
        for item in sorted(os.scandir(folder), key=lambda item: item.name):
            if item.is_dir():
                stack.append((item.path, inherited | ({"ses": item.name[4:]} if item.name[:4] == "ses-" else {})))
            elif item.name.endswith("_sessions.tsv"):
                yield _File(item.path, subject, {}), "sessions"
            elif item.name.endswith(EXTENSIONS) and not item.name.startswith("."):
                extension = next(extension for extension in EXTENSIONS if item.name.endswith(extension))
                entities, suffix = split_name(item.name)
                yield _File(item.path, subject, entities | {"extension": extension} | inherited), suffix


def _mask_of(path: str) -> str:
    mask = re.sub(r"(_desc-[^_]+)?_[A-Za-z0-9]+(\.nii(\.gz)?)$", r"_desc-brain_mask\2", path)
    return mask if os.path.exists(mask) and mask != path else ""


def _no_image(dataset: Path, folders: Sequence[Path], suffixes: Iterable[str], left_out: Counter[str]) -> str:
    where = ", ".join(map(str, folders))
    files = islice((Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names), 200)
    if dicom := next(filter(is_dicom, files), None):
        return (
            f"{where}: holds DICOM files, as {dicom.name}; convert them to NIfTI with dcm2niix, in BIDS folders for"
            " instance with heudiconv or dcm2bids, and give that folder"
        )
    hints = [f"{count} {reason}" for reason, count in left_out.items()]
    if names := sorted(path.name for path in (dataset / "derivatives").glob("*") if path.is_dir()):
        hints.append(f"derivatives are not searched unless named: --derivatives {','.join(names)}")
    hints = hints or ["give a folder with sub-*/[ses-*/]{anat,dwi,func,perf}/, of FreeSurfer subjects, or a table"]
    return f"{where}: no image with the suffix {', '.join(suffixes)}; {'; '.join(hints)}"


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file: by its suffix, or by the mark at byte 128."""
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    with suppress(OSError), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def _apply_selection(found: dict[str, list[_File]], select: Mapping[str, str], left_out: Counter[str]) -> None:
    for key, text in select.items():
        value = "" if text == "none" else text
        values = Counter(file.entities.get(key, "") for files in found.values() for file in files)
        if value not in values:
            known = ", ".join(f"{key}={name or 'none'} ({number} files)" for name, number in values.most_common(12))
            raise UserError(f"--select {key}={text}: matches no image; there are {known}")
        for suffix, files in found.items():
            if kept := [file for file in files if file.entities.get(key, "") == value]:
                left_out[f"images that --select {key}={text} leaves out"] += len(files) - len(kept)
                found[suffix] = kept


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
            continue  # umbrella prepare reports files that cannot be read
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
