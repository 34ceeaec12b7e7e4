"""Whatever is wrong with the data: prepare.py says it in a line that names the place and the remedy, with status 2."""

import json
import logging
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Done
from tests.unit.bad_input.dataset import BRAIN, SERIES, Break, header, nii, packed, sample, write_good
from tests.unit.bad_input.files import FILES
from tests.unit.bad_input.samples import SAMPLES
from tests.unit.bad_input.splits import SETTINGS, SPLITS
from tests.unit.bad_input.volumes import VOLUMES
from umbrella.cli import run_script

PREPARE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "experiments/prepare.py"))
SMALL = [
    "modalities.sMRI={grid: [4, 4, 4], patch: [2, 4, 4]}",
    "modalities.fMRI={grid: [4, 4, 4, 6], patch: [4, 4, 4, 2]}",
    "data.processes=1",
]


Run = Callable[..., Done]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> Run:
    """Runs prepare.py on the good data, which are broken in one way, with more words."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_good(folder)

    def call(change: Break, *words: str) -> Done:
        change(folder)
        data = [f"data.{split}=DATA/{split}.jsonl" for split in ("train", "validation")]
        given = [word.replace("DATA", str(folder)) for word in (*SMALL, *data, *words)]
        monkeypatch.setattr(sys, "argv", ["prepare.py", f"resources.storage={tmp_path}/runs", *given])
        recwarn.clear()
        status = 0
        try:
            run_script(PREPARE["main"], PREPARE["__doc__"])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        # pytest catches both before they come to stderr, where a person sees them.
        err += "".join(f"{record.getMessage()}\n" for record in caplog.records if record.levelno >= logging.WARNING)
        err += "".join(f"{w.message}\n" for w in recwarn if issubclass(w.category, RuntimeWarning))
        return Done(status, out, err.replace(f"{folder}/", ""))

    return call


def test_the_data_are_good_as_long_as_nothing_is_broken(run: Run) -> None:
    done = run(lambda folder: None)
    assert (done.status, done.stderr) == (0, "")
    assert "samples:        train 2, validation 2" in done.stdout


@pytest.mark.parametrize(("change", "expected", "words"), FILES + SAMPLES + VOLUMES + SPLITS + SETTINGS)
def test_bad_input_ends_in_one_clear_line_and_status_2(
    run: Run, change: Break, expected: str, words: tuple[str, ...]
) -> None:
    done = run(change, *words)
    pattern = re.escape(f"error: {expected}\n").replace(re.escape("..."), ".*")  # which ends with the line
    assert re.fullmatch(pattern, done.stderr), done.stderr
    assert done.status == 2


def test_quarantine_takes_every_bad_sample_with_its_reasons_and_leaves_the_good_ones(run: Run, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        (folder / "text.nii").write_text("no image")
        (folder / "sheared.nii").write_bytes(nii(BRAIN, np.array([[1, 1e38, 0, 0], *np.eye(4)[1:]])))
        packed(SERIES[..., :5])(folder)  # that of the last validation sample
        long = sample("h", "a.nii")["conversations"]
        long[0]["content"][1]["text"] *= 100
        written = [
            sample("e", "text.nii"),
            sample("f", "nowhere.nii"),
            sample("a", "a.nii"),
            sample("g", "nowhere.nii") | {"task_type": 3},
            sample("h", "a.nii") | {"conversations": long},
            sample("i", "sheared.nii"),
        ]
        with (folder / "train.jsonl").open("a") as file:
            file.write("\n{not JSON\n" + "\n".join(map(json.dumps, written)))

    words = "data.on_bad=quarantine", "data.max_bad_fraction=1", "data.max_tokens=200", "tune.metric=eval/loss"
    done = run(spoil, *words)
    assert (done.status, done.stderr) == (0, "")
    assert "samples:        train 2, validation 1" in done.stdout
    [quarantine] = (tmp_path / "runs").glob("quarantine-*.jsonl")
    assert f"8 samples, see {quarantine}" in done.stdout
    entries = [json.loads(line) for line in quarantine.read_text().replace(f"{tmp_path}/data/", "").splitlines()]
    reasons = {entry["where"]: [reason.split(";")[0] for reason in entry["reasons"]] for entry in entries}
    unreadable = "cannot be read as an image: ValueError: it is in no format that nibabel knows"
    assert reasons == {
        "train.jsonl:3": ["not JSON: Expecting property name enclosed in double quotes, column 2"],
        "train.jsonl:4": [f"image_path: text.nii: {unreadable}"],
        "train.jsonl:5": ["image_path: nowhere.nii does not exist"],
        "train.jsonl:6": ["sample: is the same as the one at train.jsonl:1"],
        "train.jsonl:7": ["task_type: must be a text, not 3", "image_path: nowhere.nii does not exist"],
        "train.jsonl:8": ["conversations: becomes 429 tokens, more than data.max_tokens=200"],
        "train.jsonl:9": ["image_path: sheared.nii: its affine does not say where the axes point"],
        "validation.jsonl:2": [
            "image_path: d.nii.gz: has 5 frames, and a window of 6 frames at frame_stride 1 needs 6",
        ],
    }
    assert all(entry["sample"] for entry in entries)


def test_a_header_without_directions_is_a_note_and_a_flag_also_when_the_volume_is_in_the_store(
    run: Run, tmp_path: Path
) -> None:
    assumed = "orientation assumed: qform_code and sform_code are 0 in the header"
    for change in (header(252, "2h", 0, 0), lambda folder: None):
        done = run(change)
        assert (done.status, done.stderr) == (0, f"note: 1 volume, first b.nii: {assumed}\n")
        assert "b.nii,sMRI,1,train,b,5; 4; 4,1.0; 1.0; 1.0,LAS" in (tmp_path / "runs/report/volumes.csv").read_text()
        assert assumed in (tmp_path / "runs/report/volumes.csv").read_text()
        assert f'<span class="flag">{assumed}</span>' in (tmp_path / "runs/report/index.html").read_text()
