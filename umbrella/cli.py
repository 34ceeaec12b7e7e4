"""The command line that every script in experiments/ shares: settings in, one clear line and status 2 for a user error.

script.py [file.yaml ...] [name=value ...] [--dry-run] [--help]
"""

import argparse
import errno
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from umbrella.base import Stopped, UserError, printable
from umbrella.config import Settings, describe_settings, has_search_space, load_settings, parse_value
from umbrella.fileio import describe_storage_error
from umbrella.paths import all_checkpoints
from umbrella.ray_environment import prepare_environment
from umbrella.signals import on_sigterm

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Flags of the research program that people come from, as other names of settings.
FLAGS = {
    "--train-data": "data.train",
    "--eval-data": "data.validation",
    "--modality": "data.modality",
    "--task-filter": "data.task_filter",
    "--batch-size": "train.batch_size",
    "--learning-rate": "optim.lr",
    "--epochs": "train.epochs",
    "--output-dir": "resources.storage",
}
YAML = (".yaml", ".yml")
BETWEEN_LINES = 30.0
"""Seconds between two lines of a progress bar that is not drawn, because there is no terminal."""


@dataclass(frozen=True)
class Option:
    """A flag of one script. ``default=False`` makes it a switch; else it takes a value, of one of the ``choices``."""

    flag: str
    """As it is written: "--task-id"."""
    help: str
    default: Any = None
    kind: Callable[[str], Any] = str
    """From the word on the command line to the value."""
    choices: Sequence[str] | None = None
    value: str = "VALUE"
    """What the value is called in ``--help``, where there are no choices."""

    @property
    def name(self) -> str:
        """Its key in ``Arguments.options``: "task_id"."""
        return self.flag.lstrip("-").replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Let the parser know the flag."""
        if self.default is False:
            parser.add_argument(self.flag, dest=self.name, action="store_true", help=self.help)
        else:
            parser.add_argument(
                self.flag,
                dest=self.name,
                help=self.help,
                default=self.default,
                type=self.kind,
                metavar=None if self.choices else self.value,
                choices=self.choices,
            )


@dataclass(frozen=True)
class Arguments:
    """What a person asked for: resolved settings, the names they set on the command line, and whether to only look."""

    settings: Settings
    given: frozenset[str]
    dry_run: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    """The script's own flags, by ``Option.name``."""
    files: Sequence[str] = ()
    """The settings files that were named, in order; not the script's default file."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The settings on the command line, by their dotted names: files and these are laid over the defaults."""
    paths: tuple[str, ...] = ()
    """Words that are neither settings nor settings files, of scripts that take such."""


def parse(
    argv: Sequence[str], doc: str, default_file: str | None = None, options: Sequence[Option] = (), paths: str = ""
) -> Arguments:
    """Read a command line.

    Args:
        default_file: what is swept, where no file has a ``tune.space``.
        options: the script's own flags. One that has the name of a shared flag takes its place.
        paths: what files other than of settings are called in ``--help``, as in "volume.nii.gz". A word is one unless
            it ends like YAML, or has an "=" and no "/" before that. Empty: the script takes none.
    """
    parser = argparse.ArgumentParser(
        description=doc, epilog=_settings_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    metavar = " | ".join(["file.yaml", "name=value", *([paths] if paths else [])])
    words = "settings files and overrides" + (f", and each {paths}" if paths else "")
    parser.add_argument("words", nargs="*", metavar=metavar, help=words)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a settings file, as above")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    for option in options:
        option.add_to(parser)
    flags = {flag: name for flag, name in FLAGS.items() if flag not in {option.flag for option in options}}
    for flag, name in flags.items():
        parser.add_argument(flag, dest=name, metavar="VALUE", help=f"the same as {name}=VALUE")
    asked = vars(parser.parse_intermixed_args(argv))

    files, others = list(asked["config"]), []
    overrides: dict[str, Any] = {}
    for word in asked["words"]:
        name, equals, text = word.partition("=")
        if equals and not (paths and "/" in name):
            overrides[name] = parse_value(name, text)
        elif paths and not word.lower().endswith(YAML):
            others.append(word)
        else:
            files.append(word)
    overrides |= {name: parse_value(name, asked[name]) for name in flags.values() if asked[name] is not None}
    default = [default_file] if default_file and not any(map(has_search_space, files)) else []
    own = {option.name: asked[option.name] for option in options}
    settings, given = load_settings([*default, *files], overrides), frozenset(overrides)
    return Arguments(settings, given, asked["dry_run"], own, files, overrides, tuple(others))


def run_script(
    main: Callable[[Arguments], Any],
    doc: str,
    default_file: str | None = None,
    options: Sequence[Option] = (),
    paths: str = "",
) -> None:
    """Parse ``sys.argv`` as ``parse`` does, call ``main`` and leave with its fate as the exit status.

    That is 0, 2 for a user error and for a disk that is full or read-only, or 143 after SIGTERM.
    """

    def stop() -> NoReturn:
        raise Stopped("stopped by SIGTERM")

    try:
        with on_sigterm(stop):  # while nothing knows better
            args = parse(sys.argv[1:], doc, default_file, options, paths)
            prepare_environment(args.settings.resources.ray_address)
            main(args)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Stopped as outcome:
        print(outcome, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {describe_storage_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)


def make_console() -> "Console":
    """Where scripts print: as wide as the terminal, and wide enough for a table where there is none."""
    from rich.console import Console

    class PlainConsole(Console):
        """Writes control characters of texts as codes; its own are not part of texts."""

        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(printable(text), **options)

    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=140)


def progress_bar(things: Sequence[Any], what: str) -> Iterable[Any]:
    """The things, with a bar while they are taken: in a terminal as it moves, elsewhere one line at the end.

    Elsewhere, what takes long has a line in between every ``BETWEEN_LINES`` seconds.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not things:  # the bar would not know how long it is
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=make_console()) as progress:
        begun = said = time.monotonic()
        for done, thing in enumerate(progress.track(things, description=what)):
            now = time.monotonic()
            if now - said >= BETWEEN_LINES and not progress.console.is_terminal:
                print(f"{what} {done}/{len(things)}, {done / (now - begun):.3g} per second", flush=True)
                said = now
            yield thing


def _settings_help() -> str:
    lines = ["settings, with their defaults:"]
    for name, default, line in describe_settings():
        lines.append(f"  {name} = {default!r}\n      {line}")
    return "\n".join(lines).replace("%", "%%")


def named_checkpoint(settings: Settings) -> Path:
    """The folder that the setting ``checkpoint`` names.

    Raises:
        UserError: the setting is empty, or there is no such folder. The message names the newest checkpoint.
    """
    name = settings.checkpoint
    folder = Path(name)
    if name and folder.is_dir():
        return folder.absolute()
    wrong = f"checkpoint={name}: there is no such folder" if name else "checkpoint is not set"
    storage = Path(settings.resources.storage)
    checkpoints = all_checkpoints(storage)
    if not checkpoints:
        raise UserError(f"{wrong}; name a training's step_... folder, of which {storage} has none yet")
    newest = max(checkpoints, key=lambda step: step.stat().st_mtime)
    raise UserError(f"{wrong}; name a training's step_... folder, as in checkpoint={newest}, the newest in {storage}")
