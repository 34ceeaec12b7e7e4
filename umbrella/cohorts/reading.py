"""Reading of a dataset: its images and tables, joined to subjects with values."""

import os
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from umbrella.base import ProgressBar, UserError, pluralise
from umbrella.cohorts.bids import DEFAULT_SUFFIXES, EXTENSIONS, SERIES, Images, Scan, find_images
from umbrella.cohorts.tables import Table, Variable, normalise, pick_column, subject_key
from umbrella.conversations.formats import SUFFIXES, split_name
from umbrella.conversations.schema import FAMILY

METADATA = ("site", "sex", "age")
"""Variables that are in the metadata of conversations where a column is found."""
PATH_COLUMNS = {"smri": "T1w", "dmri": "FA", "fmri": "bold", "t1": "T1w", "t2": "T2w"} | {
    suffix.casefold(): suffix for suffix in SUFFIXES
}
"""Word in the name of a column of paths to the suffix of its images."""


@dataclass(frozen=True)
class Request:
    """What to make. The fields are the options of ``umbrella make-conversations``."""

    dataset: Path
    targets: tuple[str, ...]
    output: Path
    derivatives: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    """BIDS suffixes, also as "suffix=modality"; empty: ``DEFAULT_SUFFIXES``."""
    select: Mapping[str, str] = field(default_factory=dict)
    masks: bool = False
    tables: tuple[Path, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Variable to code to value."""
    keep: tuple[str, ...] = ()
    templates: Path | None = None
    tasks: tuple[str, ...] = ("T1", "T2", "T3")
    together: bool = False
    """One conversation of T1 and T2 asks about all targets, in several turns."""
    compare: tuple[str, ...] = ()
    """Targets of comparisons; empty: all."""
    references: int = 1
    """Comparisons of each subject, suffix and target."""
    reference_pool: float = 0.0
    """Share of the groups of each split that are references and are not compared themselves; 0: all are both."""
    anchors: str = ""
    """A number, or names of subjects with commas."""
    bins: int = 4
    split: tuple[float, ...] = (70, 15, 15)
    group: str = ""
    """Empty: ``FAMILY``, if there is such a column."""
    hold_out: Mapping[str, str] = field(default_factory=dict)
    """Variable to the value whose subjects are the external split."""
    folds: int = 0
    split_file: Path | None = None
    seed: int = 0
    dry_run: bool = False


@dataclass(slots=True)
class Subject:
    """A subject with its scans and values."""

    id: str
    group: str
    """The family, or the subject itself."""
    scans: list[Scan]
    values: dict[str, dict[str, Any]]
    """Session to variable to value. A variable without a value is left out."""
    split: str = ""

    def first(self, variable: str) -> Any:
        """Return the value of the first session that has one, or None."""
        return next((values[variable] for values in self.values.values() if variable in values), None)


@dataclass
class Cohort:
    """The subjects that can be asked about, and how they were found."""

    root: Path
    """The folder of relative paths."""
    suffixes: Mapping[str, str]
    """BIDS suffix to modality, of all that were looked for."""
    subjects: list[Subject] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was found, guessed and left out."""
    left_out: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(subject, session, target, reason)."""
    edges: dict[str, list[float]] = field(default_factory=dict)
    """Target to the boundaries of the bins in which numbers count as the same."""

    def stratum(self, target: str, value: Any) -> Any:
        """Return the class, or the bin of a number."""
        return bisect(self.edges[target], value) if target in self.edges and value is not None else value

    def drop(self, subject: str, session: str, target: str, reason: str) -> None:
        """Record that something is left out."""
        self.left_out.append((subject, session, target, reason))


def read_cohort(request: Request, progress: ProgressBar) -> Cohort:
    """Find the images of a dataset and the values of its subjects.

    Raises:
        UserError: there is no image or no table, a column is missing or ambiguous, or no subject is in both.
    """
    suffixes = _suffixes(request.suffixes)
    in_table = request.dataset.is_file()
    cohort = Cohort((request.dataset.parent if in_table else request.dataset).absolute(), suffixes)
    if in_table:
        images = _images_of_table(request, suffixes)
    else:
        folders = [_derivative(request.dataset, name) for name in request.derivatives] or [request.dataset]
        images = find_images(request.dataset, folders, suffixes, request.select, request.masks, progress)
    cohort.notes += [f"left out: {number} {reason}" for reason, number in images.left_out.items() if number]
    tables = _tables(request, images)
    _choose_variables(request, tables, cohort)
    _join(request, tables, images, cohort)
    return cohort


def _suffixes(given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given or DEFAULT_SUFFIXES:
        suffix, _, modality = text.partition("=")
        found[suffix] = modality or SUFFIXES.get(suffix, "")
        if not found[suffix]:
            raise UserError(f"--suffixes {suffix}: of which modality? Write {suffix}=sMRI, or another modality")
    for modality in found.values():
        kinds = {suffix in SERIES for suffix, of in found.items() if of == modality}
        if len(kinds) > 1:
            names = ", ".join(suffix for suffix, of in found.items() if of == modality)
            raise UserError(f"--suffixes: {names} are 3D and 4D images of {modality}; name another, as in dwi=DWI")
    return found


def _derivative(dataset: Path, name: str) -> Path:
    places = [dataset] if name == "raw" else [dataset / "derivatives" / name, Path(name).expanduser()]
    for place in places:
        if place.is_dir():
            return place
    known = sorted(path.name for path in (dataset / "derivatives").glob("*") if path.is_dir())
    raise UserError(
        f"--derivatives {name}: no such folder; in {dataset / 'derivatives'} are {', '.join(known) or 'none'}"
    )


def _images_of_table(request: Request, suffixes: Mapping[str, str]) -> Images:
    """Read the images from columns of paths. Several rows of a subject and session are runs."""
    file, table, images = request.dataset, Table.open(request.dataset), Images()
    subject, session = (pick_column(table, name, request.columns) for name in ("participant_id", "session_id"))
    if not subject:
        raise UserError(f"{file}: no column of subjects in {', '.join(table.header)}; --columns participant_id=NAME")
    columns: dict[str, str] = {}
    wanted = {suffix.casefold(): suffix for suffix in suffixes}
    named = {normalise(column): wanted[name] for name, column in request.columns.items() if name in wanted}
    seen: Counter[tuple[str, ...]] = Counter()
    for row in table.rows:
        for column, text in row.items():
            if not text.lower().endswith(EXTENSIONS):
                continue
            if column not in columns:
                words = [PATH_COLUMNS[word] for word in column.split("_") if word in PATH_COLUMNS]
                columns[column] = named.get(column) or next(iter(words), split_name(text)[1])
            suffix = columns[column]
            if suffix not in suffixes:
                reason = f"images of the column {column}; --columns T1w={column} says which suffix it has"
                images.left_out[reason] += 1
                continue
            path = os.path.join(file.parent, os.path.expanduser(text))
            if not os.path.exists(path):
                images.left_out["paths that do not exist"] += 1
                continue
            key = (row[subject], row[session].removeprefix("ses-") if session else "", suffix)
            seen[key] += 1
            run = str(seen[key]) if seen[key] > 1 else ""
            relative = os.path.abspath(path).removeprefix(os.path.abspath(file.parent) + os.sep)
            scan = Scan(key[0], key[1], "", run, suffix, suffixes[suffix], relative)
            images.scans.setdefault(row[subject], []).append(scan)
    if not images.scans:
        reasons = "; ".join(f"{number} {reason}" for reason, number in images.left_out.items())
        raise UserError(f"{file}: no column holds paths of images that exist ({', '.join(EXTENSIONS)}). {reasons}")
    return images


def _tables(request: Request, images: Images) -> list[Table]:
    """Open all tables, the one that wins first."""
    tables = [Table.open(file) for file in request.tables]
    if request.dataset.is_file():
        return [*tables, Table.open(request.dataset)]
    folder = request.dataset.absolute()
    if not (folder / "participants.tsv").is_file() and folder.parent.name == "derivatives":
        folder = folder.parent.parent
    if images.session_files:
        tables.append(Table.of_sessions(images.session_files))
    files = [folder / "sessions.tsv", folder / "participants.tsv", *sorted((folder / "phenotype").glob("*.tsv"))]
    tables += [Table.open(file) for file in files if file.is_file()]
    if not tables:
        raise UserError(f"{folder}: no participants.tsv, so there are no labels; give a table with --table FILE")
    return tables


def _choose_variables(request: Request, tables: Sequence[Table], cohort: Cohort) -> None:
    """Choose the columns of all variables, load them, and note what was guessed."""
    needed = dict.fromkeys([*request.targets, *request.keep, *request.hold_out])
    if request.group:
        needed[request.group] = None
    sources: dict[str, list[tuple[Table, str]]] = {}
    for name in dict.fromkeys([*needed, *METADATA, FAMILY]):
        try:
            found = [(table, column) for table in tables if (column := pick_column(table, name, request.columns))]
        except UserError as error:
            if name in needed:
                raise
            cohort.notes.append(f"not in the metadata: {error}")
            continue
        if found:
            sources[name] = found
        elif name in needed or name in request.columns:
            listed = "; ".join(f"{table.name} has {', '.join(table.header[:40])}" for table in tables)
            asked = f"{name}={request.columns[name]}" if name in request.columns else name
            raise UserError(
                f"no column for {asked}: {listed}; --columns {name}=NAME names it, --table FILE adds a table"
            )
    for table in tables:
        used = [column for found in sources.values() for one, column in found if one is table]
        if used:
            table.load(request.columns, used)
    for name, found in sources.items():
        variable = cohort.variables[name] = Variable(name, found, request.values.get(name, {}))
        guessed = name not in request.columns and any(column != name for _, column in found)
        cohort.notes.append(variable.description + (f" (guessed; --columns {name}=NAME decides)" if guessed else ""))


def _join(request: Request, tables: Sequence[Table], images: Images, cohort: Cohort) -> None:
    in_tables = {key for table in tables for key in table.sessions}
    on_disk = {subject_key(subject): subject for subject in images.scans}
    key_of = {subject: key for key, subject in on_disk.items() if key in in_tables}
    rest = defaultdict(list)
    for key in in_tables - set(key_of.values()):
        rest[key.lstrip("0")].append(key)
    zeros = {s: rest[key.lstrip("0")][0] for key, s in on_disk.items() if len(rest.get(key.lstrip("0"), ())) == 1}
    zeros = {subject: key for subject, key in zeros.items() if subject not in key_of}
    if zeros:
        cohort.notes.append(f"{pluralise(len(zeros), 'subject')} matched without leading zeros, as {_first(zeros)}")
    key_of |= zeros
    if not key_of:
        examples = f"{_first(images.scans)} on disk, {_first(in_tables)} in the tables"
        raise UserError(f"no subject is both on disk and in the tables: {examples}; --columns participant_id=NAME")
    for subject in sorted(images.scans.keys() - key_of.keys()):
        cohort.drop(subject, "", "", "on disk, not in the tables")
    for key in sorted(in_tables - set(key_of.values())):
        cohort.drop(key, "", "", "in the tables, not on disk")
    cohort.notes.append(
        f"subjects: {len(key_of)} on disk and in the tables, {len(images.scans) - len(key_of)} on disk only,"
        f" {len(in_tables) - len(key_of)} in the tables only"
    )
    group = request.group or FAMILY
    for subject in sorted(key_of):
        scans, values = images.scans[subject], dict[str, dict[str, Any]]()
        for session in dict.fromkeys(scan.session for scan in scans):
            own = values[session] = {}
            for name, variable in cohort.variables.items():
                value, reason = variable.value(key_of[subject], session)
                if value is not None:
                    own[name] = value
                elif name in request.targets:
                    cohort.drop(subject, session, name, reason)
        ages = [of.get("age") for of in values.values()]
        if all(isinstance(age, int | float) for age in ages):  # sessions such as "pre" and "post" have no order
            values = dict(sorted(values.items(), key=lambda item: item[1]["age"]))
            order = list(values)
            scans = sorted(
                scans, key=lambda scan: (list(cohort.suffixes).index(scan.suffix), order.index(scan.session))
            )
        found = Subject(subject, subject, scans, values)
        found.group = str(found.first(group) or subject)
        if any(found.first(target) is not None for target in request.targets):
            cohort.subjects.append(found)
        else:
            cohort.drop(subject, "", "", "no value of any target")
    for target in request.targets:
        different = {subject.first(target) for subject in cohort.subjects} - {None}
        if len(different) == 1:
            raise UserError(f"{target}: every subject has {different.pop()!r}, so there is nothing to ask")
        if not different:
            reasons = Counter(reason for _, _, name, reason in cohort.left_out if name == target)
            counted = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common(5))
            raise UserError(
                f"{target}: no subject has a value: {counted}; --columns {target}=NAME takes another column, --values"
                f" {target}=CODE:VALUE,... explains codes"
            )
        if cohort.variables[target].is_number:
            numbers = [value for subject in cohort.subjects if (value := subject.first(target)) is not None]
            cohort.edges[target] = quantiles(numbers, n=request.bins) if request.bins > 1 else []


def _first(names: Any) -> str:
    return str(min(names, default="none"))
