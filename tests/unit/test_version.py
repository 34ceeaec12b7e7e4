"""Folders that a version below the oldest supported one wrote are refused in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_run import JobWithoutData
from umbrella import Umbrella, __version__
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.inference.model import load_checkpoint_settings
from umbrella.models.build import check_checkpoint
from umbrella.models.settings import ModelSettings
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.paths import CODE
from umbrella.tracking.model_registry import log_model
from umbrella.training.launch import LANGUAGE_MODEL
from umbrella.training.run import check_unchanged
from umbrella.tuning.sweep_files import SweepSpec, load_spec, save_spec
from umbrella.version import check_version

OLD = {"0.1.0": "umbrella 0.1.0", None: "a version before 0.2.0"}
"""Version in ``code.json``, and its description in the error. None: no such file."""
LOADS: dict[str, Callable[[Path], Any]] = {
    "answering": Umbrella.from_checkpoint,
    "settings": lambda folder: load_checkpoint_settings(folder, None),
    "start of a training": lambda folder: check_checkpoint(ModelSettings(checkpoint=str(folder)), {}),
    "transformers": UmbrellaForConditionalGeneration.from_pretrained,
}
REFUSES = LOADS | {"logged in MLflow": lambda folder: log_model("sqlite://", "", folder)}


def written_by(folder: Path, version: str | None) -> str:
    """Change the version that wrote a folder; returns the error about it."""
    code = json.loads((folder / CODE).read_text()) | {"umbrella": version}
    (folder / CODE).write_text(json.dumps(code))
    if version is None:
        (folder / CODE).unlink()
    return (
        f"{folder}: was written by {OLD.get(version)}, and umbrella {__version__} reads what 0.2.0 and later versions"
        " write; train again, or use the version that wrote it"
    )


@pytest.fixture
def step(learnt: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test can change."""
    return Path(shutil.copytree(learnt, tmp_path / "trainings" / "old" / learnt.name))


@pytest.mark.parametrize("version", OLD)
def test_a_checkpoint_of_an_earlier_version_is_refused_wherever_it_is_loaded(step: Path, version: str | None) -> None:
    refusal = written_by(step, version)
    for load in REFUSES.values():
        with pytest.raises(UserError) as error:
            load(step)
        assert str(error.value) == refusal


@pytest.mark.parametrize("version", ["0.2.0", "0.3.1.dev4"])
def test_a_checkpoint_of_the_oldest_supported_version_or_a_later_one_is_loaded(step: Path, version: str) -> None:
    written_by(step, version)
    for load in LOADS.values():
        load(step)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("evaluate.py", ["checkpoint={}", "--dry-run"]),
        ("predict.py", ["checkpoint={}", "--ask", "Sex?"]),
        ("predict.py", ["checkpoint={}", "data.input={}/none.jsonl"]),
        ("train.py", ["model.checkpoint={}", "--dry-run"]),
    ],
)
def test_a_script_refuses_a_checkpoint_of_an_earlier_version_in_one_line(
    step: Path, run: Callable[..., Any], tmp_path: Path, script: str, words: list[str]
) -> None:
    refusal = written_by(step, "0.1.0")
    settings = (step / "settings.yaml").read_text()
    (step / "settings.yaml").write_text(settings.replace("tune:", "tune:\n  perturb: 0.2", 1))
    done = run(script, f"resources.storage={tmp_path}", *(word.format(step) for word in words))
    assert (done.status, done.stderr) == (2, f"error: {refusal}\n")


def test_a_training_that_an_earlier_version_began_or_saved_does_not_continue(learnt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    data = {"data.fingerprint": ""}
    job = JobWithoutData(task=LANGUAGE_MODEL, settings=load_settings(), data=data, tracking={}, folder=str(folder))
    check_unchanged(job)
    check_unchanged(job)
    step = Path(shutil.copytree(learnt, folder / "step_0000001"))
    check_unchanged(job)
    content = (step / CODE).read_text()
    (step / CODE).write_text(content.replace(__version__, "0.1.0"))  # of the same size: the checkpoint stays complete
    with pytest.raises(UserError, match=f"^{re.escape(str(step))}: was written by umbrella 0.1.0"):
        check_unchanged(job)
    (step / CODE).write_text("")  # now it is incomplete, and not loaded
    check_unchanged(job)
    for version in OLD:
        refusal = written_by(folder, version)
        with pytest.raises(UserError) as error:
            check_unchanged(job)
        assert str(error.value) == refusal


def test_a_sweep_that_an_earlier_version_began_does_not_continue(tmp_path: Path, run: Callable[..., Any]) -> None:
    folder = tmp_path / "sweeps" / "first"
    folder.mkdir(parents=True)
    settings = load_settings(overrides={"tune.space": {"seed": {"grid": [0, 1]}}, "resources.storage": str(tmp_path)})
    save_spec(folder, SweepSpec(settings, frozenset()), "")
    load_spec(folder)
    text = (folder / "settings.yaml").read_text()
    (folder / "settings.yaml").write_text(text.replace("tune:", "tune:\n  perturb: 0.2", 1))
    for version in OLD:
        refusal = written_by(folder, version)
        done = run("tune.py", "--resume", "first", f"resources.storage={tmp_path}")
        assert (done.status, done.stderr) == (2, f"error: {refusal}\n")


def test_a_plain_llava_needs_no_version(save_llava: Callable[..., Any], tmp_path: Path) -> None:
    save_llava(tmp_path / "plain")
    assert not (tmp_path / "plain" / CODE).exists()
    assert check_checkpoint(ModelSettings(checkpoint=str(tmp_path / "plain")), {}).model_type == "llava"


def test_the_version_of_a_checkpoint_on_a_hub_is_read_there(tmp_path: Path) -> None:
    cache = tmp_path / "models--team--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    with pytest.raises(UserError, match=r"^team/model: code\.json cannot be read: .*before 0\.2\.0 did not write it"):
        check_version("team/model", **hub)
    (snapshot / CODE).write_text('{"umbrella": "0.2.0"}')
    check_version("team/model", **hub)
