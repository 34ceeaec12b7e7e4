"""Conversation files become conversations, or problems that name file, line, field and remedy."""

import copy
import gzip
import json
import random
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import byte_tokenizer
from tests.unit.samples import sample, write_lines
from umbrella.base import UserError
from umbrella.conversations.reading import Problem, Reading, conversation_files, read_conversations
from umbrella.data.masking import loss_weights
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import Splits
from umbrella.modality import Modality

TALK = [{"role": "user", "content": "<image>Sex?"}, {"role": "assistant", "content": "male."}]
LLAVA = {
    "id": "l",
    "image": ["a.nii"],
    "modality": "sMRI",
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
}


@pytest.fixture(autouse=True)
def volume(tmp_path: Path) -> None:
    """A file beside the conversations, whose existence is checked."""
    (tmp_path / "a.nii").touch()


def ids(reading: Reading) -> list[str]:
    assert reading.problems == []
    return [c.task_id for c in reading.conversations]


def problems(path: Path, **options: Any) -> list[str]:
    """The problem lines, without the folder of the file."""
    return [str(p).replace(f"{path.parent}/", "") for p in read_conversations(path, **options).problems]


def test_objects_lists_lines_and_folders_are_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "1.json").write_text(json.dumps(sample("one"), indent=1))
    (folder / "2.json").write_text("\ufeff" + json.dumps([sample("two"), sample("three")], indent=1), encoding="utf-8")
    write_lines(folder / "deeper/3.jsonl", sample("four"), sample("five"))
    (folder / "deeper/4.ndjson.gz").write_bytes(gzip.compress(json.dumps(sample("six")).encode()))
    (folder / "deeper/5.JSON.gz").write_bytes(gzip.compress(json.dumps([sample("seven")]).encode()))
    (folder / "deeper/6.jsonl").write_text("\n".join(json.dumps(sample(name), indent=1) for name in ("eight", "nine")))
    (folder / "notes.txt").write_text("not a conversation")
    write_lines(folder / ".hidden/1.json", sample("ten"))
    reading = read_conversations(folder, root=tmp_path)
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert ids(reading) == [f"{name}/sex" for name in names]
    assert reading.locations["five/sex"] == f"{folder}/deeper/3.jsonl:2"


def test_files_folders_and_patterns_mix_and_each_file_counts_once(tmp_path: Path) -> None:
    names = ["a/1.json", "a/b/2.jsonl", "a/b/c/3.ndjson.gz", "d/4.jsonl.gz", "d/[5].json", "e.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "e.json")
    (tmp_path / "a/b/volume.nii.gz").touch()

    def found(*paths: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in conversation_files([tmp_path / path for path in paths])]

    assert found("d", "a/b", "d/4.jsonl.gz") == ["a/b/2.jsonl", "a/b/c/3.ndjson.gz", "d/4.jsonl.gz", "d/[5].json"]
    assert found("a/*") == ["a/1.json"]
    assert found("a/**") == found("a") == ["a/1.json", "a/b/2.jsonl", "a/b/c/3.ndjson.gz"]
    assert found("*/[45]*", "d/[5].json") == ["d/4.jsonl.gz", "d/[5].json"]
    assert found("e.json", "link.json", "a/../e.json") == ["e.json"]
    assert conversation_files(str(tmp_path / "e.json")) == [tmp_path / "e.json"]


def test_paths_that_give_no_file_are_all_listed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = write_lines(tmp_path / "good.json", sample())
    with pytest.raises(UserError) as caught:
        read_conversations([good, tmp_path / "no.json", tmp_path / "empty", f"{tmp_path}/*.jsonl", tmp_path / "a.nii"])
    remedy = "; name files that end with .json, .json.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz"
    assert str(caught.value).replace(remedy, "").split("\n") == [
        f"{tmp_path}/no.json: no such file or folder; check the path",
        f"{tmp_path}/empty: no conversation file in this folder",
        f"{tmp_path}/*.jsonl: no conversation file fits this pattern",
        f"{tmp_path}/a.nii: not a conversation file",
    ]
    with pytest.raises(UserError, match=r"^no conversation file is named; name at least one$"):
        conversation_files([])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/a.nii", "/scans/a.nii"),
        ("/data/old/x/a.nii", "/archive/x/a.nii"),  # the longest prefix
        ("/database/a.nii", "/database/a.nii"),  # whole names only
        ("/data", "/scans"),
        ("moved/a.nii", "/root/here/a.nii"),  # before the root
        ("/gone/a.nii", "/root/a.nii"),
        ("/x/data/a.nii", "/x/data/a.nii"),  # at the beginning only
        ("b.nii", "/root/b.nii"),
        ("s3://bucket/a.nii", "/mnt/a.nii"),
        ("file:///data/a.nii", "/scans/a.nii"),
    ],
)
def test_path_map_replaces_prefixes(tmp_path: Path, path: str, expected: str) -> None:
    file = write_lines(tmp_path / "c.jsonl", sample(path=path))
    path_map = {"/data/": "/scans", "/data/old": "/archive/", "moved": "here", "/gone": "", "s3://bucket": "/mnt"}
    for root in ("/root", None):  # without a root, relative paths start from the folder of the file
        [conversation] = read_conversations(file, root, path_map, check_files=False).conversations
        assert conversation.volumes[0].image_path == expected.replace("/root", root or str(tmp_path))


@pytest.mark.parametrize("path", [r"D:\scans\a.nii", "D:/scans/a.nii", "file:///D:/scans/a.nii", r"\\pc\scans\a.nii"])
@pytest.mark.parametrize("slash", ["\\", "/"])
def test_windows_paths_are_mapped_with_either_slash(tmp_path: Path, path: str, slash: str) -> None:
    file = write_lines(tmp_path / "c.jsonl", sample(path=path), sample("u", r"rel\a.nii"))
    path_map = {key.replace("/", slash): str(tmp_path) for key in ("D:/scans", "//pc/scans", "rel")}
    found = {c.volumes[0].image_path for c in read_conversations(file, path_map=path_map).conversations}
    assert found == {f"{tmp_path}/a.nii"}
    assert f"image_path: {path.removeprefix('file:///')} does not exist; see" in problems(file)[0]


def test_formats_mix_in_one_file_unless_one_is_given(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "c.jsonl", sample(), LLAVA)
    assert ids(read_conversations(file)) == ["t/sex", "l"]
    assert {p.split(": ")[0] for p in problems(file, format="v2")} == {"c.jsonl:2"}


def test_line_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    bad = sample("bad", images=[])
    file = tmp_path / "c.jsonl"
    # U+2028 in a text does not end a line.
    first = json.dumps(sample(metadata={"note": "a\u2028b"}), ensure_ascii=False)
    file.write_text(f"{first}\r\n\n\n{json.dumps(bad)}\n", encoding="utf-8")
    assert [p.split(": ")[0] for p in problems(file)] == ["c.jsonl:4"]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([sample(), bad], indent=1))
    second = [i for i, line in enumerate(listed.read_text().split("\n"), 1) if line == " {"][1]
    assert [p.split(": ")[0] for p in problems(listed)] == [f"list.json:{second}"]
    listed.write_text(json.dumps([bad, sample("b"), sample("c", images=[])]))
    assert [p.split(": ")[0] for p in problems(listed)] == ["list.json:1", "list.json:1 (sample 3)"]


def test_problems_of_files_name_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    long = "/".join(["folder"] * 20)
    scan = {"type": "image", "modality": "sMRI", "image_path": "gone.nii"}
    twice = sample(images=[{"path": "gone.nii"}] * 2)
    twice["conversations"][0]["content"] = [scan, scan]
    paths = ["folder.nii", long, "https://b.org/b.nii", "b\n.nii", ""]
    file = write_lines(tmp_path / "c.jsonl", *(sample(path=path) for path in paths), twice)
    assert problems(file) == [
        "c.jsonl:1: image_path: folder.nii is a folder; name the image file",
        f"c.jsonl:2: image_path: {long} does not exist; see `data.root` and `data.path_map`",
        "c.jsonl:3: image_path: 'https://b.org/b.nii' is not a file; download it and write the file's path",
        "c.jsonl:4: image_path: 'b\\n.nii' does not exist; see `data.root` and `data.path_map`",
        "c.jsonl:5: image_path: is empty; write the file's path",
        "c.jsonl:6: image_path: gone.nii does not exist; see `data.root` and `data.path_map`",
    ]
    assert len(read_conversations(file, check_files=False).problems) == 2


def test_all_problems_of_a_file_are_listed_with_their_samples(tmp_path: Path) -> None:
    samples = [sample("good"), sample("x", task_type=1, metadata=3), LLAVA | {"image": "gone.nii"}, [1, 2]]
    file = write_lines(tmp_path / "c.jsonl", *samples)
    reading = read_conversations(file)
    assert [(p.where, p.field, p.sample) for p in reading.problems] == [
        (f"{file}:2", "task_type", samples[1]),
        (f"{file}:2", "metadata", samples[1]),
        (f"{file}:3", "image_path", samples[2]),
        (f"{file}:4", "sample", samples[3]),
    ]
    assert [c.task_id for c in reading.conversations] == ["good/sex"]


def test_samples_with_one_task_id_are_numbered_in_the_order_of_the_files(tmp_path: Path) -> None:
    x, y = sample("x"), sample("y")
    second = sample(task_id="y/sex#2")
    first = write_lines(tmp_path / "1.jsonl", x, y | {"note": 1}, second, y | {"note": 2})
    other = write_lines(tmp_path / "2.jsonl", y | {"note": 3}, second | {"note": 4}, sample("z"))
    reading = read_conversations([first, other])
    assert [(c.task_id, c.model_dump().get("note")) for c in reading.conversations] == [
        *[("x/sex", None), ("y/sex", 1), ("y/sex#2", None), ("y/sex#3", 2)],
        *[("y/sex#4", 3), ("y/sex#2#2", 4), ("z/sex", None)],
    ]
    assert reading.problems == []
    what = "the task_id is used before with other content; such samples are numbered: id, id#2, ... (3 samples)"
    assert reading.notices == [f"{first}:4: {what}"]
    assert reading.locations["y/sex#4"] == f"{other}:1"


def test_a_repeated_sample_is_a_problem_that_names_the_first_place(tmp_path: Path) -> None:
    samples = [sample("x"), sample("y", note=1), sample("y", note=2)]
    first = write_lines(tmp_path / "1.jsonl", *samples, samples[1])
    second = write_lines(tmp_path / "2.jsonl", dict(reversed(samples[2].items())), sample("z"))
    reading = read_conversations([first, second])
    assert [c.task_id for c in reading.conversations] == ["x/sex", "y/sex", "y/sex#2", "z/sex"]
    other = f"is the same as the one at {first}:3; the same samples are in two files; name one"
    assert reading.problems == [
        Problem(f"{first}:4", "sample", f"is the same as the one at {first}:2; leave one out", samples[1]),
        Problem(f"{second}:1", "sample", other, samples[2]),
    ]


def test_unusual_keys_and_turns_are_noted_once_with_their_number(tmp_path: Path) -> None:
    user, answer = sample()["conversations"]
    called = [user, answer | {"tool_calls": [{"name": "x"}], "reasoning_content": "large"}]
    file = write_lines(
        tmp_path / "c.jsonl",
        sample("a", tools="[{}]", conversations=called),
        sample("b", tools=[], conversations=called),
        sample("c", metadata={"subject_lable": "male", "subject_id": "s", "subject_age": 4}),
        sample("d", metadata={}, Subject_Label="male"),
        sample("e", subject_labels=["male"]),  # has its label
        sample("f", conversations=[user, answer, answer]),
        sample("g", conversations=[user, {"role": "user", "content": "?"}, answer]),
    )
    unseen = "is kept, but the model does not see it; write what it should see into the turns"
    unread = "is not read as the label; write it as `metadata.subject_label`"
    reading = read_conversations(file)
    assert len(ids(reading)) == 7
    assert reading.notices == [
        f"{file}:1: `reasoning_content` {unseen} (2 samples)",
        f"{file}:1: `tool_calls` {unseen} (2 samples)",
        f"{file}:1: `tools` {unseen} (1 sample)",
        f"{file}:3: `subject_lable` {unread} (1 sample)",
        f"{file}:4: `Subject_Label` {unread} (1 sample)",
        f"{file}:6: two user or two assistant turns in a row (2 samples)",
    ]


GOOD = json.dumps(sample())
UNREADABLE = {
    "{'a': 1}": "not JSON: Expecting property name enclosed in double quotes, column 2; correct the text there",
    '{"task_id": "b': "not JSON: Unterminated string starting at, column 13; correct the text there",
    f"{GOOD}]": f"not JSON: Expecting value, column {len(GOOD) + 1}; correct the text there",
    GOOD.replace('"male"', "NaN"): "metadata.subject_label: must be a text or a finite number, not nan",
    '{"a": {"b": 1, "b": 2}}': "holds the key 'b' twice in one object; keep one of them",
    '{"n": ' + "7" * 5000 + "}": "holds a number of too many digits; shorten it",
    '{"a": ' + "[" * 99_999: "is nested too deep to be read; flatten it",
    GOOD[:-1] + ', "x": ' + "[" * 300 + "]" * 300 + "}": "sample: is nested too deep; flatten it",
    GOOD.replace("Sex?", "\\ud800"): "half of a character is missing; write it anew",
    GOOD[:-1] + ', "a\\nb\\u2028": "\\ud800"}': "half of a character is missing; write it anew",
}


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.ndjson.gz"])
@pytest.mark.parametrize("line", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_bad_line_is_left_out_and_the_next_one_read(tmp_path: Path, name: str, line: str) -> None:
    data = "\r\n".join([json.dumps(sample("1")), line, json.dumps(sample("2"))]).encode()
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    reading = read_conversations(file)
    assert [c.task_id for c in reading.conversations if c.task_id != "t/sex"] == ["1/sex", "2/sex"]
    [problem] = reading.problems
    assert str(problem).startswith(f"{file}:2")
    assert str(problem).endswith(UNREADABLE[line])
    assert str(problem).isprintable()
    assert problem.sample is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1\n "b"}', ":2: not JSON: Expecting ',' delimiter, column 2; correct the text there"),
        (b"[{},\n{},", ": not JSON: the list is not closed, so the file is probably cut short; copy it again"),
        (b"[{},\n{]", ":2: not JSON: Expecting property name enclosed in double quotes, column 2; correct the text"),
        (b'["\xff"]', ": is not UTF-8 text: invalid start byte at byte 2; save it as UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]", ":1: is nested too deep to be read; flatten it"),
        (b" \n", ": is empty; write a conversation into it or leave it out"),
        (b"[]", ": holds no conversation; name files that have some"),
    ],
    ids=["syntax", "unclosed", "syntax in a list", "not UTF-8", "deep", "empty", "nothing"],
)
def test_a_damaged_file_is_in_doubt_as_a_whole(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(data)
    good = write_lines(tmp_path / "good.json", sample())
    found = read_conversations(file).problems
    assert str(found[-1]).startswith(f"{file}{message}")
    assert found[-1].sample is None
    assert len(read_conversations([file, good]).conversations) == 1


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
    assert problem.message.startswith("cannot be unpacked: ")
    assert problem.message.endswith("; copy or compress it again")


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 1e300, 10**400, float("nan"), "", " ", "a\nb", "\ud800", "\x00"),
    *("<image>" * 50, "x" * 10_000, "/" * 5000, "file:///D:/a.nii", "D:\\a.nii", "data:,"),
    *([], {}, [[]], [{}], [None], {"a": {"b": []}}, [0, 1], ["a"] * 3000),
    *({"role": "user", "content": "?"}, {"type": "image"}, {"type": "text", "text": 3}),
    json.loads("[" * 260 + "]" * 260),
]
KEYS = [
    *("loss", "weight", "train", "loss_mask", "system", "tools", "images", "image", "modality", "modalities", "role"),
    *("from", "content", "value", "id", "task_id", "metadata", "subject_ids", "subject_label", "target", "token"),
]
BYTES = [b"[" * 5000, b'"a":1,', b"9" * 5000, b"\xff", b"\n", b"{}", b",", b'"', b"\\", b"\x00", b""]


def containers(value: Any) -> list[Any]:
    """Every list and object within a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, (dict, list)) else []), *(held for one in inner for held in containers(one))]


def mutated(draw: random.Random, raw: Any) -> bytes:
    """The sample with some of its values replaced, removed, repeated or added, and some of its bytes changed."""
    raw = copy.deepcopy(raw)
    for _ in range(draw.randrange(4)):
        held, value = draw.choice(containers(raw)), copy.deepcopy(draw.choice(VALUES))
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
        data[i : i + draw.choice([0, 1, 2, 50])] = draw.choice(BYTES)
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_any_file_gives_conversations_that_can_be_rendered_or_problems(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    item = {"type": "image_sMRI", "image_path": "a.nii"}
    v1 = {"id": "v1", "conversations": [{"role": "user", "content": [item]}, TALK[1]], "metadata": {"subject_sex": "m"}}
    samples = [sample(), LLAVA, v1, {"id": "c", "images": ["a.nii"], "modality": "sMRI", "messages": TALK}]
    renderer = Renderer(byte_tokenizer(), {"sMRI": Modality(grid=(4, 4, 4), patch=(2, 4, 4))})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = refused = 0
    for number in range(60):
        lines = b"\n".join(mutated(draw, draw.choice(samples)) for _ in range(draw.choice([1, 1, 3])))
        data = draw.choice([lines, b"[" + lines + b"]", lines[: draw.randrange(len(lines))]])
        packed = draw.random() < 0.2
        file = tmp_path / f"{number}.{draw.choice(['json', 'jsonl'])}{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(data)[: draw.choice([None, None, -3, 20])] if packed else data)
        option = draw.choice(["allow_unanswered", "allow_blank_answers"])
        reading = read_conversations(file, None, {"D:/": "."}, modalities=["sMRI"], **{option: True})
        assert reading.conversations or reading.problems
        lines_of_text = [*map(str, reading.problems), *reading.notices]
        assert all(line.isprintable() and len(line) < 2000 for line in lines_of_text)
        assert len(Splits(problems=reading.problems).problem_lines()) <= len(reading.problems)
        refused += len(reading.problems)
        used += len(reading.conversations)
        for conversation in reading.conversations:
            with suppress(UserError):
                example = renderer.render(conversation)
                assert len(loss_weights(example, MaskPolicy())) == len(example.input_ids)
    assert used > 0 < refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
