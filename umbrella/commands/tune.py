"""Sweep settings with Ray Tune. MLflow keeps every run.

Without arguments: the settings file tune.yaml, which sweeps the learning rate and the supervised turns, on a phantom
cohort, which is created if it does not exist. Settings files without tune.space use the search space of tune.yaml.
A setting on the command line is fixed and not swept. To resume a sweep, use --resume with its name, or --resume last;
only settings of resources may then change. With --folds, the best settings are then trained on each fold that
umbrella make-conversations --folds wrote, and one report covers the test subjects of all folds.
"""

from collections.abc import Sequence
from pathlib import Path

from umbrella.cli import Arguments, make_console, progress_bar, run_command
from umbrella.config import READY
from umbrella.paths import SWEEPS

OPTIONS = {
    "--resume": {"help": "resume a sweep: its name, or last", "metavar": "NAME"},
    "--folds": {"help": "cross-validate the best settings", "action": "store_true"},
}


def main(args: Arguments) -> None:
    """Run or resume a sweep; with --dry-run, print what would run."""
    from umbrella.training.checkpoint_sync import find_run
    from umbrella.tuning.sweep_files import load_spec

    console, settings, fixed, folder = make_console(), args.settings, args.given, None
    if name := args.options["resume"]:
        folder = find_run(settings.resources, SWEEPS, name, progress_bar)
        settings, fixed = load_spec(folder, args.files, args.overrides)
    if args.options["folds"]:
        from umbrella.evaluation_run.folds import evaluate_folds, fold_settings, read_held_out

        folds = fold_settings(settings)
        read_held_out(folds, progress_bar)  # an error must not come after the sweep
    if args.dry_run:
        from umbrella.tuning.sweep import dry_run

        dry_run(settings, fixed, progress_bar, console)
        if args.options["folds"]:
            print(f"folds: {len(folds)}, on each of which the best settings are trained once")
        return
    from umbrella.tuning.report import SweepResult, link_evaluations, print_result
    from umbrella.tuning.sweep import run_sweep

    def evaluate(result: SweepResult) -> None:
        best = result.trials[0].checkpoint
        if args.options["folds"]:
            evaluate_folds(result.folder, result.trials[0].trial_id, progress_bar, console)
        elif best and settings.evaluate.at_end:
            from umbrella.evaluation_run.evaluate import evaluate_at_end

            evaluate_at_end(result.best_settings, Path(best), result.folder.name, progress_bar, console)
        link_evaluations(result.folder)

    run_sweep(settings, fixed, progress_bar, folder, lambda result: print_result(result, console), evaluate)


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("tune", argv, main, __doc__, default_file=str(READY / "tune.yaml"), options=OPTIONS)
