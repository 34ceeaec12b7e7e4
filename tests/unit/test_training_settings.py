"""The settings of a training that repeats the best trial are those of the trial."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from umbrella.cli import parse
from umbrella.config import Settings, load_settings
from umbrella.tuning.report import training_command, training_settings

SWEEP = {
    "name": "night",
    "optim.schedule": "linear",
    "mask.task_weights": {"T1": 1.0, "T3": 2.0},
    "data.train": ["with space/*.json", "b.json"],
    "tune.space": {"optim.lr": {"grid": [1e-5]}, "seed": {"grid": [0, 7]}},
    "tune.metric": "eval/loss",
    "tune.mode": "min",
    "tune.grace": 5,
    "train.patience": 3,
    "resources.store": "voxels",
    "resources.upload": "s3://bucket/runs",
}
POINT = {"optim.lr": 1e-5, "seed": 7, "modalities.sMRI.grid": [8, 8, 8], "optim.embedder_lr": 1.25e-7}


def trained(settings: Settings) -> dict[str, Any]:
    """What a training learns from its settings."""
    flat = settings.flat()
    kept = ("tune.metric", "tune.mode")
    return {k: v for k, v in flat.items() if k != "name" and (k in kept or not k.startswith("tune."))}


@pytest.fixture
def best_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The best trial of a sweep that was started in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voxels").mkdir()
    return training_settings(load_settings(overrides=SWEEP), POINT)


def test_the_training_is_the_trial_but_for_its_place(best_settings: Settings, tmp_path: Path) -> None:
    paths = {
        "data.train": [f"{tmp_path}/with space/*.json", f"{tmp_path}/b.json"],
        "resources.storage": f"{tmp_path}/runs",
        "resources.store": f"{tmp_path}/voxels",
    }
    assert trained(best_settings) == trained(load_settings(overrides=SWEEP).with_values(POINT)) | paths
    assert best_settings.name == ""  # else it would go on with another training of this name
    assert best_settings.tune.space == {}


def test_the_command_gives_the_training_from_any_folder(
    best_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "best.yaml").write_text(best_settings.to_yaml(), encoding="utf-8")
    python, script, *arguments = shlex.split(training_command(tmp_path / "best.yaml"))
    assert (python, script) == ("umbrella", "train")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse(arguments, "").settings == best_settings


def test_a_checkpoint_is_a_path_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    names = ["mine", "llava-hf/llava-interleave-qwen-0.5b-hf", ""]
    found = [training_settings(Settings(), {"model.checkpoint": name}).model.checkpoint for name in names]
    assert found == [str(tmp_path / "mine"), *names[1:]]
