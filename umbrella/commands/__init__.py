"""The command ``umbrella NAME ...``. Each command is a module of this package with a function ``run(argv)``."""

import sys
from importlib import import_module

from umbrella.version import __version__

COMMANDS = {
    "tune": "sweep settings with Ray Tune: train, rank and evaluate",
    "train": "train one model",
    "evaluate": "score a checkpoint, with intervals and controls",
    "baseline": "train a small 3D CNN on the same data",
    "predict": "answer the questions of a file, or questions about scans",
    "demo": "ask a checkpoint about scans on a page on localhost",
    "ask": "ask a model one question about scans",
    "export": "write a model to a folder that others can use, or to the Hugging Face Hub",
    "prepare": "check and preprocess all data, and write a report",
    "make-conversations": "make conversations and splits from a BIDS dataset",
    "inspect": "show one conversation as the model receives it",
    "store": "list or delete preprocessed volumes",
    "ui": "open MLflow on localhost",
    "schema": "print the JSON schema of settings files",
    "completion": "print a script that completes words in bash and zsh",
}
"""The commands and what they do."""


def run(name: str) -> None:
    """Run a command with the words of ``sys.argv``."""
    import_module(f"umbrella.commands.{name.replace('-', '_')}").run(sys.argv[1:])


def main() -> None:
    """Run the command that the first word of ``sys.argv`` names, with the other words."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        run(name)
    elif name in ("--version", "-V"):
        print(f"umbrella {__version__}")
    else:
        lines = "\n".join(f"  {command:<20}{text}" for command, text in COMMANDS.items())
        print(f"usage: umbrella COMMAND ...\n\n{lines}\n\numbrella COMMAND --help lists its options and settings.")
        if name not in ("--help", "-h"):
            print(f"error: umbrella {name}: there is no such command", file=sys.stderr)
            sys.exit(2)
