"""Every conversation file becomes the one Conversation type, or an error that names file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversation import read_conversations


@pytest.fixture(autouse=True)
def volume(tmp_path: Path) -> None:
    """An image file beside the conversations; reading them only looks whether it exists."""
    (tmp_path / "a.nii").touch()


def sample(task_id: str = "t", **changes: Any) -> dict[str, Any]:
    image = {"type": "image", "modality": "sMRI", "image_path": "a.nii"}
    return {
        "task_id": task_id,
        "task_type": "T1",
        "images": [{"path": "a.nii", "token": "<image>", "modality": "sMRI"}],
        "conversations": [
            {"role": "user", "content": [{"type": "text", "text": "Sex?"}, image]},
            {"role": "assistant", "content": "male."},
        ],
        "metadata": {"subject_id": "sub-1", "subject_label": "male"},
        **changes,
    }


def write(file: Path, *samples: Any, form: str = "lines") -> Path:
    text = {
        "object": lambda: json.dumps(samples[0], indent=1),
        "list": lambda: json.dumps(samples, indent=1),
        "lines": lambda: "\n".join(map(json.dumps, samples)),
    }[form]()
    file.write_text(text, encoding="utf-8")
    return file


def problems(path: Path, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_conversations(path, **options)
    return [line.removeprefix(f"{path.parent}/") for line in str(caught.value).split("\n")]


def test_objects_lists_lines_and_folders_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    write(folder / "1.json", sample("one"), form="object")
    write(folder / "2.json", sample("two"), sample("three"), form="list")
    write(folder / "deeper/3.jsonl", sample("four"), sample("five"))
    (folder / "notes.txt").write_text("not a conversation")
    found = read_conversations(folder, root=tmp_path)
    assert [c.task_id for c in found] == ["one", "two", "three", "four", "five"]
    assert {c.answer for c in found} == {"male."}


def test_relative_paths_start_from_the_files_folder_or_from_the_root(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.nii").touch()
    file = write(tmp_path / "c.jsonl", sample())
    for root, expected in ((None, tmp_path / "a.nii"), (tmp_path / "sub", tmp_path / "sub/a.nii")):
        [conversation] = read_conversations(file, root)
        assert conversation.volumes[0].image_path == conversation.images[0].path == str(expected)


def test_plain_strings_extra_keys_and_numbers_are_kept(tmp_path: Path) -> None:
    metadata = {"subject_id": "s", "subject_label": 63.5, "target": "age", "site": {"name": "A"}}
    file = write(tmp_path / "c.jsonl", sample(metadata=metadata, subject_ids=["s"]))
    [conversation] = read_conversations(file)
    assert conversation.model_dump()["conversations"][1]["content"] == ({"type": "text", "text": "male."},)
    assert conversation.model_dump()["subject_ids"] == ["s"]
    assert conversation.model_dump()["images"][0]["token"] == "<image>"
    assert (conversation.label, conversation.target, conversation.subject_id) == (63.5, "age", "s")
    assert conversation.metadata["site"] == {"name": "A"}


def test_line_numbers_are_those_of_the_editor(tmp_path: Path) -> None:
    bad = sample("bad", images=[])
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f"{json.dumps(sample())}\n\n\n{json.dumps(bad)}\n")
    assert [p.split(": ")[0] for p in problems(lines)] == ["lines.jsonl:4"]
    listed = write(tmp_path / "list.json", sample(), bad, form="list")
    # The first sample of an indented list starts on line 2; the second after the line of its own opening brace.
    second = [i for i, line in enumerate(listed.read_text().split("\n"), 1) if line == " {"][1]
    assert [p.split(": ")[0] for p in problems(listed)] == [f"list.json:{second}"]
    single = tmp_path / "single.json"
    single.write_text("\n\n" + json.dumps(bad))
    assert [p.split(": ")[0] for p in problems(single)] == ["single.json:3"]


def test_every_problem_is_listed_not_only_the_first(tmp_path: Path) -> None:
    turns = sample()["conversations"]
    elsewhere = [{"path": "b.nii", "modality": "sMRI"}]
    wrong_role = [{"role": "human", "content": "Hi"}, *turns]
    no_path = [{"role": "user", "content": [{"type": "image", "modality": "sMRI"}]}]
    file = write(
        tmp_path / "c.jsonl",
        sample("good"),
        sample("two volumes", images=sample()["images"] * 2),
        sample("other volume", images=elsewhere),
        sample("no answer", conversations=turns[:1]),
        sample("two faults", conversations=wrong_role, metadata=3),
        sample("no path", conversations=no_path),
        [1, 2],
        sample("good"),
    )
    found = [problem.split(": ", 2)[:2] for problem in problems(file)]
    assert found == [
        ["c.jsonl:2", "sample"],
        ["c.jsonl:3", "sample"],
        ["c.jsonl:4", "sample"],
        ["c.jsonl:5", "conversations.0.role"],
        ["c.jsonl:5", "metadata"],
        ["c.jsonl:6", "conversations.0.content.0.image.image_path"],
        ["c.jsonl:7", "sample"],
        ["c.jsonl:8", "task_id"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "images lists 0 volumes and the turns show 1"),
        ({"images": [{"path": "a.nii", "modality": "dMRI"}]}, "they differ in path, modality or order"),
        ({"conversations": [{"role": "user", "content": "Hi"}], "images": []}, "no assistant turn"),
        ({"conversations": [], "images": []}, "no assistant turn"),
    ],
)
def test_a_sample_that_contradicts_itself_says_how(tmp_path: Path, changes: dict, message: str) -> None:
    [problem] = problems(write(tmp_path / "c.jsonl", sample(**changes)))
    assert message in problem


def test_a_missing_volume_and_an_unknown_modality_name_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "a.nii").unlink()
    assert problems(write(tmp_path / "c.jsonl", sample()), modalities=["dMRI", "fMRI"]) == [
        "c.jsonl:1: modality: 'sMRI' is not one of dMRI, fMRI; see `modalities`",
        f"c.jsonl:1: image_path: {tmp_path}/a.nii does not exist; see `data.root`",
    ]


def test_a_task_id_used_twice_names_both_places(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    first = write(folder / "1.jsonl", sample("x"), sample("y"))
    second = write(folder / "2.jsonl", sample("y"))
    with pytest.raises(UserError, match=f"^{second}:1: task_id: y is already used at {first}:2$"):
        read_conversations(folder, root=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"task_id": "t"\n "task_type"}', "c.json:2: not JSON: Expecting ',' delimiter, column 2"),
        (b"[" + json.dumps(sample()).encode() + b",", "c.json: not JSON: the list is not closed"),
        (b'{"task_id": "\xff"}', "c.json: cannot be read as UTF-8 text"),
        (b"[]", "c.json: holds no conversation"),
        (None, "c.json: no such file or folder"),
    ],
)
def test_a_file_that_is_damaged_empty_or_missing_is_named(tmp_path: Path, text: bytes | None, message: str) -> None:
    file = tmp_path / "c.json"
    if text is not None:
        file.write_bytes(text)
    [problem] = problems(file)
    assert problem.startswith(message)
