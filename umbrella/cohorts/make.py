"""From a dataset to conversations, splits, settings and a report: the work of ``umbrella make-conversations``."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from umbrella.base import ProgressBar, UserError, pluralise
from umbrella.cohorts.assign_splits import (
    ANCHORS,
    EXTERNAL,
    assign_groups,
    check_classes,
    hash_fraction,
    known_splits,
    read_split_file,
)
from umbrella.cohorts.bids import SERIES, head_note
from umbrella.cohorts.questions import Questions, load_templates
from umbrella.cohorts.reading import Cohort, Request, Subject, read_cohort
from umbrella.cohorts.tables import Variable, subject_key
from umbrella.conversations.formats import SUFFIXES
from umbrella.conversations.schema import FAMILY, SPLITS
from umbrella.fileio import write_atomic
from umbrella.modality import DEFAULT_MODALITIES

LISTED = 10
"""Number of names that the report shows of a long list; left_out.tsv has all."""


def make_conversations(request: Request, progress: ProgressBar, show: Callable[[str], None]) -> None:
    """Read a dataset and write conversations, splits, templates, settings and a report, unless ``dry_run``.

    Args:
        progress: wraps the iteration over subjects.
        show: prints a line.

    Raises:
        UserError: something must be decided or corrected. Nothing is written then.
    """
    cohort = read_cohort(request, progress)
    examples = {t: next(v for s in cohort.subjects if (v := s.first(t)) is not None) for t in request.targets}
    templates = load_templates(request.templates, examples)
    splits = _assign_splits(request, cohort)
    if note := head_note(cohort.root, [subject.scans[0] for subject in cohort.subjects]):
        cohort.notes.append(f"note: {note}")
    questions = Questions(request, templates, cohort)
    anchors = [subject for subject in cohort.subjects if subject.split == ANCHORS]
    counts: dict[str, Counter[str]] = {}
    if not request.dry_run:
        request.output.mkdir(parents=True, exist_ok=True)
    for folder, parts in _runs(request, splits).items():
        for name, sources in parts.items():
            members = [subject for subject in cohort.subjects if subject.split in sources]
            where = f"{folder}/{name}" if folder else name
            counts[where] = Counter()
            samples = questions.of_split(members, anchors, progress, f"writing {where}")
            lines = _lines(samples, counts[where])
            if request.dry_run:
                sum(1 for _ in lines)
            else:
                (request.output / folder).mkdir(exist_ok=True)
                write_atomic(request.output / folder / f"{name}.jsonl", partial(_write, lines=lines))
        if not request.dry_run:
            text = _settings_text(request, cohort, request.output / folder, list(parts))
            write_atomic(request.output / folder / "data.yaml", text)
    cohort.notes += [f"left out: {number} {reason}" for reason, number in questions.left_out.items()]
    report = _report(cohort, counts, request)
    for line in report:
        show(line)
    if request.dry_run:
        return
    if request.folds:
        write_atomic(request.output / "data.yaml", (request.output / "fold-1" / "data.yaml").read_bytes())
    rows = [[subject.id, subject.group, subject.split] for subject in cohort.subjects]
    write_atomic(request.output / "splits.tsv", _tsv(["participant_id", "group", "split"], rows))
    header = ["participant_id", "session_id", "target", "reason"]
    write_atomic(request.output / "left_out.tsv", _tsv(header, cohort.left_out))
    dumped = yaml.safe_dump(templates.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    write_atomic(request.output / "templates.yaml", dumped)
    write_atomic(request.output / "cohort.md", "# Cohort\n\n" + "\n".join(report) + "\n")
    if EXTERNAL in splits and "test" in splits:
        show(f"external test: data.test={request.output / EXTERNAL}.jsonl, in place of the split test")
    show(f"next: umbrella prepare {request.output / 'data.yaml'}")
    folds = " --folds" * bool(request.folds)
    show(f"      umbrella tune {request.output / 'data.yaml'} grid_96.yaml{folds}")


def _assign_splits(request: Request, cohort: Cohort) -> list[str]:
    """Set the split of each subject, and leave out the families of anchors. Returns the names of the splits."""
    if request.folds:
        shares = {f"fold-{i}": 1 / request.folds for i in range(1, request.folds + 1)}
    else:
        shares = {name: part / sum(request.split) for name, part in zip(SPLITS, request.split, strict=False) if part}
    members: dict[str, list[Subject]] = defaultdict(list)
    for subject in cohort.subjects:
        members[subject.group].append(subject)
    files = [file for file in (request.output / "splits.tsv", request.split_file) if file and file.exists()]
    in_files = {key: split for file in files for key, split in read_split_file(file).items()}
    where = " and ".join(map(str, files))
    redraw = f"remove {where}, or take another --output, to draw new splits" if files else "another --seed"
    names = {group: [subject.id for subject in subjects] for group, subjects in members.items()}
    known = known_splits(in_files, names, [*shares, ANCHORS, EXTERNAL], where, redraw)
    if files:
        cohort.notes.append(f"splits of {pluralise(len(known), 'group')} are those of {where}")
    held_out = _held_out(request, cohort)
    anchors = _choose_anchors(request, cohort, {key for key, split in in_files.items() if split == ANCHORS}, held_out)
    forced = dict.fromkeys(held_out, EXTERNAL) | {s.group: ANCHORS for s in cohort.subjects if s.id in anchors}
    for group, split in forced.items():
        if known.get(group, split) != split:
            raise UserError(f"{where}: has {names[group][0]} in {known[group]}, and it is now in {split}; {redraw}")
    variables = ("site", *request.targets)
    labels = {
        group: [{(name, cohort.stratum(name, subject.first(name))) for name in variables} for subject in subjects]
        for group, subjects in members.items()
    }
    assigned = assign_groups(labels, shares, known | forced, request.seed)
    kept = []
    for subject in cohort.subjects:
        subject.split = assigned[subject.group]
        if subject.split == ANCHORS and subject.id not in anchors:
            cohort.drop(subject.id, "", "", "in the family of an anchor")
        else:
            kept.append(subject)
    cohort.subjects = kept
    asked = [(s, target) for s in kept if s.split in shares for target in request.targets]
    check_classes(
        (
            (subject.split, target, "" if target in cohort.edges else str(value), subject.group)
            for subject, target in asked
            if (value := subject.first(target)) is not None
        ),
        shares,
        redraw,
    )
    return [*shares, *[EXTERNAL] * any(subject.split == EXTERNAL for subject in kept)]


def _held_out(request: Request, cohort: Cohort) -> set[str]:
    """Return the groups of the external split: those with a subject that has the value of ``--hold-out``."""
    found: set[str] = set()
    for name, value in request.hold_out.items():
        groups = {s.group for s in cohort.subjects if any(str(v.get(name)) == value for v in s.values.values())}
        if not groups:
            values = sorted({str(s.first(name)) for s in cohort.subjects})
            raise UserError(f"--hold-out {name}={value}: no subject has it; there are {', '.join(values[:20])}")
        found |= groups
    return found


def _choose_anchors(request: Request, cohort: Cohort, before: set[str], held_out: set[str]) -> set[str]:
    """Return the subjects that are references in all splits: those of the file of splits, the named, or drawn ones.

    Drawn anchors have no relatives in the cohort, and each label of the first target in turn.
    """
    ids = {subject_key(subject.id): subject.id for subject in cohort.subjects}
    wanted = request.anchors
    if wanted and not wanted.isdigit():
        named = {ids.get(subject_key(name), name) for name in wanted.split(",")}
        if unknown := named - set(ids.values()):
            raise UserError(f"--anchors {', '.join(sorted(unknown))}: no such subject with images and values")
        return named
    if before or not wanted:
        if wanted and len(before) != int(wanted):
            raise UserError(
                f"--anchors {wanted}: {len(before)} are drawn already; give that number, or draw new splits"
            )
        return {ids[key] for key in before if key in ids}
    sizes, target = Counter(subject.group for subject in cohort.subjects), request.targets[0]
    by_label: dict[Any, list[str]] = defaultdict(list)
    for subject in sorted(cohort.subjects, key=lambda s: hash_fraction(request.seed, "anchor", s.id)):
        value = subject.first(target)
        if value is not None and sizes[subject.group] == 1 and subject.group not in held_out:
            by_label[cohort.stratum(target, value)].append(subject.id)
    in_turn = [
        name for names in zip_longest(*(by_label[label] for label in sorted(by_label))) for name in names if name
    ]
    if len(in_turn) < int(wanted):
        raise UserError(f"--anchors {wanted}: only {len(in_turn)} subjects have no relatives in the cohort")
    return set(in_turn[: int(wanted)])


def _runs(request: Request, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return, for each folder below the output, file name to the splits that it holds.

    Fold i is the test split of the folder fold-i, and the next fold its validation split.
    """
    if not request.folds:
        return {"": {name: [name] for name in splits}}
    folds = [name for name in splits if name != EXTERNAL]
    runs = {}
    for i, fold in enumerate(folds):
        following = folds[(i + 1) % len(folds)]
        rest = [name for name in folds if name not in (fold, following)]
        runs[fold] = {"train": rest, "validation": [following], "test": [fold]}
        runs[fold] |= {name: [name] for name in splits if name == EXTERNAL}
    return runs


def _write(file: BinaryIO, lines: Iterable[bytes]) -> None:
    file.writelines(lines)


def _lines(samples: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[bytes]:
    for sample in samples:
        counts[sample["task_type"]] += 1
        yield json.dumps(sample, ensure_ascii=False).encode(errors="surrogateescape") + b"\n"


def _settings_text(request: Request, cohort: Cohort, folder: Path, names: Sequence[str]) -> str:
    """Return the settings file: the data, the modalities that occur, and the metric of the first target."""
    files = {name: str((folder / f"{name}.jsonl").absolute()) for name in names}
    data: dict[str, Any] = {"root": str(cohort.root)} | {name: files[name] for name in SPLITS if name in files}
    if "test" not in data and EXTERNAL in files:
        data["test"] = files[EXTERNAL]
    if request.group not in ("", FAMILY):
        data["group"] = request.group
    if other := {suffix: name for suffix, name in cohort.suffixes.items() if SUFFIXES.get(suffix) != name}:
        data["suffixes"] = other
    modalities = {}
    for suffix in {scan.suffix: None for subject in cohort.subjects for scan in subject.scans}:
        name = cohort.suffixes[suffix]
        default = DEFAULT_MODALITIES.get(name, DEFAULT_MODALITIES["sMRI"])
        if default.is_series != (suffix in SERIES):
            default = DEFAULT_MODALITIES["fMRI" if suffix in SERIES else "sMRI"]
        modalities[name] = default.model_dump(mode="json", include={"grid", "patch", "intensity"})
    classes = [target for target in request.targets if not cohort.variables[target].is_number]
    metric = f"eval/{classes[0]}/balanced_accuracy" if classes else "eval/loss"
    tune = {"metric": metric, "mode": "max" if classes else "min"}
    content = {"data": data, "modalities": modalities, "tune": tune}
    return (
        "# Written by umbrella make-conversations. Settings files and overrides after this one win.\n"
        + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    )


def _tsv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in (header, *rows))


def _report(cohort: Cohort, counts: Mapping[str, Counter[str]], request: Request) -> list[str]:
    """Return the lines of cohort.md: a table of splits, the numbers of conversations, and what was left out."""
    names = [name for name in dict.fromkeys(("sex", "age", *request.targets, "site")) if name in cohort.variables]
    shown = [f"{name}, mean ± SD" if cohort.variables[name].is_number else name for name in names]
    header = ["split", "subjects", "families", "scans", *shown]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for split in sorted({subject.split for subject in cohort.subjects}, key=_split_order):
        members = [subject for subject in cohort.subjects if subject.split == split]
        sizes = [len(members), len({s.group for s in members}), sum(len(s.scans) for s in members)]
        cells = [split, *map(str, sizes), *(_summary(cohort.variables[name], members) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for where, by_type in counts.items():
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(by_type.items()))
        lines.append(f"- {where}: {pluralise(by_type.total(), 'conversation')} ({kinds or 'none'})")
    lines += [f"- {note}" for note in cohort.notes]
    reasons: dict[str, list[str]] = defaultdict(list)
    for subject, session, target, reason in cohort.left_out:
        reasons[f"{target}, {reason}" if target else reason].append(f"{subject} {session}".strip())
    for reason, who in reasons.items():
        examples = ", ".join(who[:LISTED]) + ", ..." * (len(who) > LISTED)
        lines.append(f"- left out: {reason}: {len(who)} ({examples})")
    return lines


def _summary(variable: Variable, subjects: Sequence[Subject]) -> str:
    """Return mean and standard deviation, or how many subjects have each value."""
    values = [value for subject in subjects if (value := subject.first(variable.name)) is not None]
    if variable.is_number and values:
        return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
    return ", ".join(f"{number} {value}" for value, number in Counter(map(str, values)).most_common(LISTED))


def _split_order(split: str) -> tuple[int, str]:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS), split
