"""What a sweep has set, read from what it acts on: the optimizer's rate, the batch's weights, the model's shapes."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter

from umbrella.base import Section, UserError
from umbrella.config import Settings
from umbrella.training.readers import READERS, UNSEEN, Acting


def read_back(acting: Acting, swept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What each swept setting is where it acts.

    Args:
        swept: names to the values that were drawn.

    Returns:
        Name to value as read, and the names of settings that only the settings themselves tell.

    Raises:
        UserError: a value is another one than was drawn; says which, and where.
    """
    found: dict[str, Any] = {}
    blind: list[str] = []
    for name, drawn in _leaves(swept):
        wanted = _as_setting(name, drawn)
        reader = next((read for prefix, read in READERS.items() if f"{name}.".startswith(prefix)), None)
        seen = reader(acting, name, wanted) if reader else UNSEEN
        found[name] = value_of(acting.settings, name) if seen is UNSEEN else seen
        if found[name] != wanted:
            where = "in the settings" if seen is UNSEEN else "where it acts"
            raise UserError(
                f"tune.space.{name}: was to be {wanted} and is {found[name]} {where}; this is a fault of ours"
            )
        if seen is UNSEEN:
            blind.append(name)
    return found, blind


def value_of(settings: Settings, name: str) -> Any:
    """A setting or a section by its dotted name."""
    value: Any = settings
    for key in name.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value


def _leaves(swept: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values; of a section that is swept as a whole, those of the settings that it names, if any."""
    for name, value in swept.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _as_setting(name: str, drawn: Any) -> Any:
    """The value in the setting's own type. Whole settings would hide one that another setting overrules."""
    kind: Any = Settings
    for key in name.split("."):
        kind = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
        if isinstance(kind, type) and issubclass(kind, Section):
            field = kind.model_fields[key]
            kind = Annotated[field.annotation, field]
        else:
            kind = get_args(kind)[1]  # of a mapping's values
    return TypeAdapter(kind).validate_python(drawn)
