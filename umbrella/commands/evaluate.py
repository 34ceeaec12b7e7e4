"""Evaluate a checkpoint on a split, with controls that show how much of the score comes from the images.

  umbrella evaluate checkpoint=NAME
  umbrella evaluate checkpoint=NAME data.test=other/test.jsonl evaluate.controls=[]

NAME is a training or sweep, whose best checkpoint is taken, or a step_... folder. Settings are those of the
training unless they are given. --dry-run prints what would be evaluated.
"""

from collections.abc import Sequence

from umbrella.cli import Arguments, make_console, named_checkpoint, progress_bar, run_command


def main(args: Arguments) -> None:
    """Evaluate, or print what would be evaluated."""
    from umbrella.evaluation.report import print_evaluation
    from umbrella.evaluation_run.evaluate import evaluate, load_evaluation_settings, print_plan, read_evaluation_data

    settings = load_evaluation_settings(named_checkpoint(args.settings), args.files, args.overrides)
    if args.dry_run:
        print_plan(settings, read_evaluation_data(settings, progress_bar, volumes=False), make_console())
    else:
        print_evaluation(*evaluate(settings, progress_bar), make_console())


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("evaluate", argv, main, __doc__)
