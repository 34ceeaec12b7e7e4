"""The baseline: train a small 3D CNN for each target on the same data, and evaluate it like a language model.

Without arguments: sex and age of the phantom cohort, which is created if it does not exist.
"""

from collections.abc import Sequence

from umbrella.cli import Arguments, make_console, progress_bar, run_command


def main(args: Arguments) -> None:
    """Train and evaluate; in a dry run, print the targets."""
    if args.dry_run:
        from umbrella.baseline.run import load_and_check

        make_console().print(args.settings.to_yaml(), markup=False, highlight=False)
        _, encodings = load_and_check(args.settings, progress_bar, dry_run=True)
        for target, encoding in encodings.items():
            make_console().print(f"would learn {target}: {encoding.description}", markup=False, highlight=False)
        return
    from umbrella.baseline.run import run_baseline
    from umbrella.evaluation.report import print_evaluation

    for result, page in run_baseline(args.settings, progress_bar):
        print_evaluation(result, page, make_console())


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("baseline", argv, main, __doc__)
