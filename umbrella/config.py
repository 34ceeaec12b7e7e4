"""All settings in one tree, read from YAML files and dotted overrides.

Each package defines its settings in its ``settings.py``; this module combines them.
"""

import difflib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from umbrella.base import PathOrAddress, Section, UserError, mask_secrets
from umbrella.baseline.settings import BaselineSettings
from umbrella.cohorts.settings import CohortSettings
from umbrella.data.settings import DataSettings, MaskPolicy
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.fileio import dataset_hint
from umbrella.modality import DEFAULT_MODALITIES, Modality
from umbrella.models.settings import ModelSettings
from umbrella.tracking.settings import TrackingSettings
from umbrella.training.settings import LossSettings, OptimSettings, ResourceSettings, TrainSettings
from umbrella.tuning.settings import TuneSettings

READY = next(
    folder
    for folder in (Path(__file__).parent / "ray_configs", Path(__file__).parent.parent / "ray_configs")
    if folder.is_dir()
)
"""The settings files that come with the package: in an installed package, or in a checkout."""
SPACE = "tune.space."
LONGEST_NAME = 200
"""Bytes of the longest name of a training. File systems allow 255 bytes, and file names add to the name."""
REMOVED = {
    "resources.mirror": "set resources.upload",
    "tune.perturb": "population-based training is gone; take tune.scheduler=asha",
    "tune.perturb_every": "population-based training is gone; take tune.scheduler=asha",
    "evaluate.length_normalised": "candidates are compared where their tokens differ, whatever their lengths; leave it out",  # noqa: E501
}
"""Settings of earlier versions, and their replacements."""

FORMAT_HINTS = {
    **dict.fromkeys(("int_parsing", "float_parsing"), "; write one number in decimal digits, as in 90 or 0.5"),
    "string_type": "; write a text in quotes, as in '7'",
}
"""Type of a pydantic error to a hint, for values that begin with a digit."""


class Loader(yaml.SafeLoader):
    """YAML with the plain scalars of version 1.2: ``010``, ``1:30``, ``on`` and ``2024-01-01`` are strings.

    ``~`` (the home folder) is a string, too, and so are numbers with an exponent, which numeric settings accept.
    """


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "null|Null|NULL|", ["n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)(e[-+][0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("merge", "<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


class Settings(Section):
    """All settings of a run."""

    experiment: str = "umbrella"
    """Name of the MLflow experiment."""
    name: str = Field("", pattern=r"^[\w.-]*$")
    """Name of a training. An existing training of this name is resumed. Empty: a new name from the current time."""
    checkpoint: PathOrAddress = ""
    """Trained model of umbrella evaluate, predict, demo, export and ask: name of a training or sweep, whose best checkpoint is taken, or a step_... folder."""  # noqa: E501
    output: PathOrAddress = ""
    """Output of umbrella evaluate (a folder) and umbrella predict (a .jsonl file). Empty: in the storage folder."""
    compare: PathOrAddress = ""
    """Another run for umbrella evaluate to compare the checkpoint with: the name of its evaluation, or of several up to a "-"; or a folder with predictions.jsonl."""  # noqa: E501
    seed: int = 0
    """Seed of the initial weights and of the order of samples."""
    cohort: CohortSettings = CohortSettings()
    modalities: dict[str, Modality] = DEFAULT_MODALITIES
    """Modalities: name, as in the conversations, to grid, patch and preprocessing."""
    data: DataSettings = DataSettings()
    mask: MaskPolicy = MaskPolicy()
    loss: LossSettings = LossSettings()
    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    tune: TuneSettings = TuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    baseline: BaselineSettings = BaselineSettings()
    resources: ResourceSettings = ResourceSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("name")
    @classmethod
    def _can_be_a_file(cls, name: str) -> str:
        if name and not name.strip("."):
            raise ValueError("is a folder's own name or its parent's; give a name with letters or digits")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"is longer than {LONGEST_NAME} bytes, and becomes part of file names; give a shorter one")
        return name

    @model_validator(mode="after")
    def _check_prefixes(self) -> "Settings":
        if self.data.pack_prefixes and any(dict(self.train.augment).values()):
            raise ValueError("data.pack_prefixes shares volumes, and train.augment changes them; leave one of them out")
        return self

    def to_yaml(self) -> str:
        """Return the settings as YAML, from which ``load_settings`` restores the same settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)

    def changes_to_yaml(self) -> str:
        """Return the settings that differ from the defaults as YAML."""
        changed = _difference(self.model_dump(mode="json"), Settings().model_dump(mode="json"))
        return yaml.safe_dump(changed, sort_keys=False, default_flow_style=None, width=120) if changed else "none\n"

    def with_values(self, values: Mapping[str, Any]) -> "Settings":
        """Return a copy with changed values, by dotted names. Raises UserError for an invalid name or value."""
        raw = self.model_dump(mode="json")
        for name, value in values.items():
            _put(raw, name, value)
        return _validate(raw)

    def with_name(self, kind: str) -> "Settings":
        """Return these settings; without a name, a copy whose name is the kind of work and the time."""
        return self if self.name else self.model_copy(update={"name": time.strftime(f"{kind}-%Y%m%d-%H%M%S")})

    def flat(self) -> dict[str, Any]:
        """Return the settings as a flat mapping of dotted names to values."""
        return dict(_flatten(self.model_dump(mode="json")))


def load_settings(files: Sequence[str | Path] = (), overrides: Mapping[str, Any] | None = None) -> Settings:
    """Load settings: defaults, then YAML files in order, then overrides by dotted name (``{"optim.lr": 3e-4}``).

    Raises:
        UserError: a file cannot be read, a name is unknown (the message suggests a similar one), or a value is invalid
            (the message says which values are valid).
    """
    raw = Settings().model_dump(mode="json")
    for file in files:
        _merge(raw, _read_yaml(find_settings_file(str(file))))
    for name, value in (overrides or {}).items():
        _put(raw, name, value)
    return _validate(raw)


def has_search_space(file: str | Path) -> bool:
    """Whether a settings file has ``tune.space``, even an empty one. Raises UserError if it cannot be read."""
    tune = _read_yaml(Path(file)).get("tune")
    return isinstance(tune, dict) and "space" in tune


def parse_value(name: str, text: str) -> Any:
    """Parse the value of ``name=text`` on the command line. The value of a string setting is the text itself.

    Raises:
        UserError: the text is not YAML.
    """
    is_text = isinstance(Settings().flat().get(name), str)
    try:
        value = yaml.load(text, Loader) if text else ""
    except yaml.YAMLError:
        if is_text:
            return text
        raise UserError(
            f"{name}={mask_secrets(text)}: the value is not YAML; quote it, as in '{name}=[1, 2]'"
        ) from None
    return text if is_text and not isinstance(value, str) else value


def find_settings_file(name: str) -> Path:
    """Return the path of a settings file: a path, or the name of a file in ``ray_configs``, such as "grid_96.yaml"."""
    return next((file for file in (Path(name), READY / name, READY.parent / name) if file.is_file()), Path(name))


def is_setting(name: str) -> bool:
    """Whether this is the dotted name of a setting."""
    return name in Settings().flat() or name in Settings.model_fields or name.startswith(SPACE)


def _read_yaml(file: Path) -> dict[str, Any]:
    if hint := dataset_hint(file):
        raise UserError(hint)
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except OSError as error:
        ready = ", ".join(sorted(path.name for path in READY.glob("*.yaml")))
        hint = "" if file.exists() else f"; ready settings files: {ready}"
        raise UserError(f"{file}: cannot be read: {error.strerror}{hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: holds {type(raw).__name__}, not a mapping of settings")
    return raw


def _merge(into: dict[str, Any], new: Mapping[str, Any], prefix: str = "") -> None:
    """Update ``into`` with ``new``. An entry of ``tune.space`` is replaced as a whole, or removed by null."""
    for key, value in new.items():
        if prefix == SPACE and value is None:
            into.pop(key, None)
        elif prefix != SPACE and isinstance(into.get(key), dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key}={value!r}: is a group of settings; give it some, or leave the name out")
            _merge(into[key], value, f"{prefix}{key}.")
        else:
            into[key] = value


def _difference(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of nested mappings that differ from the defaults."""
    changed = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            value, default = _difference(value, default), {}
        if value != default:
            changed[name] = value
    return changed


def _put(raw: dict[str, Any], name: str, value: Any) -> None:
    """Set a value by its dotted name. The keys of ``tune.space`` are dotted names themselves."""
    if name.startswith(SPACE):
        _merge(raw["tune"]["space"], {name.removeprefix(SPACE): value}, SPACE)
        return
    *parents, last = name.split(".")
    for key in parents:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise UserError(f"{name}: there is no such setting{_nearest(name)}")
    _merge(raw, {last: value}, name.removesuffix(last))


def _validate(raw: dict[str, Any]) -> Settings:
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        problems = []
        for issue in error.errors():
            name = ".".join(str(part) for part in issue["loc"])
            if issue["type"] == "extra_forbidden":
                hint = f"; it was removed: {REMOVED[name]}" if name in REMOVED else _nearest(name)
                problems.append(f"{name}: there is no such setting{hint}")
            elif issue["type"] == "missing":
                problems.append(f"{name}: is missing; give it with the rest of its section")
            else:
                given = "" if isinstance(issue["input"], dict) else mask_secrets(f"={issue['input']!r}")
                hint = FORMAT_HINTS.get(issue["type"], "") if re.match(r"[-+]?\d", str(issue["input"])) else ""
                if name.startswith(SPACE) and isinstance(issue["input"], list):
                    values = f"[{', '.join(map(str, issue['input']))}]"
                    given, hint = f"={values}", f"; write '{name}={{grid: {values}}}' to try each value"
                message = f"{name}{given}: {issue['msg'].removeprefix('Value error, ')}{hint}"
                problems.append(message.removeprefix(": "))  # of several sections
        raise UserError("\n".join(problems)) from None
    if problems := list(_ambiguous_numbers(raw, settings.model_dump(mode="json"), "")):
        raise UserError("\n".join(problems))
    return settings


def _ambiguous_numbers(given: Any, parsed: Any, name: str) -> Iterator[str]:
    """Yield a message for each value that pydantic accepts as a number although it may mean something else."""
    if isinstance(given, Mapping) and isinstance(parsed, dict):
        for key, value in given.items():
            yield from _ambiguous_numbers(value, parsed.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(given, list | tuple) and isinstance(parsed, list):
        for i, (value, other) in enumerate(zip(given, parsed, strict=False)):
            yield from _ambiguous_numbers(value, other, f"{name}.{i}")
    elif isinstance(parsed, int | float) and not isinstance(parsed, bool):
        if isinstance(given, bool):
            yield f"{name}={str(given).lower()}: is a truth value, and a number is needed; write {parsed:g}, or another"
        elif isinstance(given, str) and re.match(r"[-+]?0\d", given):
            yield f"{name}={given}: a number that begins with 0 can mean an octal one; write {parsed}"


def _nearest(name: str) -> str:
    """Suggest a known name: the most similar one as a whole or in its last part, else all names of the section."""
    known = [*Settings().flat(), *Settings.model_fields]
    by_last = {n.rsplit(".", 1)[-1]: n for n in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    close = close or [by_last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.6)]
    if close:
        return f"; did you mean {close[0]}?"
    siblings = [n for n in known if n.startswith(name.rpartition(".")[0] + ".")] or list(Settings.model_fields)
    return f"; there are {', '.join(siblings)}"


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
