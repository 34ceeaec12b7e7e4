"""Splits of make_conversations.py: whole families, stable, balanced."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Done
from tests.unit.test_make_conversations import labels, read, subjects, table, touch
from umbrella.cohorts.assign_splits import assign_groups, known_splits

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
LABELS = st.frozensets(st.sampled_from([("sex", "m"), ("sex", "f"), ("site", "A"), ("site", "B")]))
COHORTS = st.dictionaries(st.integers(0, 99).map(str), st.tuples(st.sampled_from("abcdefghij"), LABELS), max_size=60)


def draw(cohort: dict[str, Any], known: dict[str, str], seed: int) -> dict[str, str]:
    """Subject to split. ``cohort``: subject to family and labels; ``known``: the splits of an earlier run."""
    members = defaultdict[str, list[str]](list)
    for name, (family, _) in cohort.items():
        members[family].append(name)
    kept = known_splits(known, members, SHARES, "splits.tsv", "")
    labels_of = {family: [cohort[name][1] for name in names] for family, names in members.items()}
    found = assign_groups(labels_of, SHARES, kept, seed)
    return {name: found[family] for name, (family, _) in cohort.items()}


@given(cohort=COHORTS, more=COHORTS, seed=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_no_family_is_in_two_splits_and_subjects_keep_theirs(cohort: Any, more: Any, seed: int) -> None:
    first = draw(cohort, {}, seed)
    assert first == draw(dict(reversed(cohort.items())), {}, seed)
    both = more | cohort
    later = draw(both, first, seed)
    assert {name: later[name] for name in cohort} == first
    assert later.keys() == both.keys()
    splits_of = defaultdict[str, set[str]](set)
    for name, split in later.items():
        splits_of[both[name][0]].add(split)
    assert all(len(found) == 1 for found in splits_of.values())
    assert set(later.values()) <= SHARES.keys()


@given(number=st.integers(40, 200), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_every_label_has_its_share_in_every_split(number: int, seed: int) -> None:
    groups = {f"g{i}": [{("sex", "mf"[i % 2]), ("site", "ABC"[i % 3])}] for i in range(number)}
    found = defaultdict[Any, Counter[str]](Counter)
    for group, split in assign_groups(groups, SHARES, {}, seed).items():
        for label in [*groups[group][0], "all"]:
            found[label][split] += 1
    for counts in found.values():
        assert all(abs(counts[split] - share * counts.total()) <= 2 for split, share in SHARES.items())


def test_new_families_go_where_the_share_is_furthest_below_its_target() -> None:
    known = {f"g{i}": "train" for i in range(20)}
    groups = {key: [set()] for key in [*known, "new1", "new2"]}
    later = assign_groups(groups, SHARES, known, 0)
    assert {later["new1"], later["new2"]} == {"validation", "test"}


@pytest.fixture
def ds(tmp_path: Path) -> Path:
    """36 subjects in 24 families at three sites."""
    folder = tmp_path / "ds"
    add(folder, 36)
    return folder


def add(folder: Path, number: int) -> None:
    names = subjects(number)
    touch(folder, *(f"{name}/anat/{name}_T1w.nii.gz" for name in names))
    rows = [(n, "MF"[i % 2], 20 + i, f"f{i // 4 if i < 16 else i}", "ABC"[i % 3]) for i, n in enumerate(names)]
    table(folder / "participants.tsv", "participant_id sex age family_id site", rows)


@pytest.fixture
def make(run: Callable[..., Done], tmp_path: Path, ds: Path) -> Callable[..., Done]:
    words = (str(ds), "--targets", "sex", "--output", f"{tmp_path}/out", "--tasks", "T1")
    return lambda *more: run("make_conversations.py", *words, *more)


def splits(folder: Path) -> dict[str, str]:
    lines = (folder / "splits.tsv").read_text().splitlines()[1:]
    return {line.split("\t")[0]: line.split("\t")[2] for line in lines}


def test_families_stay_together_and_new_subjects_do_not_move_the_others(make: Any, ds: Path, tmp_path: Path) -> None:
    assert make().status == 0
    before = splits(tmp_path / "out")
    assert all(len({before[f"sub-{i + j:02d}"] for j in range(4)}) == 1 for i in range(0, 16, 4))
    in_files = {s["metadata"]["subject_id"]: s["split"] for s in read(tmp_path / "out")}
    assert in_files == before
    add(ds, 60)
    assert make().status == 0
    after = splits(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) == 60


def test_a_family_that_a_file_puts_into_two_splits_is_refused(make: Any, tmp_path: Path) -> None:
    table(tmp_path / "own.tsv", "participant_id split", [("sub-00", "train"), ("sub-01", "val")])
    done = make("--split-file", f"{tmp_path}/own.tsv")
    assert done.status == 2
    assert "the group 'f0' has sub-00 in train and sub-01 in validation" in done.stderr


def test_a_file_of_splits_is_accepted(make: Any, tmp_path: Path) -> None:
    rows = [(name, "test" if i < 8 else "Training" if i < 28 else "dev") for i, name in enumerate(subjects(36))]
    table(tmp_path / "own.tsv", "participant_id split", rows)
    assert make("--split-file", f"{tmp_path}/own.tsv").status == 0
    found = splits(tmp_path / "out")
    assert [found[name] for name in ("sub-07", "sub-08", "sub-35")] == ["test", "train", "validation"]


def test_a_held_out_site_is_an_external_split(make: Any, tmp_path: Path) -> None:
    assert make("--hold-out", "site=C", "--split", "80/20", "--group", "participant_id").status == 0
    samples = read(tmp_path / "out")
    assert all((s["split"] == "external") == (s["metadata"]["site"] == "C") for s in samples)
    settings = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert settings["data"]["test"] == f"{tmp_path}/out/external.jsonl"


def test_the_value_to_hold_out_must_occur(make: Any) -> None:
    assert "no subject has it; there are A, B, C" in make("--hold-out", "site=D").stderr


def test_every_family_is_tested_in_one_fold(make: Any, tmp_path: Path) -> None:
    assert make("--folds", "4").status == 0
    tested = []
    for i in range(1, 5):
        folder = tmp_path / f"out/fold-{i}"
        of = {name: set(labels(read(folder, [name]), "sex")) for name in ("train", "validation", "test")}
        assert set().union(*of.values()) == set(subjects(36))
        assert sum(map(len, of.values())) == 36
        assert yaml.safe_load((folder / "data.yaml").read_text())["data"]["test"] == f"{folder}/test.jsonl"
        tested += of["test"]
    assert sorted(tested) == subjects(36)
    assert "has the splits fold-1" in make().stderr


def test_a_class_that_a_split_lacks_is_an_error_with_remedies(make: Any, ds: Path, tmp_path: Path) -> None:
    rows = [(name, ["rare", "M", "F"][min(i, 1 + i % 2)], i) for i, name in enumerate(subjects(36))]
    table(ds / "participants.tsv", "participant_id hand x", rows)
    done = make("--targets", "hand")
    assert done.status == 2
    assert "validation and test: no subject with hand 'rare', which 1 group in all has" in done.stderr
    assert "--values hand=rare:n/a" in done.stderr
    assert not (tmp_path / "out").exists()
    assert make("--targets", "hand", "--values", "hand=rare:n/a").status == 0


def test_another_group_is_named_in_the_settings(make: Any, ds: Path, tmp_path: Path) -> None:
    assert make("--group", "site").status == 2  # three groups cannot hold both sexes in every split at these shares
    rows = [(name, "MF"[i % 2], f"h{i // 2}") for i, name in enumerate(subjects(36))]
    table(ds / "participants.tsv", "participant_id sex household", rows)
    assert make("--group", "household").status == 0
    assert yaml.safe_load((tmp_path / "out/data.yaml").read_text())["data"]["group"] == "household"
    assert read(tmp_path / "out")[0]["metadata"]["household"].startswith("h")
