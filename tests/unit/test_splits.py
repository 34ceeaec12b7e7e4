"""The data of a run: splits are read, filtered, compared and decoded; bad samples are refused or quarantined."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import joblib
import nibabel as nib
import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.conversations.formats import FILE_MISSING
from umbrella.conversations.reading import Problem
from umbrella.data.ingest import load_splits
from umbrella.data.rendering import load_renderer
from umbrella.data.splits import Splits, phantom_folder_of, read_splits
from umbrella.volumes import store as store_module
from umbrella.volumes.store import open_store

SPLIT_NAMES = ("train", "validation", "test")


def plain(things: Sequence, what: str) -> Iterable:
    return things


def sample(
    task: str, *turns: str | tuple[str, ...], kind: str = "T1", subject: str = "", **keys: Any
) -> dict[str, Any]:
    """A sample that shows one volume, or several, in each turn: ``a_dMRI.nii`` is a dMRI volume, ``a.nii`` sMRI."""
    shown = [(turn,) if isinstance(turn, str) else turn for turn in turns]
    items = [
        [{"type": "image", "modality": "dMRI" if "dMRI" in p else "sMRI", "image_path": p} for p in paths]
        for paths in shown
    ]
    return {
        "task_id": task,
        "task_type": kind,
        "images": [{"path": item["image_path"], "modality": item["modality"]} for turn in items for item in turn],
        "conversations": [
            turn
            for content in items
            for turn in ({"role": "user", "content": content}, {"role": "assistant", "content": "male."})
        ],
        "metadata": {"subject_id": subject} if subject else {},
        **keys,
    }


def labelled(name: str, label: Any, answer: str, target: str = "sex") -> dict[str, Any]:
    """A sample without volumes."""
    turns = [{"role": "user", "content": f"{target}?"}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns, "metadata": {"subject_id": name, "subject_label": label, "target": target}}


def write(folder: Path, **splits: list[dict[str, Any]]) -> None:
    """Write splits and their volumes. ``x_2.nii`` is a copy of ``x.nii``; other volumes differ in content."""
    folder.mkdir(exist_ok=True)
    for split, samples in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
        for path in {image["path"] for one in samples for image in one.get("images", ())}:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            draw = np.random.default_rng(list(Path(path).stem.removesuffix("_2").encode()))
            nib.save(nib.Nifti1Image(draw.normal(size=(5, 4, 4)).astype(np.float32), np.eye(4)), folder / path)


SAMPLES = {
    "train": [
        sample("a_sex", "a.nii", subject="a"),
        sample("a_T1w", ("a.nii", "a_dMRI.nii"), kind="T2", subject="a"),
        sample("b_sex", "b_dMRI.nii", subject="b"),
    ],
    "validation": [sample("c_sex", "c.nii", subject="c"), sample("d_age", "d.nii", subject="d")],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data", **SAMPLES)
    return tmp_path / "data"


def settings_of(folder: Path, **data: Any) -> Settings:
    paths = {name: str(folder / f"{name}.jsonl") for name in SPLIT_NAMES if (folder / f"{name}.jsonl").exists()}
    overrides = {f"data.{name}": value for name, value in (paths | data).items()}
    return load_settings(overrides={"resources.storage": str(folder.parent / "runs")} | overrides)


def read(folder: Path, names: Sequence[str] = SPLIT_NAMES[:2], **data: Any) -> Splits:
    return read_splits(settings_of(folder, **data), plain, names)


def lines(splits: Splits, folder: Path) -> list[str]:
    return [str(problem).replace(f"{folder}/", "") for problem in splits.problems]


def tasks(splits: Splits) -> list[list[str]]:
    return [[c.task_id for c in split] for split in (splits.train, splits.validation)]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [["a_sex", "a_T1w", "b_sex"], ["c_sex", "d_age"]]),
        ({"modality": "sMRI"}, [["a_sex"], ["c_sex", "d_age"]]),
        ({"task_filter": "T1"}, [["a_sex", "b_sex"], ["c_sex", "d_age"]]),  # a task type is not looked for in task ids
        ({"task_filter": "sex", "modality": "sMRI"}, [["a_sex"], ["c_sex"]]),
        ({"task_filter": "^[ad]_(sex|age)$"}, [["a_sex"], ["d_age"]]),
    ],
)
def test_filters_keep_a_modality_a_task_type_or_task_ids(folder: Path, filters: dict, kept: list) -> None:
    assert tasks(read(folder, **filters)) == kept


def test_held_out_data_without_training_data_do_not_select_the_phantom_cohort(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train is not set, and data\.validation or data\.test is"):
        read(folder, train="")


def test_several_files_are_one_split_and_the_path_map_finds_moved_volumes(folder: Path) -> None:
    text = (folder / "train.jsonl").read_text(encoding="utf-8").replace('"a.nii', '"/old/disk/a.nii')
    first, *rest = text.split("\n")
    (folder / "one.jsonl").write_text(first, encoding="utf-8")
    (folder / "two.jsonl").write_text("\n".join(rest), encoding="utf-8")
    files = [str(folder / "one.jsonl"), str(folder / "tw*.jsonl")]
    splits = read(folder, train=files, path_map={"/old/disk": str(folder)})
    assert tasks(splits)[0] == ["a_sex", "a_T1w", "b_sex"]
    assert splits.train[0].volumes[0].image_path == str(folder / "a.nii")


@pytest.mark.parametrize(
    ("train", "validation", "line"),
    [
        pytest.param(
            [sample("a", "sub-1_T1w.nii"), sample("b", "sub-2_T1w.nii")],
            [sample("c", "sub-1_T1w.nii"), sample("d", "sub-2_T1w.nii")],
            "validation.jsonl:1: subject_id: sub-1 is also in data.train, at train.jsonl:1 (and 1 more subject); split",
            id="the same file",
        ),
        pytest.param(
            [sample("a", "sub-1/ses-1/x.nii")],
            [sample("c", "sub-1/ses-2/y.nii")],
            "validation.jsonl:1: subject_id: sub-1 is also in data.train, at train.jsonl:1; split",
            id="another session",
        ),
        pytest.param(
            [sample("a", "x.nii")], [sample("c", "x_2.nii")], "validation.jsonl:1: subject_id: volume-", id="a copy"
        ),
        pytest.param(
            [sample("a", "x.nii", subject="p")],
            [sample("c", "x_2.nii", subject="q")],
            "validation.jsonl:1: image_path: x",
            id="a copy of another subject",
        ),
        pytest.param(
            [sample("a", "x.nii", patient_id="7 ")],
            [sample("c", "y.nii", metadata={"subject_id": 7.0})],
            "validation.jsonl:1: subject_id: 7 is also",
            id="a number and a text",
        ),
        pytest.param(
            [sample("a", "sub-1.nii", family_id=3)],
            [sample("c", "sub-2.nii", metadata={"family_id": "3"})],
            "validation.jsonl:1: family_id: 3 is also",
            id="a family",
        ),
        pytest.param(
            [sample("a", "sub-1.nii")],
            [sample("c", "sub-1.nii", "sub-2.nii")],
            "train.jsonl:1: subject_id: sub-1 is also in data.validation",
            id="a reference that training asks about",
        ),
    ],
)
def test_what_one_split_asks_about_is_in_no_other_split(
    tmp_path: Path, train: list, validation: list, line: str
) -> None:
    write(tmp_path, train=train, validation=validation)
    [found] = lines(read(tmp_path), tmp_path)
    assert found.startswith(line)


def test_the_groups_of_a_named_key_are_in_one_split(tmp_path: Path) -> None:
    def of(subject: str, household: Any) -> dict[str, Any]:
        keys = {"family_id": 3, "household": household}
        return sample(subject, f"sub-{subject}.nii", metadata={"subject_id": subject, **keys})

    write(tmp_path, train=[of("a", "h1"), of("b", " ")], validation=[of("c", "h1"), of("d", " "), of("e", "h2")])
    [found] = lines(read(tmp_path, group="household"), tmp_path)
    assert found == (
        "validation.jsonl:1: household: h1 is also in data.train, at train.jsonl:1; split by household, or the score"
        " means nothing"
    )
    with pytest.raises(UserError, match=r"^data\.group=hosehold: no sample has this key in its metadata; .*out$"):
        read(tmp_path, group="hosehold")
    read(tmp_path, ["validation"], group="scanner")  # other data of an evaluation need not have the key


def test_references_may_be_in_several_splits_and_are_counted(tmp_path: Path) -> None:
    stated = {"subject_id": "b", "reference_id": "r"}
    write(
        tmp_path,
        train=[sample("a", "sub-r.nii", "sub-a.nii"), sample("b", "sub-r.nii", "b.nii", metadata=stated)],
        validation=[sample("c", "sub-r_2.nii", "sub-C.nii"), sample("d", "y.nii")],
        test=[sample("e", "sub-c.nii")],
    )
    splits = read(tmp_path, SPLIT_NAMES)
    assert [c.subject_id for c in splits.train] == ["sub-a", "b"]
    assert splits.validation[0].subjects == {"sub-r", "sub-C"}
    assert [v.image_path for v in splits.train[1].subject_volumes] == [str(tmp_path / "b.nii")]
    assert splits.problems == []
    starts = [
        "1 sample without a subject: the content of the volume",
        "3 samples without a subject: sub-... in the path",
        "subjects sub-C and sub-c differ by case only",
        "1 volume in several splits, in each as a reference only",
    ]
    assert all(notice.startswith(start) for notice, start in zip(splits.notices, starts, strict=True))


def test_files_of_equal_size_and_other_content_are_other_volumes(tmp_path: Path) -> None:
    write(tmp_path, train=[sample("a", "x.nii")], validation=[sample("c", "y.nii")])
    content = bytearray((tmp_path / "x.nii").read_bytes())
    content[-1] ^= 1  # the middle, which is compared first, is the same
    (tmp_path / "y.nii").write_bytes(content)
    assert read(tmp_path).problems == []


def test_the_fingerprint_depends_on_the_content_and_not_on_the_place(folder: Path) -> None:
    first = read(folder).fingerprint
    moved = folder.parent / "elsewhere"
    shutil.copytree(folder, moved)
    assert read(moved).fingerprint == first
    seen = {first}
    for file, old, new in (("train.jsonl", "male.", "female."), ("validation.jsonl", "c_sex", "c_sex2")):
        text = (moved / file).read_text(encoding="utf-8")
        (moved / file).write_text(text.replace(old, new), encoding="utf-8")
        seen.add(read(moved).fingerprint)
    nib.save(nib.Nifti1Image(np.eye(4, dtype=np.float32)[None].repeat(9, 0), np.eye(4)), moved / "d.nii")
    splits = read(moved)
    seen.add(splits.fingerprint)
    seen.add(Splits({"train": [*splits.train, splits.validation[0]], "validation": splits.validation[1:]}).fingerprint)
    assert len(seen) == 5


LABELS = {f"s{i}": "female" if i % 2 else "male" for i in range(20)}


def comparison(subject: str, reference: str, answer: str) -> dict[str, Any]:
    """A sample like those of the original program: the task_id names the subject, and not the reference."""
    metadata = {
        "subject_id": subject,
        "subject_label": LABELS[subject],
        "reference_id": reference,
        "reference_label": LABELS[reference],
        "task": "sex_classification_via_comparison",
    }
    paths, subjects = (f"{reference}.nii", f"{subject}.nii"), [reference, subject]
    made = sample(f"{subject}_comparison", *paths, kind="T3", metadata=metadata, subject_ids=subjects)
    made["conversations"][-1]["content"] = answer
    return made


def test_repeated_ids_are_numbered_and_empty_held_out_answers_are_filled(tmp_path: Path) -> None:
    train = [comparison(s, f"s{i}", f"{LABELS[s]}.") for s in ("s0", "s1") for i in range(2, 7)]
    held_out = {"validation": ("s10", "s11"), "test": ("s12", "s13")}
    blank = {name: [comparison(s, f"s{i}", "") for s in held_out[name] for i in (14, 15)] for name in held_out}
    write(tmp_path, train=train, **blank)
    raw = read(tmp_path, SPLIT_NAMES)
    assert raw.problems == []
    assert [c.task_id for c in raw.splits["train"]][:6] == [
        *(f"s0_comparison{number}" for number in ("", "#2", "#3", "#4", "#5")),
        "s1_comparison",
    ]
    for name in held_out:
        assert [c.answer for c in raw.splits[name]] == ["male."] * 2 + ["female."] * 2
    numbered = "the task_id is used before with other content; such samples are numbered: id, id#2, ..."
    filled = "4 samples with an empty last answer; each gets the usual answer of its label in data.train"
    assert raw.notices == [
        f"{tmp_path}/train.jsonl:2: {numbered} (8 samples)",
        *(f"{tmp_path}/{name}.jsonl:2: {numbered} (2 samples)" for name in held_out),
        *(f"data.{name}: {filled}" for name in held_out),
        "2 volumes in several splits, in each as a reference only, which is allowed",
    ]
    assert read(tmp_path, ("test",)).splits["test"] == raw.splits["test"]


def test_empty_answers_in_training_or_of_an_unknown_label_are_problems(tmp_path: Path) -> None:
    blank = [("c", "male", ""), ("d", "female", ""), ("e", 63, "", "age"), ("f", "male", "x")]
    train = [labelled("a", "male", "male."), labelled("b", "female", "")]
    write(tmp_path, train=train, validation=[labelled(*one) for one in blank])
    raw = read(tmp_path)
    assert [c.answer for c in raw.validation] == ["male.", "x"]
    missing = "conversations: the last answer is empty, and data.train answers no sample of"
    assert [line.split(";")[0] for line in lines(raw, tmp_path)] == [
        "train.jsonl:2: messages.1.content: is empty",
        f"validation.jsonl:2: {missing} 'sex' with the label 'female'",
        f"validation.jsonl:3: {missing} 'age' with the label 63",
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
def test_labels_that_their_answer_contradicts_are_problems(tmp_path: Path, train: list, found: int) -> None:
    write(tmp_path, train=[labelled(f"s{i}", *one) for i, one in enumerate(train)], validation=[])
    raw = read(tmp_path, ("train",))
    assert (
        lines(raw, tmp_path)
        == [
            "train.jsonl:3: metadata.subject_label: the label is 'male', but the answer 'female.' is that of the label"
            " 'female'; correct one of them"
        ]
        * found
    )
    assert len(raw.train) == len(train) - found


REGRESSION = 'so it is a regression; for classes write their names as text, as in "male"'


@pytest.mark.parametrize(
    ("samples", "notices"),
    [
        (
            [("61", "61 years."), ("62.5", "62.5 years."), (63, "63 years.")],
            [
                "2 labels of 'age' are numbers written as text, first '61';"
                " for a regression write them as numbers, without quotes"
            ],
        ),
        ([(0, "female."), (1, "male."), (1, "male.")], [f"3 labels of 'age' are the numbers 0, 1, {REGRESSION}"]),
        ([(1, "low"), (3.0, "high"), (2, "middle")], [f"3 labels of 'age' are the numbers 1, 2, 3, {REGRESSION}"]),
        ([(61, "61"), (62, "62")], []),
        ([(0.5, "little"), (1.5, "much")], []),
        ([("0", "female."), ("1", "male.")], []),
        ([("T1", "first"), ("2", "second")], []),
    ],
)
def test_labels_that_look_like_numbers_or_like_classes_are_noted(tmp_path: Path, samples: list, notices: list) -> None:
    train = [labelled(f"s{i}", label, answer, "age") for i, (label, answer) in enumerate(samples)]
    write(tmp_path, train=train, validation=[])
    raw = read(tmp_path, ("train",))
    assert (raw.problems, raw.notices) == ([], notices)


GONE = [f"/old/disk/scans/{name}.nii" for name in ("a", "b/x", "c", "d", "a")]


@pytest.mark.parametrize(
    ("field", "texts", "expected"),
    [
        (
            "image_path",
            [f"{path}{FILE_MISSING}" for path in [*GONE, "D:\\x\\a.nii", "D:/x/b.nii"]],
            [
                "c.jsonl:1: image_path: 4 files below /old/disk/scans do not exist, first a.nii, b/x.nii, c.nii;"
                " data.path_map={/old/disk/scans: /your/folder}, or data.root for relative paths",
                "c.jsonl:6: image_path: 2 files below D:/x do not exist, first a.nii, b.nii;"
                " data.path_map={D:/x: /your/folder}, or data.root for relative paths",
            ],
        ),
        (
            "image_path",
            [f"{path}: has 5 axes (1, 2), neither; correct it" for path in GONE],
            [
                f"c.jsonl:1: image_path: {GONE[0]}: has 5 axes (1, 2), neither; correct it"
                " (and 4 more conversations below /old/disk/scans, next b/x.nii, c.nii)"
            ],
        ),
        (
            "conversations.3.role",
            ["'a/b' is not known", "'a/c' is not known", "# is not known"],
            ["c.jsonl:1: conversations.3.role: 'a/b' is not known (and 2 more conversations)"],
        ),
        (
            "conversations",
            ["becomes 529 tokens", "becomes 530 tokens", "is empty"],
            [
                "c.jsonl:1: conversations: becomes 529 tokens (and 1 more conversation, next 530)",
                "c.jsonl:3: conversations: is empty",
            ],
        ),
    ],
)
def test_problems_of_one_kind_are_one_line_with_count_and_first_names(field: str, texts: list, expected: list) -> None:
    problems = [Problem(f"c.jsonl:{i}", field, text) for i, text in enumerate(texts, 1)]
    assert Splits(problems=problems).problem_lines() == expected


def test_problems_of_one_sample_are_counted_as_one_conversation() -> None:
    twice = [Problem("c.jsonl:1", f"conversations.{i}.role", f"'{role}' is not known") for i, role in enumerate("ab")]
    assert Splits(problems=twice).problem_lines() == [
        "c.jsonl:1: conversations.0.role: 'a' is not known (and 1 more there, next 'b')"
    ]


def spoil(folder: Path) -> None:
    """Five bad samples: two about a damaged volume, one about an empty one, one cut short, one with two faults."""
    write(folder, train=[*SAMPLES["train"], sample("e", "e.nii"), sample("f", "f.nii")])
    (folder / "a.nii").write_bytes(b"no image")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), folder / "d.nii")
    samples = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")
    samples[3] = samples[3][:40]
    samples[4] = json.dumps(json.loads(samples[4]) | {"conversations": [], "metadata": 3})
    (folder / "train.jsonl").write_text("\n".join(samples), encoding="utf-8")


def test_bad_conversations_are_reported_before_volumes_are_decoded_and_bad_volumes_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load_splits(settings_of(folder), plain)
    where = [line.split(": ")[0] for line in str(caught.value).split("\n")]
    assert where == [f"{folder}/train.jsonl:{line}" for line in (4, 5, 5)]
    samples = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:3]
    (folder / "train.jsonl").write_text("\n".join(samples), encoding="utf-8")
    monkeypatch.setattr(store_module, "MIN_PARALLEL_BYTES", 0)
    # Threads start at once; the order and the outcome are those of processes.
    with joblib.parallel_config("threading"), pytest.raises(UserError) as caught:
        load_splits(settings_of(folder, processes=2), plain)
    damaged, empty = str(caught.value).split("\n")
    assert damaged.startswith(f"{folder}/train.jsonl:1: image_path: {folder}/a.nii: cannot be read as an image: ")
    assert damaged.endswith("; copy or convert the file anew (and 1 more conversation)")
    assert empty.startswith(f"{folder}/validation.jsonl:2: image_path: {folder}/d.nii: every voxel is 0; ")
    assert len(list(open_store(settings_of(folder)).folder.rglob("*.npy"))) == 3  # the good ones are kept


def test_quarantine_lists_every_bad_sample_with_its_reasons_up_to_the_allowed_fraction(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    spoil(folder)
    splits = load_splits(settings_of(folder, on_bad="quarantine", max_bad_fraction=0.9), plain)
    assert tasks(splits) == [["b_sex"], ["c_sex"]]
    assert [len(splits.lengths[name]) for name in ("train", "validation")] == [1, 1]
    assert splits.quarantined == 5
    assert splits.quarantine
    entries = [json.loads(line) for line in splits.quarantine.read_text(encoding="utf-8").splitlines()]
    train, validation = f"{folder}/train.jsonl", f"{folder}/validation.jsonl"
    assert [e["where"] for e in entries] == [f"{train}:4", f"{train}:5", f"{train}:1", f"{train}:2", f"{validation}:2"]
    assert [len(e["reasons"]) for e in entries] == [1, 2, 1, 1, 1]
    assert "cannot be read as an image" in entries[2]["reasons"][0]
    assert isinstance(entries[0]["sample"], str)
    assert [e["sample"]["task_id"] for e in entries[1:]] == ["f", "a_sex", "a_T1w", "d_age"]
    assert f"note: 5 samples cannot be used, see {splits.quarantine}" in capsys.readouterr().err
    share = r"\n5 of 7 samples cannot be used, more than data\.max_bad_fraction=0\.5; repair them, or raise that$"
    with pytest.raises(UserError, match=share):
        load_splits(settings_of(folder, on_bad="quarantine", max_bad_fraction=0.5), plain)


def test_samples_that_a_trial_cannot_use_are_found_before_the_start(folder: Path) -> None:
    silent = sample("silent", "a.nii", "a.nii", subject="a")
    silent["conversations"][-1]["loss"] = False
    write(folder, train=[*SAMPLES["train"], silent])
    settings = settings_of(folder, max_tokens=400)
    assert len(load_splits(settings, plain, dry_run=True).train) == 4
    masks = [{"mask.normalize": "turn"}, {"mask.supervise": "last_assistant"}]
    masks += [one | {"mask.normalize": "sample"} for one in masks]
    trials = [settings.with_values(one) for one in masks]
    with pytest.raises(UserError) as caught:
        load_splits(settings, plain, trials, dry_run=True)
    policy = "supervise=last_assistant, end_of_turn=True, turn_header=False, normalize=sample"
    assert str(caught.value) == (  # once: normalize is no reason of its own
        f"{folder}/train.jsonl:4: conversations: the mask policy ({policy}) supervises none of its tokens; choose"
        " another mask, correct the loss flags of its turns, or leave it out with data.on_bad=quarantine"
    )
    quarantining = settings.with_values({"data.on_bad": "quarantine", "data.max_bad_fraction": 0.5})
    splits = load_splits(quarantining, plain, trials, dry_run=True)
    assert (tasks(splits)[0], len(splits.lengths["train"])) == (["a_sex", "a_T1w", "b_sex"], 3)
    long = settings.with_values({"modalities.dMRI": {"grid": [60] * 3, "patch": [3] * 3}})  # 8000 tokens a volume
    with pytest.raises(UserError, match=r"train\.jsonl:2: conversations: becomes \d+ tokens, more than data\.max_tok"):
        load_splits(settings, plain, [settings, long], dry_run=True)


def test_every_grid_of_a_sweep_is_decoded_before_the_start(folder: Path) -> None:
    def shaped(grid: int, patch: int) -> Settings:
        names = [f"modalities.{name}" for name in ("sMRI", "dMRI")]
        return settings_of(folder).with_values({name: {"grid": [grid] * 3, "patch": [patch] * 3} for name in names})

    trials = [shaped(4, 2), shaped(6, 2), shaped(6, 3)]
    splits = load_splits(settings_of(folder), plain, trials)
    arrays = sorted(np.load(file).shape for file in open_store(settings_of(folder)).folder.rglob("*.npy"))
    assert arrays == [(4, 4, 4)] * 5 + [(6, 6, 6)] * 5  # not the grid of the settings, which no trial has
    alone = load_splits(trials[0], plain)
    assert (splits.lengths["train"] == alone.lengths["train"]).all()
    assert (splits.tokens == alone.tokens).all()
    by_tokens = [trial.with_values({"train.tokens_per_batch": 99}) for trial in trials]
    with pytest.raises(UserError, match=r"^train\.tokens_per_batch: the trials differ in modalities or tokenizers"):
        load_splits(by_tokens[0], plain, by_tokens)
    renderer = load_renderer(trials[0])
    assert splits.tokens.tolist() == [len(renderer.render(c).input_ids) for c in splits.train]


def test_the_phantom_cohort_is_made_once_and_counted_by_a_dry_run(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    base = {"resources.storage": str(tmp_path), "cohort.spacing": 10.0, "cohort.functional_subjects": 2}
    made: list[str] = []

    def watch(things: Sequence, what: str) -> Iterable:
        made.append(what)
        return things

    filters: list[dict] = [{}, {"data.task_filter": "T3"}, {"data.modality": "sMRI"}]
    every = [small_settings(base | others) for others in filters]
    before = [tasks(load_splits(settings, plain, dry_run=True)) for settings in every]
    assert list(tmp_path.iterdir()) == []
    for settings, drawn in zip(every, before, strict=True):
        assert drawn == tasks(read_splits(settings, watch)) == tasks(load_splits(settings, plain, dry_run=True))
    assert made.count("making the synthetic cohort") == 1
    assert list(tmp_path.iterdir()) == [phantom_folder_of(every[0])]
    with pytest.raises(UserError, match=r"data\.train: none of its"):
        load_splits(small_settings(base | {"cohort.seed": 1, "data.task_filter": "nothing"}), plain, dry_run=True)
