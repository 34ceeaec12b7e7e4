"""The data of a run: splits read and checked, filters, volumes decoded, bad samples refused or quarantined."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tokenizers import normalizers

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.conversations.formats import FILE_MISSING
from umbrella.conversations.reading import Problem
from umbrella.data.ingest import Splits, load_splits, open_store
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import RawSplits, phantom_folder_of, read_splits
from umbrella.data.tokenizer import byte_tokenizer

SAMPLES = {  # split to (task id, task type, subject, modalities)
    "train": [("a_sex", "T1", "a", ["sMRI"]), ("a_all", "T2", "a", ["sMRI", "dMRI"]), ("b_sex", "T1", "b", ["dMRI"])],
    "validation": [("c_sex", "T1", "c", ["sMRI"]), ("d_age", "T1", "d", ["sMRI"])],
}


SPLIT_NAMES = ("train", "validation", "test")
LABELS = {f"s{i}": "female" if i % 2 else "male" for i in range(20)}


def plain(things: Sequence, what: str) -> Iterable:
    return things


def write(folder: Path, split: str, samples: list[tuple[str, str, str, list[str]]]) -> None:
    lines = []
    for task, kind, subject, modalities in samples:
        items = [{"type": "image", "modality": m, "image_path": f"{subject}_{m}.nii"} for m in modalities]
        sample = {
            "task_id": task,
            "task_type": kind,
            "images": [{"path": item["image_path"], "modality": item["modality"]} for item in items],
            "conversations": [{"role": "user", "content": items}, {"role": "assistant", "content": "male."}],
            "metadata": {"subject_id": subject},
        }
        for item in items:
            draw = np.random.default_rng(list(item["image_path"].encode()))
            voxels = draw.normal(size=(5, 4, 4)).astype(np.float32)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / item["image_path"])
        lines.append(json.dumps(sample))
    (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, samples in SAMPLES.items():
        write(folder, split, samples)
    return folder


def settings_of(folder: Path, **data: Any) -> Settings:
    paths = {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    overrides = {f"data.{name}": value for name, value in (paths | data).items()}
    return load_settings(overrides={"resources.storage": str(folder.parent / "runs")} | overrides)


def tasks(splits: Splits) -> list[list[str]]:
    return [[c.task_id for c in split] for split in (splits.train, splits.validation)]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [["a_sex", "a_all", "b_sex"], ["c_sex", "d_age"]]),
        ({"modality": "sMRI"}, [["a_sex"], ["c_sex", "d_age"]]),
        ({"task_filter": "T1"}, [["a_sex", "b_sex"], ["c_sex", "d_age"]]),
        ({"task_filter": "sex", "modality": "sMRI"}, [["a_sex"], ["c_sex"]]),
        ({"task_filter": "^[ad]_(sex|age)$"}, [["a_sex"], ["d_age"]]),
    ],
)
def test_filters_keep_a_modality_a_task_type_or_task_ids(folder: Path, filters: dict, kept: list) -> None:
    settings = settings_of(folder, **filters)
    assert tasks(load_splits(settings, plain)) == kept
    assert tasks(load_splits(settings, plain, dry_run=True)) == kept


def test_a_task_type_is_not_also_looked_for_in_task_ids(folder: Path) -> None:
    write(folder, "train", [*SAMPLES["train"], ("b_T1w_all", "T2", "b", ["sMRI", "dMRI"])])
    assert tasks(load_splits(settings_of(folder, task_filter="T1"), plain))[0] == ["a_sex", "b_sex"]


def test_a_filter_that_is_no_pattern_names_the_setting(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.task_filter='sex\(': .*not a regular expression: missing \)"):
        settings_of(folder, task_filter="sex(")


def test_a_split_that_filters_leave_empty_is_named_with_the_filters(folder: Path) -> None:
    message = r"data\.validation: none of its 2 conversations is left after data\.modality='dMRI'"
    with pytest.raises(UserError, match=message):
        load_splits(settings_of(folder, modality="dMRI"), plain)


def test_several_files_are_one_split_and_moved_volumes_are_found_by_the_path_map(folder: Path) -> None:
    text = (folder / "train.jsonl").read_text(encoding="utf-8").replace('"a_sMRI.nii', '"/old/disk/a_sMRI.nii')
    first, *rest = text.split("\n")
    (folder / "one.jsonl").write_text(first, encoding="utf-8")
    (folder / "two.jsonl").write_text("\n".join(rest), encoding="utf-8")
    files = [str(folder / "one.jsonl"), str(folder / "tw*.jsonl")]
    splits = load_splits(settings_of(folder, train=files, path_map={"/old/disk": str(folder)}), plain)
    assert tasks(splits)[0] == ["a_sex", "a_all", "b_sex"]
    assert splits.train[0].volumes[0].image_path == str(folder / "a_sMRI.nii")


def test_held_out_data_without_training_data_do_not_bring_the_phantom_cohort(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train is not set, and data\.validation or data\.test is"):
        load_splits(settings_of(folder, train=""), plain)


def test_training_data_without_validation_data_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.validation is not set"):
        load_splits(settings_of(folder, validation=""), plain)


def test_a_held_out_subject_must_be_nowhere_in_training_also_not_as_a_reference(folder: Path) -> None:
    write(folder, "validation", [("a_age", "T1", "a", ["sMRI"]), ("c_sex", "T1", "c", ["sMRI"])])
    with pytest.raises(
        UserError, match=r"validation\.jsonl:1: subject_id: a is also in data\.train, at .*train\.jsonl:1; split"
    ):
        load_splits(settings_of(folder), plain)
    write(folder, "validation", SAMPLES["validation"])
    lines = (folder / "train.jsonl").read_text(encoding="utf-8")
    reference = lines.replace('"subject_id": "b"', '"subject_id": "b", "reference_id": "d"')
    (folder / "train.jsonl").write_text(reference, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"validation\.jsonl:2: subject_id: d is also in data\.train, at .*train\.jsonl:3; split"
    ):
        load_splits(settings_of(folder), plain)


def shown(task: str, *paths: str, metadata: dict | None = None, **keys: Any) -> dict[str, Any]:
    """A sample that shows one volume a turn, and asks about the last."""
    turns = [{"role": "user", "content": [{"type": "image", "modality": "sMRI", "image_path": p}]} for p in paths]
    return {
        "task_id": task,
        "task_type": "T3" if len(paths) > 1 else "T1",
        "images": [{"path": path, "modality": "sMRI"} for path in paths],
        "conversations": [t for turn in turns for t in (turn, {"role": "assistant", "content": "male."})],
        "metadata": metadata or {},
        **keys,
    }


def write_shown(folder: Path, **splits: list[dict[str, Any]]) -> None:
    """Write splits and their volumes: files whose names are the same up to an underscore have the same content."""
    for split, samples in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
        for path in {image["path"] for sample in samples for image in sample["images"]}:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            draw = np.random.default_rng(list(Path(path).stem.split("_")[0].encode()))
            nib.save(nib.Nifti1Image(draw.normal(size=(5, 4, 4)).astype(np.float32), np.eye(4)), folder / path)


@pytest.mark.parametrize(
    ("train", "validation", "line"),
    [
        pytest.param(
            [shown("a", "sub-1_T1w.nii"), shown("b", "sub-2_T1w.nii")],
            [shown("c", "sub-1_T1w.nii"), shown("d", "sub-2_T1w.nii")],
            r"validation\.jsonl:1: subject_id: sub-1 is also in data\.train, at .*:1 \(and 1 more subject\); split by",
            id="the same file",
        ),
        pytest.param(
            [shown("a", "sub-1/ses-1/x.nii")],
            [shown("c", "sub-1/ses-2/y.nii")],
            "subject_id: sub-1 is also in data\\.train",
            id="another session",
        ),
        pytest.param(
            [shown("a", "x.nii")],
            [shown("c", "x_2.nii")],
            "subject_id: volume-[0-9a-f]{16} is also",
            id="a nameless copy",
        ),
        pytest.param(
            [shown("a", "x.nii", metadata={"subject_id": "p"})],
            [shown("c", "x_2.nii", metadata={"subject_id": "q"})],
            r"validation\.jsonl:1: image_path: .*x.*\.nii is also in data\.train, at .*train\.jsonl:1;",
            id="a copy under another subject",
        ),
        pytest.param(
            [shown("a", "x.nii", patient_id="7 ")],
            [shown("c", "y.nii", metadata={"subject_id": 7.0})],
            "subject_id: 7 is also",
            id="a number and a text",
        ),
        pytest.param(
            [shown("a", "sub-1.nii", family_id=3)],
            [shown("c", "sub-2.nii", metadata={"family_id": "3"})],
            "family_id: 3 is also",
            id="a family",
        ),
        pytest.param(
            [shown("a", "sub-1.nii")],
            [shown("c", "sub-1.nii", "sub-2.nii")],
            r"train\.jsonl:1: subject_id: sub-1 is also in data\.validation",
            id="a reference that training asks about",
        ),
    ],
)
def test_what_one_split_asks_about_is_in_no_other_split(
    tmp_path: Path, train: list, validation: list, line: str
) -> None:
    write_shown(tmp_path, train=train, validation=validation)
    with pytest.raises(UserError, match=line) as error:
        load_splits(settings_of(tmp_path), plain)
    assert len(str(error.value).splitlines()) == 1


def test_a_reference_may_be_in_several_splits_and_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stated = {"subject_id": "b", "reference_id": "r"}
    write_shown(
        tmp_path,
        train=[shown("a", "sub-r.nii", "sub-a.nii"), shown("b", "sub-r.nii", "b.nii", metadata=stated)],
        validation=[shown("c", "sub-r_2.nii", "sub-C.nii"), shown("d", "y.nii")],
        test=[shown("e", "sub-c.nii")],
    )
    settings = settings_of(tmp_path, test=str(tmp_path / "test.jsonl"))
    splits = load_splits(settings.with_values({"evaluate.at_end": True}), plain)
    assert [c.subject_id for c in splits.train] == ["sub-a", "b"]
    assert splits.validation[0].subjects == {"sub-r", "sub-C"}
    assert [v.image_path for v in splits.train[1].subject_volumes] == [str(tmp_path / "b.nii")]
    said = capsys.readouterr().err
    for note in (
        "1 volume in several splits, in each as a reference only",
        "3 samples without a subject: sub-... in the path",
        "1 sample without a subject: the content of the volume",
        "subjects sub-C and sub-c differ by case only",
    ):
        assert f"note: {note}" in said


def test_a_file_of_equal_size_and_other_content_is_another_scan(tmp_path: Path) -> None:
    write_shown(tmp_path, train=[shown("a", "x.nii")], validation=[shown("c", "y.nii")])
    (one, two) = (tmp_path / f"{name}.nii" for name in "xy")
    content = bytearray(one.read_bytes())
    content[-1] ^= 1  # the middle, which is compared first, is the same
    two.write_bytes(content)
    assert len(load_splits(settings_of(tmp_path), plain).train) == 1


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(folder: Path) -> None:
    def fingerprint(of: Path) -> str:
        return load_splits(settings_of(of), plain).fingerprint

    first = fingerprint(folder)
    moved = folder.parent / "elsewhere"
    shutil.copytree(folder, moved)
    assert fingerprint(moved) == first
    seen = {first}

    def change(file: str, old: str, new: str) -> None:
        path = moved / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        seen.add(fingerprint(moved))

    change("train.jsonl", "male.", "female.")
    change("validation.jsonl", "c_sex", "c_sex2")
    nib.save(nib.Nifti1Image(np.eye(4, dtype=np.float32)[None].repeat(9, 0), np.eye(4)), moved / "d_sMRI.nii")
    seen.add(fingerprint(moved))
    splits = load_splits(settings_of(moved), plain)
    seen.add(Splits([*splits.train, splits.validation[0]], splits.validation[1:]).fingerprint)
    assert len(seen) == 5


def spoil(folder: Path) -> None:
    """Five bad samples: two about a damaged volume, one about an empty one, one cut short, one with two faults."""
    write(folder, "train", [*SAMPLES["train"], ("e_sex", "T1", "e", ["sMRI"]), ("f_sex", "T1", "f", ["sMRI"])])
    (folder / "a_sMRI.nii").write_bytes(b"no image")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), folder / "d_sMRI.nii")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")
    lines[3] = lines[3][:40]
    lines[4] = json.dumps(json.loads(lines[4]) | {"conversations": [], "metadata": 3})
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_run_with_bad_samples_ends_with_every_reason_conversations_before_volumes(folder: Path) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load_splits(settings_of(folder), plain)
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == [
        f"{folder}/train.jsonl:4",
        f"{folder}/train.jsonl:5",
        f"{folder}/train.jsonl:5",
    ]
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:3]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_splits(settings_of(folder), plain)
    damaged, empty = str(caught.value).split("\n")
    assert damaged.startswith(f"{folder}/train.jsonl:1: image_path: {folder}/a_sMRI.nii: cannot be read as an image: ")
    assert damaged.endswith("; copy or convert the file anew (and 1 more conversation)")
    assert empty.startswith(f"{folder}/validation.jsonl:2: image_path: {folder}/d_sMRI.nii: every voxel is 0; ")
    assert len(list(open_store(settings_of(folder)).folder.rglob("*.npy"))) == 3  # the good ones are kept


def said(name: str, label: Any, answer: str, target: str = "sex", **others: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{target}?"}, {"role": "assistant", "content": answer}]
    metadata = {"subject_id": name, "subject_label": label, "target": target}
    return {"id": name, "messages": turns, "metadata": metadata, **others}


def read(folder: Path, names: Sequence[str] = SPLIT_NAMES, **splits: list[dict[str, Any]]) -> RawSplits:
    """What ``read_splits`` gives of these samples."""
    for name, samples in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    return read_splits(settings_of(folder, test=str(folder / "test.jsonl")), plain, names)


def comparison(subject: str, reference: str, answer: str) -> dict[str, Any]:
    """A sample as upstream's files have it: the task_id names the subject, and not the reference."""
    items = [{"type": "image", "modality": "sMRI", "image_path": f"{name}_sMRI.nii"} for name in (reference, subject)]
    turns = [
        ("user", [{"type": "text", "text": "For reference."}, items[0]]),
        ("assistant", [{"type": "text", "text": "I have looked at the reference scan."}]),
        ("user", [{"type": "text", "text": "Compare. Sex?"}, items[1]]),
        ("assistant", [{"type": "text", "text": answer}]),
    ]
    return {
        "task_id": f"{subject}_same_sex_comparison",
        "task_type": "T3",
        "subject_ids": [reference, subject],
        "images": [{"path": item["image_path"], "modality": "sMRI"} for item in items],
        "conversations": [{"role": role, "content": content} for role, content in turns],
        "metadata": {
            "subject_id": subject,
            "subject_label": LABELS[subject],
            "reference_id": reference,
            "reference_label": LABELS[reference],
            "task": "sex_classification_via_comparison",
        },
    }


def test_upstreams_comparisons_are_read_with_their_repeated_ids_and_empty_last_answers(folder: Path) -> None:
    for name in LABELS:
        voxels = np.random.default_rng(int(name[1:])).normal(size=(5, 4, 4)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"{name}_sMRI.nii")
    train = [comparison(s, f"s{i}", f"{LABELS[s]}.") for s in ("s0", "s1") for i in range(2, 7)]
    held_out = {"validation": ("s10", "s11"), "test": ("s12", "s13")}
    blank = {name: [comparison(s, f"s{i}", "") for s in held_out[name] for i in (14, 15)] for name in held_out}
    raw = read(folder, train=train, **blank)
    assert raw.problems == []
    assert [c.task_id for c in raw.splits["train"]][:6] == [
        *(f"s0_same_sex_comparison{number}" for number in ("", "#2", "#3", "#4", "#5")),
        "s1_same_sex_comparison",
    ]
    for name in held_out:
        assert [c.answer for c in raw.splits[name]] == ["male."] * 2 + ["female."] * 2
    numbered = "the task_id is used before with other content; such samples are numbered: id, id#2, ..."
    filled = "4 samples with an empty last answer; each gets the usual answer of its label in data.train"
    assert raw.notices == [
        f"{folder}/train.jsonl:2: {numbered} (8 samples)",
        *(f"{folder}/{name}.jsonl:2: {numbered} (2 samples)" for name in held_out),
        *(f"data.{name}: {filled}" for name in held_out),
        "2 volumes in several splits, in each as a reference only, which is allowed",
    ]
    alone = read(folder, ("test",))
    assert alone.splits["test"] == raw.splits["test"]
    settings = settings_of(folder).with_values({"modalities.sMRI": {"grid": [4, 4, 4], "patch": [2, 2, 2]}})
    splits = load_splits(settings, plain)
    assert [len(split) for split in (splits.train, splits.validation)] == [10, 4]


def test_an_empty_last_answer_is_a_problem_in_training_and_where_training_has_no_answer_of_its_label(
    folder: Path,
) -> None:
    train = [said("a", "male", "male."), said("b", "female", "")]
    validation = [said("c", "male", ""), said("d", "female", ""), said("e", 63, "", "age"), said("f", "male", "x")]
    raw = read(folder, SPLIT_NAMES[:2], train=train, validation=validation)
    assert [c.answer for c in raw.splits["validation"]] == ["male.", "x"]
    assert [str(problem).removeprefix(f"{folder}/").split(";")[0] for problem in raw.problems] == [
        "train.jsonl:2: messages.1.content: is empty",
        "validation.jsonl:2: conversations: the last answer is empty, and data.train answers no sample of 'sex' with"
        " the label 'female'",
        "validation.jsonl:3: conversations: the last answer is empty, and data.train answers no sample of 'age' with"
        " the label 63",
    ]


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ([("male", "male."), ("male", "male."), ("male", "female."), ("female", "female."), ("female", "female.")], 1),
        # Several wordings, one within the other, in any number.
        ([("male", "male"), ("male", "a male"), ("female", "a female"), ("female", "female"), ("female", "woman")], 0),
        # A text that a label has more often than the one whose usual answer it is.
        ([("male", "yes"), ("male", "yes"), ("male", "no"), ("male", "no"), ("female", "no")], 0),
        ([("male", "Yes."), ("female", "Yes.")], 0),  # equal answers are found elsewhere
        ([(1, "female."), (0, "male."), (1, "male."), (0, "male.")], 0),
    ],
)
def test_a_label_that_its_own_answer_contradicts_is_a_problem(folder: Path, train: list, found: int) -> None:
    raw = read(folder, ("train",), train=[said(f"s{i}", *sample) for i, sample in enumerate(train)])
    assert [str(p).removeprefix(f"{folder}/") for p in raw.problems] == [
        "train.jsonl:3: metadata.subject_label: the label is 'male', but the answer 'female.' is that of the label"
        " 'female'; correct one of them"
    ] * found
    assert len(raw.splits["train"]) == len(train) - found


@pytest.mark.parametrize(
    ("samples", "notes"),
    [
        (
            [("61", "61 years."), ("62.5", "62.5 years."), (63, "63 years.")],
            [
                "2 labels of 'age' are numbers written as text, first '61';"
                " for a regression write them as numbers, without quotes"
            ],
        ),
        (
            [(0, "female."), (1, "male."), (1, "male.")],
            [
                "3 labels of 'age' are the numbers 0, 1, so it is a regression;"
                ' for classes write their names as text, as in "male"'
            ],
        ),
        (
            [(1, "low"), (3.0, "high"), (2, "middle")],
            [
                "3 labels of 'age' are the numbers 1, 2, 3, so it is a regression;"
                ' for classes write their names as text, as in "male"'
            ],
        ),
        ([(61, "61"), (62, "62")], []),
        ([(0.5, "little"), (1.5, "much")], []),
        ([("0", "female."), ("1", "male.")], []),
        ([("T1", "first"), ("2", "second")], []),
    ],
)
def test_labels_that_look_like_numbers_or_like_classes_are_noted(folder: Path, samples: list, notes: list) -> None:
    train = [said(f"s{i}", label, answer, "age") for i, (label, answer) in enumerate(samples)]
    raw = read(folder, ("train",), train=train)
    assert (raw.problems, raw.notices) == ([], notes)


def test_problems_of_one_kind_are_one_line_with_their_number_common_folder_and_first_names() -> None:
    def lines(field: str, *texts: str) -> list[str]:
        return RawSplits(
            problems=[Problem(f"c.jsonl:{i}", field, text) for i, text in enumerate(texts, 1)]
        ).problem_lines()

    gone = [f"/old/disk/scans/{name}.nii" for name in ("a", "b/x", "c", "d", "a")]
    assert lines("image_path", *(f"{path}{FILE_MISSING}" for path in [*gone, "D:\\x\\a.nii", "D:/x/b.nii"])) == [
        "c.jsonl:1: image_path: 4 files below /old/disk/scans do not exist, first a.nii, b/x.nii, c.nii;"
        " data.path_map={/old/disk/scans: /your/folder}, or data.root for relative paths",
        "c.jsonl:6: image_path: 2 files below D:/x do not exist, first a.nii, b.nii;"
        " data.path_map={D:/x: /your/folder}, or data.root for relative paths",
    ]
    assert lines("image_path", *[f"{gone[0]}{FILE_MISSING}"] * 2) == [
        f"c.jsonl:1: image_path: {gone[0]}{FILE_MISSING} (and 1 more conversation)"
    ]
    assert lines("image_path", *(f"{path}: has 5 axes (1, 2), neither; correct it" for path in gone)) == [
        f"c.jsonl:1: image_path: {gone[0]}: has 5 axes (1, 2), neither; correct it"
        " (and 4 more conversations below /old/disk/scans, next b/x.nii, c.nii)"
    ]
    assert lines("conversations.3.role", "'a/b' is not known", "'a/c' is not known", "# is not known") == [
        "c.jsonl:1: conversations.3.role: 'a/b' is not known (and 2 more conversations)"
    ]
    twice = [Problem("c.jsonl:1", f"conversations.{i}.role", f"'{role}' is not known") for i, role in enumerate("ab")]
    assert RawSplits(problems=twice).problem_lines() == [
        "c.jsonl:1: conversations.0.role: 'a' is not known (and 1 more there, next 'b')"
    ]
    assert lines("conversations", "becomes 529 tokens", "becomes 530 tokens", "is empty") == [
        "c.jsonl:1: conversations: becomes 529 tokens (and 1 more conversation, next 530)",
        "c.jsonl:3: conversations: is empty",
    ]


def test_quarantine_lists_every_bad_sample_with_its_reasons_and_the_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    spoil(folder)
    splits = load_splits(settings_of(folder, on_bad="quarantine", max_bad_fraction=0.9), plain)
    assert tasks(splits) == [["b_sex"], ["c_sex"]]
    assert [len(splits.lengths[name]) for name in ("train", "validation")] == [1, 1]
    assert splits.quarantined == 5
    entries = [json.loads(line) for line in splits.quarantine.read_text(encoding="utf-8").splitlines()]
    train, validation = f"{folder}/train.jsonl", f"{folder}/validation.jsonl"
    assert [e["where"] for e in entries] == [f"{train}:4", f"{train}:5", f"{train}:1", f"{train}:2", f"{validation}:2"]
    assert [len(e["reasons"]) for e in entries] == [1, 2, 1, 1, 1]
    assert "cannot be read as an image" in entries[2]["reasons"][0]
    assert [isinstance(e["sample"], str) or e["sample"]["task_id"] for e in entries] == [
        True, "f_sex", "a_sex", "a_all", "d_age",
    ]  # fmt: skip
    assert f"note: 5 samples cannot be used, see {splits.quarantine}" in capsys.readouterr().err


def test_more_bad_samples_than_allowed_end_the_run_with_their_number(folder: Path) -> None:
    spoil(folder)
    with pytest.raises(
        UserError,
        match=r"\n5 of 7 samples cannot be used, more than data\.max_bad_fraction=0\.5; repair them, or raise that$",
    ):
        load_splits(settings_of(folder, on_bad="quarantine", max_bad_fraction=0.5), plain)


def test_a_file_that_is_in_doubt_as_a_whole_is_not_quarantined(folder: Path) -> None:
    text = "[" + ",\n".join((folder / "train.jsonl").read_text(encoding="utf-8").split("\n"))
    (folder / "train.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.json: not JSON: the list is not closed"):
        load_splits(settings_of(folder, train=str(folder / "train.json"), on_bad="quarantine"), plain)


def test_a_conversation_with_too_many_tokens_is_found_before_the_start(folder: Path) -> None:
    message = r"train\.jsonl:2: conversations: becomes 82 tokens, more than data\.max_tokens=80; raise that"
    with pytest.raises(UserError, match=message):
        load_splits(settings_of(folder, max_tokens=80), plain)


def silence(folder: Path, split: str, *lines: int) -> None:
    """Take the answers' words away. What is left has no token for a tokenizer that drops what nobody can see."""
    samples = (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    for line in lines:
        samples[line - 1] = samples[line - 1].replace("male.", "\u200b")
    (folder / f"{split}.jsonl").write_text("\n".join(samples), encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text("{}", encoding="utf-8")


def test_a_training_sample_that_the_mask_leaves_without_a_target_is_an_error_or_a_counted_drop(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    silence(folder, "validation", 1)  # scored by the answer's end too, whatever the mask
    silence(folder, "train", 1, 3)

    def loaded(end_of_turn: bool, **data: Any) -> Splits:
        values = {"model.checkpoint": str(folder / "tokenizer"), "mask.end_of_turn": end_of_turn}
        return load_splits(settings_of(folder, **data).with_values(values), plain)

    assert tasks(loaded(True)) == [["a_sex", "a_all", "b_sex"], ["c_sex", "d_age"]]
    with pytest.raises(UserError) as caught:
        loaded(False)
    policy = "supervise=assistant, end_of_turn=False, turn_header=False, normalize=token"
    assert str(caught.value) == (
        f"{folder}/train.jsonl:1: conversations: the mask policy ({policy}) supervises none of its tokens; choose"
        " another mask, correct the loss flags of its turns, or leave it out with data.on_bad=quarantine"
        " (and 1 more conversation)"
    )
    splits = loaded(False, on_bad="quarantine", max_bad_fraction=0.5)
    assert tasks(splits) == [["a_all"], ["c_sex", "d_age"]]
    assert [len(splits.lengths[name]) for name in ("train", "validation")] == [1, 2]
    assert splits.quarantined == 2
    assert "note: 2 samples cannot be used" in capsys.readouterr().err


def test_a_sample_without_a_target_under_any_mask_of_a_sweep_is_found(folder: Path) -> None:
    silence(folder, "train", 2)
    settings = settings_of(folder).with_values({"model.checkpoint": str(folder / "tokenizer")})
    masks = [MaskPolicy(), MaskPolicy(normalize="turn"), MaskPolicy(turn_header=True, end_of_turn=False)]
    assert tasks(load_splits(settings, plain, masks))[0] == ["a_sex", "a_all", "b_sex"]
    blind = [MaskPolicy(end_of_turn=False), MaskPolicy(end_of_turn=False, normalize="turn")]
    with pytest.raises(
        UserError, match=r"train\.jsonl:2: conversations: the mask policy .*end_of_turn=False"
    ) as caught:
        load_splits(settings, plain, masks + blind)
    assert len(str(caught.value).splitlines()) == 1  # how much a target weighs is no reason of its own


def test_every_grid_of_a_sweep_is_in_the_store_before_the_start_and_no_sample_is_too_long_for_one(folder: Path) -> None:
    def shaped(grid: int, patch: int) -> Settings:
        names = [f"modalities.{name}" for name in ("sMRI", "dMRI")]
        return settings_of(folder).with_values({name: {"grid": [grid] * 3, "patch": [patch] * 3} for name in names})

    shapes = [shaped(4, 2), shaped(6, 2), shaped(6, 3)]
    splits = load_splits(settings_of(folder), plain, shapes=shapes)
    arrays = sorted(np.load(file).shape for file in open_store(settings_of(folder)).folder.rglob("*.npy"))
    assert arrays == [(4, 4, 4)] * 5 + [(6, 6, 6)] * 5  # five files; the settings' own 24 is no trial's, and not made
    alone = load_splits(settings_of(folder).with_values(shapes[0].flat()), plain)
    assert (splits.lengths["train"] == alone.lengths["train"]).all()
    with pytest.raises(UserError, match="max_tokens"):  # 1000 tokens a volume
        load_splits(settings_of(folder), plain, shapes=[shaped(4, 2), shaped(60, 3)])


def test_volumes_are_decoded_by_several_processes_with_the_same_outcome(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from umbrella.data import ingest

    monkeypatch.setattr(ingest, "MIN_PARALLEL_BYTES", 0)
    (folder / "a_sMRI.nii").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a_sMRI\.nii: cannot be read as an image.* \(and 1 more conversation\)$"):
        load_splits(settings_of(folder, processes=2), plain)
    assert len(list(open_store(settings_of(folder)).folder.rglob("*.npy"))) == 4


def test_without_data_a_phantom_cohort_is_made_once_and_counted_before(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    base = {"resources.storage": str(tmp_path), "cohort.spacing": 10.0, "cohort.functional_subjects": 2}
    made: list[str] = []

    def watch(things: Sequence, what: str) -> Iterable:
        made.append(what)
        return things

    filters: list[dict] = [{}, {"data.task_filter": "T3"}, {"data.modality": "sMRI"}, {"data.task_filter": "age"}]
    every = [small_settings(base | others) for others in filters]
    before = [tasks(load_splits(settings, plain, dry_run=True)) for settings in every]
    assert list(tmp_path.iterdir()) == []
    for settings, drawn in zip(every, before, strict=True):
        assert drawn == tasks(load_splits(settings, watch)) == tasks(load_splits(settings, plain, dry_run=True))
    assert made.count("making the phantom cohort") == 1
    assert {path.name for path in tmp_path.iterdir()} == {phantom_folder_of(every[0]).name, "volumes"}

    with pytest.raises(UserError, match=r"data\.train: none of its"):
        load_splits(small_settings(base | {"cohort.seed": 1, "data.task_filter": "nothing"}), plain, dry_run=True)
