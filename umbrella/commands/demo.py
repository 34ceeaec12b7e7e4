"""Ask a checkpoint about volumes on a page in the browser, on localhost.

  umbrella demo checkpoint=NAME

NAME is a training or sweep, whose best checkpoint is taken, or a step_... folder. The page offers the test
subjects of its data, and candidate answers from its training data; data.train and data.test name other files. Ctrl-C
ends the page and deletes the files dropped on it.
"""

import threading
from collections.abc import Sequence

from umbrella.cli import Arguments, Options, named_checkpoint, run_command

OPTIONS: Options = {
    "--port": {"help": "port of the page (default: the first free one from 7860 on)", "type": int, "metavar": "PORT"},
    "--no-browser": {"help": "print the address only", "action": "store_true"},
}


def main(args: Arguments) -> None:
    """Serve the page until Ctrl-C."""
    from umbrella.evaluation_run.evaluate import load_evaluation_settings

    settings = load_evaluation_settings(named_checkpoint(args.settings), args.files, args.overrides)
    if args.dry_run:
        print(f"would open a page of {settings.checkpoint}")
        return
    from umbrella.demo import serve

    with serve(settings, args.options["port"], not args.options["no_browser"]) as address:
        print(f"demo, until Ctrl-C: {address}", flush=True)
        threading.Event().wait()


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("demo", argv, main, __doc__, options=OPTIONS)
