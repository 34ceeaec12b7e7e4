"""The settings as text for ``--help`` and as a JSON schema for editors. Both come from the classes of the settings."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from umbrella.base import UserError
from umbrella.config import Settings

WIDTH = 110
GENERAL = "general"
"""The section of settings whose name has no dot."""
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}
Schema = dict[str, Any]


class Entry(NamedTuple):
    """A setting. ``name`` is dotted; ``kind``: its type or allowed values; ``value``: empty for an empty one."""

    section: str
    name: str
    kind: str
    value: str
    description: str


def json_schema() -> Schema:
    """Return the JSON schema of a settings file.

    All settings are optional in a file. A list of texts may be one text, and ``tune.space`` may have null.
    """
    schema = Settings.model_json_schema()
    for definition in schema["$defs"].values():
        definition.pop("required", None)
        for name, field in definition["properties"].items():
            if field.get("items") == {"type": "string"}:
                definition["properties"][name] = {"anyOf": [field, {"type": "string"}], **_texts(field)}
    space = schema["$defs"]["TuneSettings"]["properties"]["space"]
    space["additionalProperties"] = {"anyOf": [space["additionalProperties"], {"type": "null"}]}
    return schema


def describe_settings(values: Settings, section: str = "") -> str:
    """Describe settings by section: name, type or allowed values, value, and description.

    Args:
        values: the values that are shown.
        section: a section such as "optim" or "train.augment", "general", or one setting. Empty: all sections.

    Raises:
        UserError: there is no such section or setting.
    """
    known = list_settings(values)
    entries = [e for e in known if not section or section in (e.section, e.name) or e.name.startswith(f"{section}.")]
    if not entries:
        sections = ", ".join(dict.fromkeys(entry.section for entry in known))
        raise UserError(f"--help {section}: there is no such section or setting; the sections are {sections}")
    lines: list[str] = []
    for group, members in groupby(entries, lambda entry: entry.section):
        lines += ["", f"{group}:"]
        for entry in members:
            lines.append(f"  {entry.name}  {entry.kind}" + (f"  (default: {entry.value})" if entry.value else ""))
            lines += textwrap.wrap(entry.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def list_settings(values: Settings) -> list[Entry]:
    """Return all settings with their values, by section."""
    schema = Settings.model_json_schema()
    return list(_entries(schema, schema, values.model_dump(mode="json"), ""))


def _entries(schema: Schema, part: Schema, values: Mapping[str, Any], prefix: str) -> Iterator[Entry]:
    nested = []
    for key, field in part["properties"].items():
        items = field.get("additionalProperties", {})
        reference = field.get("$ref") or (items.get("$ref") if isinstance(items, dict) else None)
        if reference:
            nested.append((key, "$ref" in field, schema["$defs"][reference.rsplit("/", 1)[-1]]))
            continue
        value = values.get(key)
        shown = "" if value in ("", [], {}) else _value(value)
        yield Entry(prefix.removesuffix(".") or GENERAL, prefix + key, _type(field), shown, _words(field))
    for key, single, definition in nested:
        if single:
            yield from _entries(schema, definition, values[key], f"{prefix}{key}.")
        else:  # entries with names of the user's choice, of which all are optional
            example = {k: {n: entry[k] for n, entry in values[key].items()} for k in definition["properties"]}
            for name, field in definition["properties"].items():
                one = len({json.dumps(value) for value in example[name].values()}) == 1
                shown = _value(next(iter(example[name].values())) if one else example[name])
                yield Entry(key, f"{prefix}{key}.NAME.{name}", _type(field), shown, _words(field))


def _type(field: Schema) -> str:
    """Describe the type of a setting and its allowed values."""
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "enum" in field:
        return " | ".join(value or '""' for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        parts = field.get("prefixItems") or [field["items"]]
        return f"list of {_type(parts[0])}" if "items" in field else f"[{', '.join(map(_type, parts))}]"
    if kind == "object":
        values = field["additionalProperties"]
        return "mapping" if values is True else f"mapping of names to {_type(values)}"
    limits = [f"{sign} {field[name]:g}" for name, sign in BOUNDS.items() if name in field]
    return {"boolean": "true | false", "string": "text"}.get(kind, " ".join([kind, ", ".join(limits)]).strip())


def _value(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _texts(field: Schema) -> Schema:
    return {name: field[name] for name in ("default", "description", "title") if name in field}


def _words(field: Schema) -> str:
    return " ".join(field.get("description", "").split())
