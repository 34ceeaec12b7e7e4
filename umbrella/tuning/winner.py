"""The settings of the best trial as a training of its own, and the command that runs it."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from umbrella.config import Settings
from umbrella.tuning.settings import TuneSettings

SCRIPT = "experiments/train.py"
PATHS = ("data.train", "data.validation", "data.test", "data.root", "resources.storage")
"""Settings that are paths."""
MAYBE = ("model.checkpoint", "model.chat_template", "resources.store", "resources.node_store", "resources.upload")
"""Settings that are paths where something lies there; else names on the Hub, or addresses."""


def as_training(settings: Settings, point: dict[str, Any]) -> Settings:
    """A sweep's settings with a trial's values, as a plain training that runs from any folder.

    It trains as the trial did: name and folder say only where it is kept, and of ``tune`` a training knows the metric.
    """
    trial = settings.with_values(point)
    flat = trial.flat()
    paths = {name: _absolute(flat[name]) for name in PATHS}
    paths |= {name: _absolute(flat[name]) for name in MAYBE if Path(flat[name]).exists()}
    tune = TuneSettings(metric=trial.tune.metric, mode=trial.tune.mode)
    return trial.with_values(paths).model_copy(update={"name": "", "tune": tune})


def _absolute(value: Any) -> Any:
    if isinstance(value, str):
        return str(Path(value).absolute()) if value else value
    return [_absolute(one) for one in value]


def overrides(settings: Settings, named: Collection[str] = ()) -> list[str]:
    """The words that make the defaults into these settings. What is ``named`` is also said where it is the default."""
    usual = Settings().flat()
    return [f"{k}={_word(v)}" for k, v in settings.flat().items() if k in named or k not in usual or usual[k] != v]


def _word(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def command(*words: str | Path) -> str:
    """A training with these files and overrides, to be typed into a shell."""
    return shlex.join(["python", SCRIPT, *map(str, words)])


def write_best(settings: Settings, file: Path) -> None:
    """The settings as a file that ``experiments/train.py`` takes."""
    head = f"# The best trial of {file.parent.name}. Run it again: {command(file.absolute())}\n"
    file.write_text(head + settings.to_yaml(), encoding="utf-8")
