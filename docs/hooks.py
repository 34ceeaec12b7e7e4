"""Hooks of MkDocs: pages that are generated from the code, and files of the repository outside docs/."""

import contextlib
import io
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import umbrella
from umbrella import commands, paths
from umbrella.config import Settings
from umbrella.settings_help import list_settings

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "CITATION.cff", "LICENSE"),
    *("benchmarks/README.md", "benchmarks/results/*.txt", "ray_configs/*.yaml"),
)
"""Patterns of files outside docs/ that pages link to."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the files outside docs/."""
    for name, page in GENERATED.items():
        files.append(File.generated(config, name, content=page()))
    for path in (path for pattern in OUTSIDE for path in REPOSITORY.glob(pattern)):
        files.append(File.generated(config, path.relative_to(REPOSITORY).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Change links between docs/ and the files outside it, which the site has in one folder."""
    if page.file.abs_src_path and Path(page.file.abs_src_path).parent == REPOSITORY / "docs":
        return markdown.replace("](../", "](")
    return markdown.replace("](docs/", "](").replace("](../docs/", "](../")


def settings_page() -> str:
    """Return the page of all settings, from their docstrings."""
    lines = [
        "# Settings",
        "",
        "A settings file has these names as YAML, and a command line as `optim.lr=3e-4` or `--optim.lr 3e-4`.",
        "`umbrella COMMAND --help optim` prints a section. `umbrella schema` prints a JSON schema for editors.",
    ]
    for section, entries in groupby(list_settings(Settings()), lambda entry: entry.section):
        lines += ["", f"## {section}", ""]
        for entry in entries:
            value = entry.value.removeprefix(f"{Path.cwd()}/")  # paths are absolute
            default = f", default `{value}`" if value else ""
            lines += [f"`{entry.name}`{{ #{entry.name} }} *{entry.kind}*{default}", f":   {entry.description}", ""]
    return "\n".join(lines)


def commands_page() -> str:
    """Return the page of all commands, from their ``--help``."""
    os.environ["COLUMNS"] = "100"  # the width of argparse's text
    lines = ["# Commands", "", "`umbrella COMMAND --help` also lists the [settings](settings.md)."]
    for name, description in commands.COMMANDS.items():
        shown = run_help(name).split("\nflags:")[0].rstrip()
        lines += ["", f"## umbrella {name}", "", f"{description[0].upper()}{description[1:]}.", ""]
        lines += ["```text", shown, "```"]
    return "\n".join(lines)


def run_help(command: str) -> str:
    """Return what a command prints with ``--help``."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        commands.import_module(f"umbrella.commands.{command.replace('-', '_')}").run(["--help"])
    return printed.getvalue()


def python_page() -> str:
    """Return the page of the public names of the package, which mkdocstrings fills from their docstrings."""
    lines = ["# Python", "", "`import umbrella` has these names. [In Python](python.md) shows how they work together."]
    return "\n".join([*lines, *(f"\n::: umbrella.{module}.{name}" for name, module in umbrella.MODULES.items())])


def storage_page() -> str:
    """Return the page of the layout of the storage folder."""
    title, _, layout = (paths.__doc__ or "").replace("``", "`").partition("\n\n")
    return f"# Storage folder\n\n{title}\n\n~~~text\n{layout.rstrip()}\n~~~\n"


GENERATED: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "api.md": python_page,
    "storage.md": storage_page,
}
