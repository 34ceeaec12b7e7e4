"""Conversation files become conversations, or problems that name file, line, field and remedy."""

import copy
import gzip
import json
import random
import re
import resource
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversations.reading import Problem, Reading, conversation_files, read_conversations
from umbrella.data.masking import loss_weights
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import RawSplits
from umbrella.data.tokenizer import byte_tokenizer
from umbrella.modality import Modality


@pytest.fixture(autouse=True)
def volume(tmp_path: Path) -> None:
    """An image file beside the conversations; reading them only looks whether it exists."""
    (tmp_path / "a.nii").touch()


def sample(task_id: str = "t", path: str = "a.nii", **changes: Any) -> dict[str, Any]:
    image = {"type": "image", "modality": "sMRI", "image_path": path}
    return {
        "task_id": task_id,
        "task_type": "T1",
        "images": [{"path": path, "token": "<image>", "modality": "sMRI"}],
        "conversations": [
            {"role": "user", "content": [{"type": "text", "text": "Sex?"}, image]},
            {"role": "assistant", "content": "male."},
        ],
        "metadata": {"subject_id": "sub-1", "subject_label": "male"},
        **changes,
    }


def with_turns(*turns: tuple[str, Any], task_id: str = "t") -> dict[str, Any]:
    written = [{"role": role, "content": content} for role, content in turns]
    return sample(task_id, conversations=written, images=[])


def write(file: Path, *samples: Any, form: str = "lines") -> Path:
    text = {
        "object": lambda: json.dumps(samples[0], indent=1),
        "list": lambda: json.dumps(samples, indent=1),
        "lines": lambda: "\n".join(map(json.dumps, samples)),
    }[form]()
    data = text.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def ids(reading: Reading) -> list[str]:
    assert reading.problems == []
    return [c.task_id for c in reading.conversations]


def problems(path: Path, **options: Any) -> list[str]:
    """The problem lines, without the folder of the file."""
    return [str(p).removeprefix(f"{path.parent}/") for p in read_conversations(path, **options).problems]


def test_objects_lists_lines_and_folders_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder / "1.json", sample("one"), form="object")
    write(folder / "2.json", sample("two"), sample("three"), form="list")
    write(folder / "deeper/3.jsonl", sample("four"), sample("five"))
    write(folder / "deeper/4.ndjson.gz", sample("six"))
    write(folder / "deeper/5.JSON.gz", sample("seven"), sample("eight"), form="list")
    (folder / "notes.txt").write_text("not a conversation")
    write(folder / ".ipynb_checkpoints/1.json", sample("one"))
    reading = read_conversations(folder, root=tmp_path)
    assert ids(reading) == ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert {c.answer for c in reading.conversations} == {"male."}
    assert reading.locations["five"] == f"{folder}/deeper/3.jsonl:2"


def test_files_folders_and_patterns_mix_and_each_file_counts_once(tmp_path: Path) -> None:
    names = ["a/1.json", "a/b/2.jsonl", "a/b/c/3.ndjson.gz", "d/4.jsonl.gz", "d/[5].json", "e.json"]
    made = {name: write(tmp_path / name, sample(name)) for name in names}
    (tmp_path / "link.json").symlink_to(made["e.json"])
    (tmp_path / "a/b/volume.nii.gz").touch()

    def found(*paths: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in conversation_files([tmp_path / path for path in paths])]

    assert found("e.json") == ["e.json"]
    assert found("d", "a/b", "d/4.jsonl.gz") == ["a/b/2.jsonl", "a/b/c/3.ndjson.gz", "d/4.jsonl.gz", "d/[5].json"]
    assert found("a/*") == ["a/1.json"]
    assert found("a/**") == found("a") == ["a/1.json", "a/b/2.jsonl", "a/b/c/3.ndjson.gz"]
    assert found("*/[45]*", "d/[5].json") == ["d/4.jsonl.gz", "d/[5].json"]
    assert found("e.json", "link.json", "a/../e.json") == ["e.json"]
    assert conversation_files(str(tmp_path / "e.json")) == [tmp_path / "e.json"]


def test_paths_that_give_no_file_are_all_listed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = write(tmp_path / "good.json", sample())
    with pytest.raises(UserError) as caught:
        read_conversations(
            [good, tmp_path / "no.json", tmp_path / "empty", f"{tmp_path}/*.jsonl", good.parent / "a.nii"]
        )
    remedy = "; name files that end with .json, .json.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz"
    assert str(caught.value).replace(remedy, "").split("\n") == [
        f"{tmp_path}/no.json: no such file or folder; check the path",
        f"{tmp_path}/empty: no conversation file in this folder",
        f"{tmp_path}/*.jsonl: no conversation file fits this pattern",
        f"{tmp_path}/a.nii: not a conversation file",
    ]
    with pytest.raises(UserError, match=r"^no conversation file is named; name at least one$"):
        conversation_files([])
    with pytest.raises(UserError, match=r"^'': no such file or folder"):
        conversation_files("")


def test_relative_paths_start_from_the_files_folder_or_from_the_root(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.nii").touch()
    file = write(tmp_path / "c.jsonl", sample())
    for root, expected in ((None, tmp_path / "a.nii"), (tmp_path / "sub", tmp_path / "sub/a.nii")):
        [conversation] = read_conversations(file, root).conversations
        assert conversation.volumes[0].image_path == conversation.images[0].path == str(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/a.nii", "/scans/a.nii"),
        ("/data/old/x/a.nii", "/archive/x/a.nii"),  # the longest beginning
        ("/database/a.nii", "/database/a.nii"),  # whole names only
        ("/data", "/scans"),
        ("moved/a.nii", "/root/here/a.nii"),  # before the root
        ("/gone/a.nii", "/root/a.nii"),
        ("/x/data/a.nii", "/x/data/a.nii"),  # at the beginning only
        ("b.nii", "/root/b.nii"),
    ],
)
def test_beginnings_of_paths_are_mapped(tmp_path: Path, path: str, expected: str) -> None:
    file = write(tmp_path / "c.jsonl", sample(path=path))
    path_map = {"/data/": "/scans", "/data/old": "/archive/", "moved": "here", "/gone": ""}
    [conversation] = read_conversations(file, "/root", path_map, check_files=False).conversations
    assert conversation.volumes[0].image_path == conversation.images[0].path == expected


@pytest.mark.parametrize("path", [r"D:\scans\a.nii", "D:/scans/a.nii", "file:///D:/scans/a.nii", r"\\pc\scans\a.nii"])
@pytest.mark.parametrize("slash", ["\\", "/"])
def test_windows_paths_are_mapped_whichever_slash_they_and_the_map_are_written_with(
    tmp_path: Path, path: str, slash: str
) -> None:
    file = write(tmp_path / "c.jsonl", sample(path=path), sample("u", r"rel\a.nii"))
    keys = ["D:/scans", "//pc/scans", "rel"]
    path_map = {key.replace("/", slash): str(tmp_path) for key in keys}
    assert {c.volumes[0].image_path for c in read_conversations(file, path_map=path_map).conversations} == {
        f"{tmp_path}/a.nii"
    }
    [problem, _] = problems(file)
    assert f"image_path: {path.removeprefix('file:///')} does not exist; see" in problem


def test_formats_mix_in_one_file_unless_one_is_stated(tmp_path: Path) -> None:
    llava = {"id": 2, "image": "a.nii", "modality": "sMRI"}
    llava["conversations"] = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    file = write(tmp_path / "c.jsonl", sample("1"), llava)
    assert ids(read_conversations(file)) == ["1", "2"]
    assert [p.split(": ")[0] for p in problems(file, format="v2")] == ["c.jsonl:2"] * 6
    assert problems(file, format="v3") == ["c.jsonl: format: 'v3' is not known; use auto, v2, v1, llava, chat"]


def test_line_numbers_are_those_of_the_editor(tmp_path: Path) -> None:
    bad = sample("bad", images=[])
    lines = tmp_path / "lines.jsonl"
    # U+2028 in a text is no end of a line.
    first = json.dumps(sample(metadata={"note": "a\u2028b"}), ensure_ascii=False)
    lines.write_text(f"{first}\n\n\n{json.dumps(bad)}\n", encoding="utf-8")
    assert [p.split(": ")[0] for p in problems(lines)] == ["lines.jsonl:4"]
    listed = write(tmp_path / "list.json", sample(), bad, form="list")
    # The first sample of an indented list starts on line 2; the second after the line of its own opening brace.
    second = [i for i, line in enumerate(listed.read_text().split("\n"), 1) if line == " {"][1]
    assert [p.split(": ")[0] for p in problems(listed)] == [f"list.json:{second}"]
    single = tmp_path / "single.json"
    single.write_text("\n\n" + json.dumps(bad))
    assert [p.split(": ")[0] for p in problems(single)] == ["single.json:3"]


def test_samples_that_share_a_line_have_different_places(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps([sample("a", images=[]), sample("b"), sample("c", images=[])]))
    assert [p.where for p in read_conversations(file).problems] == [f"{file}:1", f"{file}:1 (sample 3)"]


def test_every_problem_is_listed_not_only_the_first(tmp_path: Path) -> None:
    turns = sample()["conversations"]
    elsewhere = [{"path": "b.nii", "modality": "sMRI"}]
    wrong_role = [{"role": "narrator", "content": "Hi"}, *turns]
    no_path = [{"role": "user", "content": [{"type": "image", "modality": "sMRI"}]}]
    samples = [
        sample("good"),
        sample("two volumes", images=sample()["images"] * 2),
        sample("other volume", images=elsewhere),
        sample("no answer", conversations=turns[:1]),
        sample("two faults", conversations=wrong_role, metadata=3),
        sample("no path", conversations=no_path),
        [1, 2],
        sample("good"),
        sample("good", "gone.nii", task_type=1, images=[]),
        sample("nothing asked", conversations=[{"role": "system", "content": "?"}, turns[1]], images=[]),
        sample("nothing answered", conversations=[*turns, turns[0] | {"content": "?"}]),
    ]
    reading = read_conversations(write(tmp_path / "c.jsonl", *samples), modalities=["sMRI"])
    assert [(p.where.split(":")[1], p.field) for p in reading.problems] == [
        ("2", "images"),
        ("3", "images.0.path"),
        ("4", "conversations"),
        ("5", "conversations.0.role"),
        ("5", "metadata"),
        ("6", "conversations.0.content.0.image_path"),
        ("7", "sample"),
        ("8", "sample"),
        ("9", "task_type"),
        ("9", "images"),
        ("9", "image_path"),
        ("10", "conversations"),
        ("11", "conversations"),
    ]
    assert [c.task_id for c in reading.conversations] == ["good"]
    for problem in reading.problems:
        assert problem.sample == samples[int(problem.where.split(":")[1]) - 1]


def test_conversion_problems_hide_none_of_the_others_and_bear_the_names_of_the_file(tmp_path: Path) -> None:
    llava = {"image": ["a.nii", "b.nii"], "conversations": [{"from": "bot", "value": "<image>"}, {"value": "x"}]}
    chat = {"id": "c", "messages": [{"role": "user", "content": [{"type": "image", "path": "b.nii"}]}]}
    assert problems(write(tmp_path / "c.jsonl", llava, chat)) == [
        "c.jsonl:1: image: the number of files is 2, that of `<image>` placeholders is 1; there must be one for each",
        "c.jsonl:1: task_id: is missing; give every sample a name of its own in `task_id` or `id`",
        "c.jsonl:1: conversations.0.from: 'bot' is not known; use system, user or assistant",
        "c.jsonl:1: conversations.1.from: is missing; add it",
        "c.jsonl:2: modality: cannot be inferred from the file name 'b.nii'; add `modality` to the sample",
        "c.jsonl:2: messages: no assistant turn, so there is nothing to learn from or to score; add the answer",
        f"c.jsonl:2: image_path: {tmp_path}/b.nii does not exist; see `data.root` and `data.path_map`",
    ]


def test_the_system_text_of_a_sample_does_not_shift_the_turns_that_a_problem_names(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "?"}, {"role": "bot", "content": "x"}, {"role": "assistant", "content": ""}]
    raw = {"id": "t", "system": "Be brief.", "messages": talk}
    assert [p.split(": ")[1] for p in problems(write(tmp_path / "c.jsonl", raw))] == [
        "messages.1.role",
        "messages.2.content",
    ]


def test_missing_volumes_folders_and_unknown_modalities_name_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "a.nii").unlink()
    (tmp_path / "folder.nii").mkdir()
    file = write(tmp_path / "c.jsonl", sample(), sample("u", "folder.nii"))
    unknown = "modality: 'sMRI' is not one of dMRI, fMRI; correct it or add it to `modalities`"
    assert problems(file, modalities=["dMRI", "fMRI"]) == [
        f"c.jsonl:1: {unknown}",
        f"c.jsonl:1: image_path: {tmp_path}/a.nii does not exist; see `data.root` and `data.path_map`",
        f"c.jsonl:2: {unknown}",
        f"c.jsonl:2: image_path: {tmp_path}/folder.nii is a folder; name the image file",
    ]
    assert ids(read_conversations(file, check_files=False)) == ["t", "u"]


def test_what_is_wrong_twice_in_a_sample_is_said_once(tmp_path: Path) -> None:
    scan = {"type": "image", "modality": "sMRI", "image_path": "gone.nii"}
    raw = with_turns(("user", [scan, scan]), ("assistant", "x"))
    raw["images"] = [{"path": "gone.nii", "modality": "sMRI"}] * 2
    assert len(problems(write(tmp_path / "c.jsonl", raw))) == 1


def test_each_volume_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr("os.path.isfile", lambda path, real=Path.is_file: looked.append(str(path)) or real(Path(path)))
    files = [write(tmp_path / f"{i}.jsonl", *(sample(f"{i} {j}") for j in range(3))) for i in range(2)]
    assert len(ids(read_conversations(files))) == 6
    assert looked.count(str(tmp_path / "a.nii")) == 1


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_a_turn_without_words_or_volumes_is_a_problem(tmp_path: Path, content: Any) -> None:
    file = write(tmp_path / "c.jsonl", with_turns(("user", content), ("assistant", "x")))
    assert problems(file) == ["c.jsonl:1: conversations.0.content: is empty; write a text, or leave the turn out"]


def test_samples_that_share_a_task_id_are_numbered_in_the_order_of_the_files_with_one_note(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    one = [sample("x"), sample("y", note=1), sample("y#2"), sample("y", note=2)]
    first = write(folder / "1.jsonl", *one)
    second = write(folder / "2.jsonl", sample("y", note=3), sample("y#2", note=4), sample("z"))
    for _ in range(2):
        reading = read_conversations(folder, root=tmp_path)
        assert [(c.task_id, c.model_dump().get("note")) for c in reading.conversations] == [
            *[("x", None), ("y", 1), ("y#2", None), ("y#3", 2)],
            *[("y#4", 3), ("y#2#2", 4), ("z", None)],
        ]
        assert reading.problems == []
        assert reading.notices == [
            f"{first}:4: the task_id is used before with other content; such samples are numbered: id, id#2, ..."
            " (3 samples)"
        ]
        assert reading.locations["y#4"] == f"{second}:1"


def test_a_sample_that_is_there_twice_is_a_problem_that_names_the_other_place(tmp_path: Path) -> None:
    samples = [sample("x"), sample("y", note=1), sample("y", note=2)]
    reordered = dict(reversed(samples[2].items()))
    first = write(tmp_path / "1.jsonl", *samples, samples[1])
    second = write(tmp_path / "2.jsonl", reordered, sample("z"))
    reading = read_conversations([first, second])
    assert [c.task_id for c in reading.conversations] == ["x", "y", "y#2", "z"]
    assert reading.problems == [
        Problem(f"{first}:4", "sample", f"is the same as the one at {first}:2; leave one out", samples[1]),
        Problem(
            f"{second}:1",
            "sample",
            f"is the same as the one at {first}:3; the same samples are in two files; name one",
            samples[2],
        ),
    ]


def test_no_sample_is_read_with_an_image_whose_file_or_modality_could_not_be_told(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "<image>Sex?"}, {"role": "assistant", "content": None}]
    unequal = {"id": "c", "images": ["a.nii"] * 2, "modality": "sMRI", "messages": talk}
    [line] = problems(write(tmp_path / "c.jsonl", unequal), allow_unanswered=True)
    assert ": images: the number of files is 2, that of image items and `<image>` placeholders is 1;" in line
    written = sample()
    written["conversations"][0]["content"][1]["modality"] = written["images"][0]["modality"] = "(unknown)"
    [line] = problems(write(tmp_path / "d.jsonl", written), modalities=["sMRI"])
    assert line == "d.jsonl:1: images: the file or the modality of an image is (unknown); write both"


def test_keys_that_a_model_never_sees_or_that_are_nearly_the_label_are_noted_once_with_their_number(
    tmp_path: Path,
) -> None:
    user, answer = sample()["conversations"]
    called = [user, answer | {"tool_calls": [{"name": "x"}], "reasoning_content": "large"}]
    file = write(
        tmp_path / "c.jsonl",
        sample("a", tools="[{}]", conversations=called),
        sample("b", tools=[], conversations=called),
        sample("c", metadata={"subject_lable": "male", "subject_id": "s", "subject_age": 4}),
        sample("d", metadata={}, Subject_Label="male"),
        sample("e", subject_labels=["male"]),  # it has its label
    )
    unseen = "is kept, but the model does not see it; write what it should see into the turns"
    unread = "is not read as the label; write it as `metadata.subject_label`"
    reading = read_conversations(file)
    assert len(ids(reading)) == 5
    assert reading.notices == [
        f"{file}:1: `reasoning_content` {unseen} (2 samples)",
        f"{file}:1: `tool_calls` {unseen} (2 samples)",
        f"{file}:1: `tools` {unseen} (1 sample)",
        f"{file}:3: `subject_lable` {unread} (1 sample)",
        f"{file}:4: `Subject_Label` {unread} (1 sample)",
    ]


@pytest.mark.parametrize("content", ["", " \n", [], None, [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("format", ["v2", "chat", "llava"])
def test_the_last_answer_of_a_sample_with_a_label_may_be_blank_where_that_is_asked_for(
    tmp_path: Path, content: Any, format: str
) -> None:
    turns = {
        "v2": [sample()["conversations"][0], {"role": "assistant", "content": content}],
        "chat": [{"role": "user", "content": "<image>Sex?"}, {"role": "assistant", "content": content}],
        "llava": [{"from": "human", "value": "<image>Sex?"}, {"from": "gpt", "value": content}],
    }[format]
    raw = sample("a") if format == "v2" else {"id": "a", "image": "a.nii", "modality": "sMRI"}
    raw["messages" if format == "chat" else "conversations"] = turns
    labelled = raw | {"metadata": {"subject_label": "male"}}
    file = write(tmp_path / "c.jsonl", labelled)
    [conversation] = read_conversations(file, allow_blank_answers=True).conversations
    assert not conversation.is_answered
    assert conversation.with_answer("male.").answer == "male."
    assert [p.split(": ")[-1] for p in problems(file)] == ["is empty; write a text, or leave the turn out"]
    unlabelled = write(tmp_path / "u.jsonl", raw | {"metadata": {}})
    assert len(problems(unlabelled, allow_blank_answers=True)) == 1


def test_turns_in_a_row_are_allowed_and_noted_once(tmp_path: Path) -> None:
    twice = [("user", "a"), ("user", "b"), ("assistant", "c")]
    answers = [("user", "a"), ("assistant", "b"), ("assistant", "c")]
    even = [("system", "s"), ("system", "s"), ("user", "a"), ("system", "s"), ("user", "b"), ("assistant", "c")]
    one = write(
        tmp_path / "1.jsonl", with_turns(*even), with_turns(*twice, task_id="u"), with_turns(*answers, task_id="v")
    )
    two = write(tmp_path / "2.jsonl", with_turns(*answers, task_id="w"))
    reading = read_conversations([one, two, write(tmp_path / "3.jsonl", with_turns(*even, task_id="x"))])
    assert len(ids(reading)) == 5
    assert reading.notices == [f"{one}:2: two user or two assistant turns in a row (3 samples)"]


@pytest.mark.parametrize("name", ["c.jsonl", "c.ndjson", "c.json", "c.jsonl.gz"])
def test_a_bad_line_is_left_out_and_the_next_one_read(tmp_path: Path, name: str) -> None:
    good = json.dumps(sample("1"))
    lines = ['{"task_id": "t", ', good, '{"a": NaN}', good.replace('"1"', '"2"') + "]", good.replace('"1"', '"3"'), "?"]
    file = tmp_path / name
    data = "\r\n".join(lines).encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    reading = read_conversations(file)
    assert [c.task_id for c in reading.conversations] == ["1", "3"]
    assert [(p.where, p.sample) for p in reading.problems] == [(f"{file}:{n}", lines[n - 1]) for n in (1, 3, 4, 6)]
    assert [p.what for p in reading.problems[1:3]] == [
        "holds NaN, which is not JSON; write null or a number",
        f"not JSON: more text after the object, column {len(lines[3])}; write one object per line",
    ]


@pytest.mark.parametrize("name", ["c.jsonl", "c.json"])
def test_indented_objects_one_after_another_are_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("\n".join(json.dumps(sample(i), indent=1) for i in "ab"))
    assert ids(read_conversations(file)) == ["a", "b"]
    file.write_text("\ufeff" + json.dumps([sample(i) for i in "ab"]), encoding="utf-8")
    assert ids(read_conversations(file)) == ["a", "b"]


def test_constants_that_are_not_json_spoil_their_sample_only(tmp_path: Path) -> None:
    samples = [sample("a", metadata={"subject_label": float("-inf")}), sample("b")]
    file = write(tmp_path / "c.json", *samples, form="list")
    reading = read_conversations(file)
    assert [c.task_id for c in reading.conversations] == ["b"]
    assert reading.problems == [
        Problem(f"{file}:2", "", "holds -Infinity, which is not JSON; write null or a number", samples[0])
    ]


@pytest.mark.parametrize("depth", [300, 100_000])
def test_a_sample_nested_beyond_reason_is_a_problem(tmp_path: Path, depth: int) -> None:
    deep = json.dumps(sample("deep"))[:-1] + ', "more": ' + "[" * depth + "]" * depth + "}"
    file = tmp_path / "c.jsonl"
    file.write_text(f"{deep}\n{json.dumps(sample('t'))}")
    reading = read_conversations(file)
    assert [c.task_id for c in reading.conversations] == ["t"]
    [problem] = reading.problems
    assert problem.where == f"{file}:1"
    assert "nested too deep" in problem.what
    assert problem.sample is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"task_id": "t"\n "task_type"}',
            "c.json:2: not JSON: Expecting ',' delimiter, column 2; correct the text there",
        ),
        (
            b"[" + json.dumps(sample()).encode() + b",",
            "c.json: not JSON: the list is not closed, so the file is probably cut short; copy it again",
        ),
        (
            b"[\n{},\n{]",
            "c.json:3: not JSON: Expecting property name enclosed in double quotes, column 2; correct the text there",
        ),
        (b'["\xff"]', "c.json: is not UTF-8 text: invalid start byte at byte 2; save it as UTF-8"),
        (b"[" * 100_000 + b"{" + b"]" * 100_000, "c.json:1: not JSON: Expecting property name"),
        (b'{"a":' + b"[" * 100_000 + b"]", "c.json:1: is nested too deep to be read; flatten it"),
        (b" \n", "c.json: is empty; write a conversation into it or leave it out"),
        (b"[]", "c.json: holds no conversation; name files that have some"),
    ],
    ids=["syntax", "unclosed list", "syntax in a list", "not UTF-8", "brackets", "deep", "empty", "nothing"],
)
def test_a_file_that_is_damaged_or_empty_is_in_doubt_as_a_whole(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(data)
    found = read_conversations(file).problems
    assert str(found[-1]).removeprefix(f"{tmp_path}/").startswith(message)
    assert found[-1].sample is None
    file.with_name("packed.json.gz").write_bytes(gzip.compress(data))
    assert [p.what for p in read_conversations(tmp_path / "packed.json.gz").problems] == [p.what for p in found]


@pytest.mark.parametrize(
    "data",
    [b"not gzip", gzip.compress(b"{}" * 99)[:-9], gzip.compress(b"{}" * 99)[:-8] + b"x" * 8],
    ids=["no gzip", "cut", "wrong sum"],
)
def test_a_damaged_gzip_file_is_named(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(data)
    [problem] = read_conversations(file).problems
    assert (problem.where, problem.sample) == (str(file), None)
    assert problem.what.startswith("cannot be unpacked: ")
    assert problem.what.endswith("; copy or compress it again")


def test_a_file_that_unpacks_beyond_all_measure_is_refused_and_a_repetitive_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella.conversations.reading.MIN_UNPACKED", 1000)
    good = write(tmp_path / "good.jsonl.gz", *(sample(str(i)) for i in range(1000)))
    assert len(ids(read_conversations(good))) == 1000
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * 2**22 + json.dumps(sample()).encode()))
    [problem] = read_conversations(bomb).problems
    assert problem.what.startswith("unpacks to more than 300 times its size, ")
    assert problem.sample is None


@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_sample_of_too_many_characters_or_turns_is_a_problem_of_its_own(tmp_path: Path, form: str) -> None:
    turn = {"role": "user", "content": "?"}
    long = sample("long", note="x" * 1_000_000)
    many = {"id": "many", "messages": [*[turn] * 10_000, {"role": "assistant", "content": "x"}]}
    file = write(tmp_path / "c.json", sample("a"), long, many, sample("b"), form=form)
    reading = read_conversations(file)
    assert [c.task_id for c in reading.conversations] == ["a", "b"]
    assert [re.sub(r"\d{7} char", "N char", p.what) for p in reading.problems] == [
        "has N characters, and a sample may have 1000000; shorten it, or split it into several",
        "has 10001 turns and items of turns, and a sample may have 10000; split it",
    ]
    assert len(reading.problems[0].sample) == 1000  # the quarantine file shall not grow by what is too long


def test_one_bad_file_does_not_hide_another(tmp_path: Path) -> None:
    bad = [tmp_path / "1.json", tmp_path / "2.json"]
    for file in bad:
        file.write_text("{")
    good = write(tmp_path / "3.json", sample())
    reading = read_conversations([*bad, good])
    assert [p.where for p in reading.problems] == [f"{file}:1" for file in bad]
    assert [c.task_id for c in reading.conversations] == ["t"]


def test_an_address_is_no_volume_in_any_format_and_may_be_mapped_to_where_it_is_mounted(tmp_path: Path) -> None:
    address = "s3://scans/a.nii"
    image = {"type": "image_sMRI", "image_path": address}
    v1 = {"id": "v1", "conversations": [{"role": "user", "content": [image]}, sample()["conversations"][1]]}
    llava = {"id": "llava", "image": address, "modality": "sMRI"}
    llava["conversations"] = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    file = write(tmp_path / "c.jsonl", sample("v2", address), v1, llava)
    what = f"image_path: '{address}' is not a file; download it and write the file's path"
    assert problems(file) == [f"c.jsonl:{line}: {what}" for line in (1, 2, 3)]
    assert ids(read_conversations(file, path_map={"s3://scans": str(tmp_path)})) == ["v2", "v1", "llava"]
    assert ids(read_conversations(write(tmp_path / "d.jsonl", sample(path=f"file://{tmp_path}/a.nii")))) == ["t"]


def test_one_fault_gives_one_line_in_every_format(tmp_path: Path) -> None:
    ask, answer = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}
    llava = {"id": "t", "image": "a.nii", "modality": "sMRI", "conversations": [ask, answer]}
    chat = {"id": "t", "images": ["a.nii"], "modalities": ["sMRI"]}
    v1 = {"id": "t", "conversations": [{"role": "user"}, sample()["conversations"][1]]}
    item = {"type": "image_sMRI", "image_path": 3}
    samples = {
        "conversations.0: must be an object {...}, not 'x'": llava | {"conversations": ["x", answer]},
        "conversations.0.value: is missing; add it": llava | {"conversations": [{"from": "human"}, answer]},
        "conversations: is empty; a sample needs a user turn and an assistant turn": llava | {"conversations": []},
        "image: must be a text, not 3": llava | {"image": 3},
        "image: names no file; write the file's path": llava | {"image": [{}]},
        "messages: must be a list, not null": chat | {"messages": None},
        "messages: is missing; add it": chat,
        "conversations: is missing; add it": {"id": "t", "metadata": {}},
        "conversations.0.content.0.image_path: must be a text, not 3": v1
        | {"conversations": [{"role": "user", "content": [item]}, v1["conversations"][1]]},
        "modality: must be a text, not 3": llava | {"modality": 3},
    }
    for number, (what, raw) in enumerate(samples.items()):
        assert problems(write(tmp_path / f"{number}.jsonl", raw)) == [f"{number}.jsonl:1: {what}"]


def test_a_llava_sample_without_an_image_may_say_so(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]
    assert ids(read_conversations(write(tmp_path / "c.jsonl", {"id": "t", "image": None, "conversations": talk}))) == [
        "t"
    ]


def test_every_problem_stays_on_its_line_and_is_short(tmp_path: Path) -> None:
    broken = "a\nb\u2028"
    samples = [
        sample(broken),
        sample("path", broken),
        sample("long", "x" * 5000),
        sample("key", **{broken: "\ud800"}),
        {broken: 1},
        sample("role", conversations=[{"role": "x" * 5000, "content": "x"}], images=[]),
    ]
    lines = problems(write(tmp_path / "c.jsonl", *samples))
    assert [line.split(": ")[0] for line in lines] == [f"c.jsonl:{n}" for n in range(1, 7)]
    assert all(line.isprintable() and len(line) < 600 for line in lines)


def test_a_path_of_ordinary_length_is_written_whole(tmp_path: Path) -> None:
    name = "/".join(["folder"] * 20)
    assert problems(write(tmp_path / "c.jsonl", sample(path=name))) == [
        f"c.jsonl:1: image_path: {tmp_path}/{name} does not exist; see `data.root` and `data.path_map`"
    ]


def test_a_number_of_thousands_of_digits_spoils_its_sample_only(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps([sample("a", n=17), sample("b")]).replace("17", "7" * 5000))
    reading = read_conversations(file)
    assert [c.task_id for c in reading.conversations] == ["b"]
    assert [p.what for p in reading.problems] == ["holds a number of 5000 digits; shorten the number"]


VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        1e300,
        10**400,
        float("nan"),
        "",
        " ",
        "a\nb",
        "\ud800",
        "\x00",
        "<image>" * 50,
    ),
    *(
        "x" * 10_000,
        "/" * 5000,
        "file:///D:/a.nii",
        "D:\\a.nii",
        "data:,",
        [],
        {},
        [[]],
        [{}],
        [None],
        {"a": {"b": []}},
    ),
    *([0, 1], ["a"] * 3000, {"role": "user", "content": "?"}, {"type": "image"}, {"type": "text", "text": 3}),
    json.loads("[" * 260 + "]" * 260),
]
KEYS = [
    *("loss", "weight", "train", "loss_mask", "system", "tools", "images", "image", "modality", "modalities", "role"),
    *("from", "content", "value", "id", "task_id", "metadata", "subject_ids", "subject_label", "target", "token"),
]


def holders(value: Any) -> list[Any]:
    """Every list and object within a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, (dict, list)) else []), *(held for one in inner for held in holders(one))]


def mutated(draw: random.Random, raw: Any) -> bytes:
    """The sample with some of its values replaced, removed, repeated or added, and some of its bytes changed."""
    raw = copy.deepcopy(raw)
    for _ in range(draw.randrange(4)):
        held, value = draw.choice(holders(raw)), copy.deepcopy(draw.choice(VALUES))
        where = draw.choice([*(held if isinstance(held, dict) else range(len(held))), draw.choice(KEYS)])
        if isinstance(held, list):
            i = where if isinstance(where, int) else len(held)
            held[i : i + draw.randrange(2)] = draw.choice([[value], [], held[i : i + 1] * draw.choice([2, 50])])
        elif draw.random() < 0.2:
            held.pop(where, None)
        else:
            held[where] = value
    data = bytearray(json.dumps(raw, indent=draw.choice([None, 1])).encode())
    for _ in range(draw.choice([0, 0, 1, 5])):
        i = draw.randrange(len(data) + 1)
        inserted = [
            b"[" * 5000,
            b'"a":1,',
            b"9" * 5000,
            b"\xff",
            b"\n",
            b"{}",
            b",",
            b'"',
            b"\\",
            draw.randbytes(3),
            b"",
        ]
        data[i : i + draw.choice([0, 1, 2, 50])] = draw.choice(inserted)
    return bytes(data)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_in_a_file_it_is_read_or_told_what_is_wrong_with_it(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    talk = [{"role": "user", "content": "<image>Sex?"}, {"role": "assistant", "content": "male."}]
    llava = {"image": ["a.nii"], "modality": "sMRI", "metadata": {"subject_label": "male", "target": "sex"}}
    llava["conversations"] = [{"from": "human", "value": "<image>\nSex?"}, {"from": "gpt", "value": "male."}]
    item = {"type": "image_sMRI", "image_path": "a.nii"}
    v1 = {"id": "v1", "conversations": [{"role": "user", "content": [item]}, talk[1]], "metadata": {"subject_sex": "m"}}
    samples = [
        sample(),
        llava | {"id": "l"},
        v1,
        {"id": "c", "images": ["a.nii"], "modality": "sMRI", "messages": talk},
    ]
    renderer = Renderer(byte_tokenizer(), {"sMRI": Modality(grid=(4, 4, 4), patch=(2, 4, 4))})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = Counter[bool]()
    for number in range(60):
        lines = b"\n".join(mutated(draw, draw.choice(samples)) for _ in range(draw.choice([1, 1, 3])))
        data = draw.choice([lines, b"[" + lines + b"]", lines[: draw.randrange(len(lines))]])
        packed = draw.random() < 0.2
        file = tmp_path / f"{number}.{draw.choice(['json', 'jsonl'])}{'.gz' if packed else ''}"
        if packed:
            data = gzip.compress(data)[: draw.choice([None, None, -3, 20])]
        file.write_bytes(data)
        reading = read_conversations(
            file,
            None,
            {"D:/": "."},
            modalities=["sMRI"],
            **{draw.choice(["allow_unanswered", "allow_blank_answers"]): True},
        )
        assert reading.conversations or reading.problems
        assert all(line.isprintable() and len(line) < 2000 for line in map(str, reading.problems))
        assert all(note.isprintable() and len(note) < 2000 for note in reading.notices)
        outcomes[False] += len(reading.problems)
        raw_splits = RawSplits()
        raw_splits.add("train", reading)
        assert len(raw_splits.problem_lines()) <= len(reading.problems)
        for conversation in reading.conversations:
            with suppress(UserError):
                example = renderer.render(conversation)
                assert len(loss_weights(example, MaskPolicy())) == len(example.input_ids)
            outcomes[True] += 1
    assert outcomes[True] > 0 < outcomes[False]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
