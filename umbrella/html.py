"""Pages of HTML that stand for themselves: one template each, over the style that they share (``page.html``)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from umbrella.base import printable


def render(template: Path, filters: Mapping[str, Callable] = MappingProxyType({}), **values: Any) -> str:
    """The page of a template. It may extend ``page.html``. Nothing in ``values`` is taken as HTML."""
    folders = FileSystemLoader([template.parent, Path(__file__).parent])
    # For every file, and not by its name: what people wrote may hold anything.
    jinja = Environment(
        loader=folders,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    jinja.filters |= {"number": number, **filters}
    return jinja.get_template(template.name).render(**values)


def number(value: float) -> str:
    """A number for people: four digits that count, and no exponent where five more digits say it."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
