"""Assignment of groups of subjects to splits: whole groups, in proportion, balanced over labels, stable."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbrella.base import UserError, format_value, pluralise
from umbrella.cohorts.tables import COLUMNS, read_rows, subject_key

ANCHORS, EXTERNAL = "anchors", "external"
SPELLINGS = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train", "testing": "test"}


def hash_fraction(*parts: object) -> float:
    """Return a number from 0 to 1 that depends on the parts only."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:7]) / 2**56


def assign_groups(
    groups: Mapping[str, Sequence[Collection[tuple[str, Any]]]],
    shares: Mapping[str, float],
    known: Mapping[str, str],
    seed: int,
) -> dict[str, str]:
    """Assign each group to a split.

    Groups that are known keep their split. Each new one goes where the shares of its subjects' labels, and of subjects
    in all, are furthest below their targets. Groups with the rarest labels come first.

    Args:
        groups: group to the labels of each of its subjects, such as {("sex", "male"), ("site", "A")}.
        shares: split to its share; they sum to 1.
        known: group to split; other splits than those of ``shares`` are allowed, and not counted.
        seed: of the order of groups with equally rare labels.
    """
    counts = {split: Counter[Any]() for split in shares}
    frequency = Counter(label for subjects in groups.values() for labels in subjects for label in labels)
    sizes = {group: Counter([label for labels in s for label in [*labels, None]]) for group, s in groups.items()}
    totals: Counter[Any] = Counter()
    assigned = {group: known[group] for group in groups if group in known}
    for group, split in assigned.items():
        if split in shares:
            counts[split] += sizes[group]
            totals += sizes[group]

    def rarity(group: str) -> tuple[int, float]:
        return min((frequency[label] for label in sizes[group] if label), default=0), hash_fraction(seed, group)

    for group in sorted(groups.keys() - assigned.keys(), key=rarity):
        size = sizes[group]
        totals.update(size)

        def gap(split: str, size: Counter[Any] = size) -> float:
            return sum(shares[split] * totals[label] - counts[split][label] for label in size)

        best = max(shares, key=gap)
        counts[best].update(size)
        assigned[group] = best
    return assigned


def read_split_file(file: Path) -> dict[str, str]:
    """Read a table of subjects and splits: subject key to split.

    Raises:
        UserError: a column is missing, or a subject is in two splits.
    """
    found: dict[str, str] = {}
    for row in list(read_rows(file))[1:]:
        subject = next((name for name in COLUMNS["participant_id"] if name in row), None)
        if subject is None or "split" not in row:
            raise UserError(f"{file}: needs the columns participant_id and split; it has {', '.join(row)}")
        key, split = subject_key(row[subject]), SPELLINGS.get(row["split"].casefold(), row["split"].casefold())
        if found.setdefault(key, split) != split:
            raise UserError(f"{file}: {row[subject]} is in {found[key]} and in {split}; keep one of the lines")
    return found


def known_splits(
    of_subject: Mapping[str, str], members: Mapping[str, Sequence[str]], splits: Collection[str], file: str, redraw: str
) -> dict[str, str]:
    """Return the split of each group that has a subject with a known split.

    Args:
        of_subject: subject key to split.
        members: group to its subjects.
        splits: splits of this run.
        file, redraw: where the splits stand, and what the user can do to draw new ones, for messages.

    Raises:
        UserError: there are other splits than those of this run, or one group is in two splits.
    """
    if others := sorted(set(of_subject.values()) - set(splits)):
        raise UserError(f"{file}: has the splits {', '.join(others)}, this run has {', '.join(splits)}; {redraw}")
    known = {}
    for group, subjects in members.items():
        found = {of_subject[key]: name for name in subjects if (key := subject_key(name)) in of_subject}
        if len(found) > 1:
            where = " and ".join(f"{name} in {split}" for split, name in sorted(found.items()))
            raise UserError(f"{file}: the group {format_value(group)} has {where}; one group is in one split; {redraw}")
        if found:
            known[group] = next(iter(found))
    return known


def check_classes(labels: Iterable[tuple[str, str, str, str]], splits: Iterable[str], redraw: str) -> None:
    """Check that each split has a subject, and each class of each target.

    Args:
        labels: (split, target, class or "", group) of each subject; numbers have the class "".

    Raises:
        UserError: with one line for each target and class, and what would help.
    """
    present: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for split, target, label, group in labels:
        present[target, label][split].add(group)
    problems = []
    for (target, label), groups in sorted(present.items()):
        lacking = [split for split in splits if split not in groups]
        if not lacking:
            continue
        number = len(set().union(*groups.values()))
        what = f"{target} {format_value(label)}" if label else f"a value of {target}"
        problems.append(
            f"{' and '.join(lacking)}: no subject with {what}, which {pluralise(number, 'group')} in all has; take a"
            f" larger share (--split) or fewer folds"
            + (f", join the class with another (--values {target}=CODE:{label},...)" if label else "")
            + (f", leave it out (--values {target}={label}:n/a)" if label and number < 10 else "")
            + f", or {redraw}"
        )
    if problems:
        raise UserError("\n".join(problems))
