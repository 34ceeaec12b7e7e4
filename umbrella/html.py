"""Render self-contained HTML pages. Each has a template, and all share the style of ``page.html``."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from umbrella.base import printable


def render(
    template: Path, filters: Mapping[str, Callable] = MappingProxyType({}), escape: bool = True, **values: Any
) -> str:
    """Render a template, which may extend ``page.html``. All ``values`` are escaped, unless ``escape`` is false."""
    folders = FileSystemLoader([template.parent, Path(__file__).parent])
    # Escape in every file, whatever its extension: values may contain any text.
    jinja = Environment(
        loader=folders,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    jinja.filters |= {"number": number, **filters}
    return jinja.get_template(template.name).render(**values)


def relative_link(target: Path, folder: Path) -> str:
    """Return the address of a file or folder for a page in ``folder``."""
    return quote(os.path.relpath(target, folder))


def number(value: float) -> str:
    """Format a number with four significant digits; large numbers below 1e9 as integers with thousands separators."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
