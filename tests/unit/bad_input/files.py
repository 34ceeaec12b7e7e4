"""Conversation files that cannot be read, or are not there."""

import json

from tests.unit.bad_input.dataset import HALF, TEXT, B, case, file, line, nothing, pack, put

EXTENSIONS = "name files that end with .json, .json.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz"
GZ = "data.train=DATA/train.jsonl.gz"
RUBBISH = pack(b'{"a": 1}')

FILES = [
    case("a line is not JSON", line("{'task_id': 1}"), f"{B}not JSON: ..., column 2; correct the text there"),
    case("a line is cut short", line('{"task_id": "b'), f"{B}not JSON: ..., column 13; correct the text there"),
    case("two objects on a line", line("{}{}"), f"{B}not JSON: more text ..., column 3; write one object per line"),
    case("NaN in JSON", put("metadata.subject_label", float("nan")), f"{B}holds NaN, ...; write null or a number"),
    case(
        "a number of thousands of digits",
        line('{"n": ' + "7" * 5000 + "}"),
        f"{B}holds a number of 5000 digits; shorten the number",
    ),
    case("nested too deep", line('{"a": ' + "[" * 99_999), f"{B}is nested too deep to be read; flatten it"),
    case("metadata too deep", put("metadata.x", json.loads("[" * 300 + "]" * 300)), f"{B}sample: ... deep; flatten it"),
    case("half a character", put(TEXT, "\ud800"), f"{B}{TEXT}: {HALF}"),
    case("half a character in a name", put("metadata.subject_id", "\ud800"), f"{B}metadata.subject_id: {HALF}"),
    case(
        "a list is not closed",
        file("train.jsonl", "[{}, {"),
        "train.jsonl: not JSON: the list is not closed, so the file is probably cut short; copy it again",
    ),
    case("a file is empty", file("train.jsonl", "\n"), "train.jsonl: is empty; write a conversation into it or ..."),
    case("an empty list", file("train.jsonl", "[]"), "train.jsonl: holds no conversation; name files that have some"),
    case("not UTF-8", file("train.jsonl", b"\xff\xfe{}"), "train.jsonl: is not UTF-8 text: ...; save it as UTF-8"),
    case(
        "gzip cut short",
        file("train.jsonl.gz", RUBBISH[:-9]),
        "train.jsonl.gz: cannot be unpacked: ...; copy or compress it again",
        GZ,
    ),
    case(
        "gzip with a wrong checksum",
        file("train.jsonl.gz", RUBBISH[:-8] + bytes(8)),
        "train.jsonl.gz: cannot be unpacked: CRC check failed...; copy or compress it again",
        GZ,
    ),
    case(
        "not gzip",
        file("train.jsonl.gz", "{}"),
        "train.jsonl.gz: cannot be unpacked: Not a gzipped file ...; copy or compress it again",
        GZ,
    ),
    case("no such file", nothing, "no.jsonl: no such file or folder; check the path", "data.train=DATA/no.jsonl"),
    case(
        "a folder without files",
        lambda folder: (folder / "empty").mkdir(),
        f"empty: no conversation file in this folder; {EXTENSIONS}",
        "data.validation=DATA/empty",
    ),
    case(
        "a pattern without files",
        nothing,
        f"x*.jsonl: no conversation file fits this pattern; {EXTENSIONS}",
        "data.test=DATA/x*.jsonl",
    ),
    case(
        "a wrong extension",
        file("train.csv", "a,b"),
        f"train.csv: not a conversation file; {EXTENSIONS}",
        "data.train=DATA/train.csv",
    ),
]
