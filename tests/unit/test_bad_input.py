"""Invalid data and settings: prepare.py prints one line with place and remedy, and ends with status 2.

In an expected line, ``...`` stands for any text, and the folder of the data is left out. Messages about samples and
conversation files are in test_conversation.py and test_conversation_files.py.
"""

import gzip
import json
import logging
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import Done
from tests.unit.samples import BRAIN, SERIES, changed, nii, sample, write_data, write_lines
from umbrella.commands import prepare

SMALL = [
    "modalities.sMRI={grid: [4, 4, 4], patch: [2, 4, 4]}",
    "modalities.fMRI={grid: [4, 4, 4, 6], patch: [4, 4, 4, 2]}",
    "data.processes=1",
]
Change = Callable[[Path], Any]
Run = Callable[..., Done]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> Run:
    """Runs prepare.py on the valid data after one change, with more words."""
    folder = tmp_path / "data"
    write_data(folder)

    def call(change: Change, *words: str) -> Done:
        change(folder)
        data = [f"data.{split}=DATA/{split}.jsonl" for split in ("train", "validation")]
        given = [word.replace("DATA", str(folder)) for word in (*SMALL, *data, *words)]
        recwarn.clear()
        status = 0
        try:
            prepare.run([f"resources.storage={tmp_path}/runs", *given])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        # pytest catches both before they reach stderr.
        err += "".join(f"{record.getMessage()}\n" for record in caplog.records if record.levelno >= logging.WARNING)
        err += "".join(f"{w.message}\n" for w in recwarn if issubclass(w.category, RuntimeWarning))
        return Done(status, out, err.replace(f"{folder}/", ""))

    return call


def nothing(folder: Path) -> None:
    """The data are valid."""


def file(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def packed(voxels: np.ndarray) -> Change:
    """Another series."""
    return file("d.nii.gz", gzip.compress(nii(voxels)))


def header(place: int, form: str, *values: float) -> Change:
    """b.nii with other values at a byte of its header: 40 dim, 70 datatype, 112 slope, 252 qform_code and
    sform_code, 284 the affine's first shear, 296 its second row."""
    content = bytearray(nii(BRAIN))
    struct.pack_into("<" + form, content, place, *values)
    return file("b.nii", bytes(content))


def leak(folder: Path) -> None:
    series = changed(sample("d", "d.nii.gz", "fMRI"), {"metadata.subject_id": "a"})
    write_lines(folder / "validation.jsonl", sample("c", "c.nii"), series)


def gone(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def half_of_a_pair(folder: Path) -> None:
    nib.save(nib.Nifti1Pair(BRAIN, np.eye(4)), folder / "b.hdr")
    (folder / "b.img").unlink()
    write_lines(folder / "train.jsonl", sample("a", "a.nii"), sample("b", "b.hdr"))


def constant(value: float, count: int) -> np.ndarray:
    """The brain with this value in the first voxels."""
    voxels = BRAIN.copy()
    voxels.flat[:count] = value
    return voxels


B, D = "train.jsonl:2: ", "validation.jsonl:2: "
B_NII, D_NII = f"{B}image_path: b.nii: ", f"{D}image_path: d.nii.gz: "
UNREADABLE = "cannot be read as an image: ...; copy or convert the file anew"
PACKED = gzip.compress(nii(SERIES))
RESCALE = ", too large or too small to compute with; rescale the file"
NO_AXES = "its affine does not say where the axes point; write a proper one into the header"
QUARANTINE = ("data.on_bad=quarantine", "data.max_bad_fraction=1")

VOLUMES: list[tuple[Any, ...]] = [
    (gone("b.nii"), f"{B}image_path: b.nii does not exist; see `data.root` and `data.path_map`"),
    (half_of_a_pair, f"{B}image_path: b.hdr: b.img: No such file or directory; see data.root and data.path_map"),
    (file("b.nii", "Hello"), B_NII + UNREADABLE),
    (file("b.nii", nii(BRAIN)[:400]), B_NII + UNREADABLE),
    (file("d.nii.gz", PACKED[:-20]), D_NII + UNREADABLE),
    (file("d.nii.gz", gzip.compress(nii(SERIES)[:500])), D_NII + UNREADABLE),
    (file("d.nii.gz", PACKED[:-8] + bytes(4) + PACKED[-4:]), D_NII + UNREADABLE),
    (header(70, "h", 9999), B_NII + UNREADABLE),
    (
        packed(BRAIN),
        f"{D_NII}has 3 axes (5, 4, 4), one volume, and its modality is a series; correct the modality or the file",
    ),
    (
        file("b.nii", nii(SERIES)),
        f"{B_NII}has 4 axes (4, 4, 4, 8), a series, and its modality has single volumes; correct ...",
    ),
    (
        file("b.nii", nii(SERIES.reshape(4, 4, 4, 4, 2))),
        f"{B_NII}has 5 axes (4, 4, 4, 4, 2), neither a volume nor a series; correct the modality or the file",
    ),
    (
        packed(SERIES[..., :5]),
        f"{D_NII}has 5 frames, and a window of 6 frames at frame_stride 1 needs 6; give its modality a ...",
    ),
    (file("b.nii", nii(constant(np.nan, 1))), f"{B_NII}holds 1 voxels that are NaN or infinite; mask or ..."),
    (file("b.nii", nii(constant(np.inf, 3))), f"{B_NII}holds 3 voxels that are NaN or infinite; mask or ..."),
    (file("b.nii", nii(BRAIN.astype(np.float64) * 1e300)), f"{B_NII}its values are up to inf{RESCALE}"),
    (header(112, "f", 3e38), f"{B_NII}its values are up to 2.274e+40{RESCALE}"),
    (header(112, "f", 1e-40), f"{B_NII}its values are up to 7.57996e-39{RESCALE}"),
    (file("b.nii", nii(constant(7, 80))), f"{B_NII}every voxel is 7; there is nothing to see, leave it out"),
    (
        file("b.nii", nii(BRAIN.astype(np.complex64))),
        f"{B_NII}holds complex64 voxels, and a volume has one real number per voxel; convert the file",
    ),
    (
        file("b.nii", nii(np.zeros((5, 4, 4), [(colour, "u1") for colour in "RGB"]))),
        f"{B_NII}is a colour image, and a volume has one number per voxel; convert it to grey values",
    ),
    (
        header(40, "4h", 3, 30000, 30000, 30000),
        f"{B_NII}the header claims (30000, 30000, 30000) voxels, more than data.max_voxels=2147483648; raise ...",
    ),
    (
        header(40, "4h", 3, 0, 4, 4),
        f"{B_NII}the header claims (0, 4, 4) voxels, which is none; the file is damaged",
    ),
    (header(296, "4f", 0, 0, 0, 0), B_NII + NO_AXES),
    (header(284, "f", 1e38), B_NII + NO_AXES),
]
SPLITS: list[tuple[Any, ...]] = [
    (file("train.jsonl", '{"a": 1}\n{"a'), f"train.jsonl:1: sample: ...\n{B}not JSON: ..., column 2; ..."),
    (nothing, "no.jsonl: no such file or folder; check the path", "data.train=DATA/no.jsonl"),
    (
        leak,
        f"{D}subject_id: a is also in data.train, at train.jsonl:1; split by subject, or the score means nothing",
    ),
    (
        nothing,
        "data.validation is not set: name the conversations that choose the best trial",
        "data.validation=",
    ),
    (
        file("more.jsonl", ""),
        "more.jsonl: is empty; write a conversation into it or leave it out",
        *("data.train=[DATA/train.jsonl, DATA/more.jsonl]", *QUARANTINE),
    ),
    (
        gone("a.nii", "b.nii"),
        "train.jsonl:1: image_path: 2 files below ... do not exist, first a.nii, b.nii; data.path_map={...: ...}...\n"
        "data.train: holds no conversation that can be used",
        *QUARANTINE,
    ),
]
SETTINGS: list[tuple[Any, ...]] = [
    (
        nothing,
        "data.format='sharegpt': ... 'auto', 'v2', 'v1', 'llava' or 'chat'",
        "data.format=sharegpt",
    ),
    (nothing, "data.task_filter='a(b': not a regular expression: missing ), ...", "data.task_filter=a(b"),
    (
        nothing,
        "modalities.PET.patch: is missing; give it with the rest of its section",
        "modalities.PET.grid=[4, 4, 4]",
    ),
]


def test_valid_data_give_no_message(run: Run) -> None:
    done = run(nothing)
    assert (done.status, done.stderr) == (0, "")
    assert "samples:        train 2, validation 2" in done.stdout


@pytest.mark.parametrize("case", [*VOLUMES, *SPLITS, *SETTINGS], ids=lambda case: case[1][:70])
def test_invalid_input_ends_in_one_clear_line_and_status_2(run: Run, case: tuple[Any, ...]) -> None:
    change, expected, *words = case
    done = run(change, *words)
    pattern = re.escape(f"error: {expected}\n").replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, done.stderr), done.stderr
    assert done.status == 2


def test_quarantine_lists_every_bad_sample_with_its_reasons_and_keeps_the_good_ones(run: Run, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        (folder / "text.nii").write_text("no image")
        packed(SERIES[..., :5])(folder)  # of the last validation sample
        long = changed(sample("h"), {"conversations.0.content.1.text": "Sex?" * 100})
        missing = changed(sample("g", "nowhere.nii"), {"metadata.target": 3})
        written = [sample("e", "text.nii"), sample("f", "nowhere.nii"), sample("a", "a.nii"), missing, long]
        with (folder / "train.jsonl").open("a") as stream:
            stream.write("\n{not JSON\n" + "\n".join(map(json.dumps, written)))

    words = "data.max_tokens=200", "tune.metric=eval/loss"
    done = run(spoil, *QUARANTINE, *words)
    assert (done.status, done.stderr) == (0, "")
    assert "samples:        train 2, validation 1" in done.stdout
    [quarantine] = (tmp_path / "runs").glob("quarantine-*.jsonl")
    assert f"7 samples, see {quarantine}" in done.stdout
    entries = [json.loads(line) for line in quarantine.read_text().replace(f"{tmp_path}/data/", "").splitlines()]
    reasons = {entry["where"]: [reason.split(";")[0] for reason in entry["reasons"]] for entry in entries}
    unreadable = "cannot be read as an image: ValueError: it is in no format that nibabel knows"
    assert reasons == {
        "train.jsonl:3": ["not JSON: Expecting property name enclosed in double quotes, column 2"],
        "train.jsonl:4": [f"image_path: text.nii: {unreadable}"],
        "train.jsonl:5": ["image_path: nowhere.nii does not exist"],
        "train.jsonl:6": ["sample: is the same as the one at train.jsonl:1"],
        "train.jsonl:7": ["metadata.target: must be a text, not 3", "image_path: nowhere.nii does not exist"],
        "train.jsonl:8": ["conversations: becomes 418 tokens, more than data.max_tokens=200"],
        "validation.jsonl:2": [
            "image_path: d.nii.gz: has 5 frames, and a window of 6 frames at frame_stride 1 needs 6",
        ],
    }
    assert all(entry["sample"] for entry in entries)


def test_an_assumed_orientation_is_a_note_and_a_flag_also_when_the_volume_is_in_the_store(
    run: Run, tmp_path: Path
) -> None:
    assumed = "orientation assumed: qform_code and sform_code are 0 in the header"
    for change in (header(252, "2h", 0, 0), nothing):
        done = run(change)
        assert (done.status, done.stderr) == (0, f"note: 1 volume, first b.nii: {assumed}\n")
        table = (tmp_path / "runs/report/volumes.csv").read_text()
        assert "b.nii,sMRI,1,train,b,5; 4; 4,1.0; 1.0; 1.0,LAS" in table
        assert assumed in table
        assert f'<span class="flag">{assumed}</span>' in (tmp_path / "runs/report/index.html").read_text()
