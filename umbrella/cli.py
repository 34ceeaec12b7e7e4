"""Command line of the commands: settings, options, exit status and console output.

umbrella NAME [file.yaml ...] [name=value ...] [--name value ...] [--dry-run] [--help [SECTION]]
"""

import argparse
import errno
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from umbrella.base import Stopped, UserError, on_sigterm, printable
from umbrella.cluster import prepare_environment
from umbrella.config import Settings, find_settings_file, has_search_space, is_setting, load_settings, parse_value
from umbrella.fileio import describe_storage_error
from umbrella.paths import SETTINGS, SWEEPS, TRAININGS, TRIALS, checkpoints_in
from umbrella.settings_help import WIDTH, describe_settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Flags of the original research program, as aliases of settings.
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
PROGRESS_INTERVAL = 30.0
"""Seconds between two lines of progress if the output is not a terminal."""


Options = Mapping[str, Mapping[str, Any]]
"""Command line options of one command: flag, such as "--task-id", to the arguments of ``add_argument``."""


@dataclass(frozen=True)
class Arguments:
    """The parsed command line. ``given`` holds the names of the settings on it."""

    settings: Settings
    given: frozenset[str]
    dry_run: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the command's own options: "task_id" for "--task-id"."""
    files: Sequence[str] = ()
    """Settings files on the command line, in order; without the command's default file."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings on the command line, by their dotted names."""
    paths: tuple[str, ...] = ()
    """Other files, of commands that accept them."""


def parse(
    argv: Sequence[str],
    doc: str,
    default_file: str = "",
    options: Options = MappingProxyType({}),
    paths: str = "",
    name: str = "",
) -> Arguments:
    """Parse a command line.

    Args:
        argv: arguments without the command's name.
        doc: description in ``--help``.
        default_file: settings file that is read first if no other file has a ``tune.space``.
        options: options of the command. An option with the name of a shared flag replaces it.
        paths: name of files other than settings files in ``--help``, such as "volume.nii.gz". An argument is such a
            file unless it ends with .yaml or .yml, or has an "=" without a "/" before it. Empty: not accepted.
        name: of the command.

    Raises:
        UserError: an option has no value, a settings file cannot be read, or a setting is unknown or not valid.
    """
    parser = argparse.ArgumentParser(
        prog=f"umbrella {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    metavar = " | ".join(["file.yaml", "name=value", *([paths] if paths else [])])
    positional = "settings files, settings (also as --name value), " + (f"and each {paths}" if paths else "in order")
    parser.add_argument("words", nargs="*", metavar=metavar, help=positional)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a settings file, as above")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    text = "print this text and all settings, or those of one section, as in --help optim"
    parser.add_argument("--help", "-h", nargs="?", const="", metavar="SECTION", help=text)
    own = {parser.add_argument(flag, **keywords).dest for flag, keywords in options.items()}
    values = vars(parser.parse_intermixed_args(list(_join_settings(argv, options))))
    if values["help"] is not None:
        defaults = load_settings([default_file] if default_file else [])
        described = describe_settings(defaults, values["help"])
        aliases = textwrap.fill(", ".join(f"{flag} = {setting}" for flag, setting in FLAGS.items()), WIDTH)
        print(described if values["help"] else f"{parser.format_help()}\nflags: {aliases}\n\n{described}")
        sys.exit(0)

    files, others = list(values["config"]), []
    overrides: dict[str, Any] = {}
    for i, word in enumerate(values["words"]):
        setting, equals, text = word.partition("=")
        if equals and not (paths and ("/" in setting or " " in setting)):  # a file, or a question
            overrides[setting] = parse_value(setting, text)
        elif "." in word and is_setting(word):
            value = values["words"][i + 1] if i + 1 < len(values["words"]) else "VALUE"
            raise UserError(f"{word}: is a setting, not a file; write {word}={value}")
        elif paths and not word.lower().endswith((".yaml", ".yml")):
            others.append(word)
        else:
            files.append(word)
    files = [str(find_settings_file(file)) for file in files]
    default = [default_file] if default_file and not any(map(has_search_space, files)) else []
    return Arguments(
        settings=load_settings([*default, *files], overrides),
        given=frozenset(overrides),
        dry_run=values["dry_run"],
        options={option: values[option] for option in own},
        files=files,
        overrides=overrides,
        paths=tuple(others),
    )


def _join_settings(argv: Sequence[str], options: Options) -> Iterator[str]:
    """Yield the words of a command line, with ``--optim.lr 3e-4`` and ``--optim.lr=3e-4`` as ``optim.lr=3e-4``."""
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        if equals and f"--{flag}" in options:  # push=name is --push=name
            yield f"--{word}"
            continue
        name = FLAGS.get(flag, flag.removeprefix("--"))
        if flag in options or not flag.startswith("--") or not ("." in name or is_setting(name)):
            yield word
            continue
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"{flag}: needs a value, as in {flag} VALUE")
        yield f"{name}={text}"


def run_command(
    name: str,
    argv: Sequence[str],
    main: Callable[[Arguments], Any],
    doc: str,
    default_file: str = "",
    options: Options = MappingProxyType({}),
    paths: str = "",
) -> None:
    """Parse a command line as ``parse`` does, call ``main``, and exit as ``exit_with_status`` says."""

    def parse_and_call() -> None:
        args = parse(argv, doc, default_file, options, paths, name)
        prepare_environment(args.settings.resources.ray_address)
        main(args)

    exit_with_status(parse_and_call)


def exit_with_status(main: Callable[[], Any]) -> None:
    """Call ``main``, and exit.

    Exit status: 0; 2 after a user error or if the disk is full or read-only; 130 after Ctrl-C; 143 after SIGTERM.
    """

    def stop() -> NoReturn:
        raise Stopped("stopped by SIGTERM")

    try:
        with on_sigterm(stop):  # until main sets a handler of its own
            main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except BrokenPipeError:  # the reader of the output has ended, as with "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {describe_storage_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)


def make_console() -> "Console":
    """Create the console of a command. Without a terminal it is wide enough for tables."""
    from rich.console import Console

    class PlainConsole(Console):
        """Replaces control characters in texts by their codes."""

        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(printable(text), **options)

    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=140)


def progress_bar(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Yield the items and show a progress bar.

    If the output is not a terminal, print one line at the end and one every ``PROGRESS_INTERVAL`` seconds.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not items:  # rich shows an empty list as work of unknown length
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=make_console()) as progress:
        begun = printed = time.monotonic()
        for done, item in enumerate(progress.track(items, description=description)):
            now = time.monotonic()
            if now - printed >= PROGRESS_INTERVAL and not progress.console.is_terminal:
                print(f"{description} {done}/{len(items)}, {done / (now - begun):.3g} per second", flush=True)
                printed = now
            yield item


def named_checkpoint(settings: Settings) -> Path:
    """Return the folder of the checkpoint that the setting ``checkpoint`` names.

    The setting is a checkpoint's folder, or the name or folder of a training or sweep, whose best checkpoint is taken.

    Raises:
        UserError: the setting is empty, nothing has this name, or two things have; or the run has no checkpoint yet.
    """
    from umbrella.training.checkpoint_files import best_checkpoint
    from umbrella.tuning.results import best_trial, rank_configurations, read_trials

    name, storage = settings.checkpoint, Path(settings.resources.storage)
    places = dict.fromkeys(
        path.absolute() for path in (Path(name), storage / TRAININGS / name, storage / SWEEPS / name)
    )
    found = [path for path in places if name and path.is_dir()]
    if not found:
        started = [file for kind in (TRAININGS, SWEEPS) for file in storage.glob(f"{kind}/*/{SETTINGS}")]
        newest = max(started, key=lambda file: file.stat().st_mtime).parent.name if started else ""
        example = f", as in checkpoint={newest}, the newest" if newest else f"; {storage} has none yet"
        wrong = f"checkpoint={name}: there is no such folder or run" if name else "checkpoint is not set"
        raise UserError(f"{wrong}; name a training, a sweep or a step_... folder{example}")
    if len(found) > 1:
        raise UserError(f"checkpoint={name}: is {' and '.join(map(str, found))}; write the path of one")
    best: Path | str | None
    best = folder = found[0]
    if (folder / TRIALS).is_dir():
        tune = load_settings([folder / SETTINGS]).tune
        trial = best_trial(rank_configurations(read_trials(folder, tune), tune.mode))
        best = trial.checkpoint if trial else None
    elif checkpoints := checkpoints_in(folder):
        tune = load_settings([checkpoints[-1] / SETTINGS]).tune
        best = best_checkpoint(folder, tune.metric, tune.mode)
    if not best:
        raise UserError(f"checkpoint={name}: {folder} has no evaluated checkpoint yet")
    return Path(best)
