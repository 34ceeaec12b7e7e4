"""Train one model, with the same settings as a sweep: MLflow run, checkpoints, an evaluation after each epoch.

Without arguments: the default settings on a phantom cohort, which is created if it does not exist.
To resume a training, use --resume with its name, or --resume last; its settings are kept, and only those that do not
change it, such as resources, may be given.
"""

from collections.abc import Sequence
from math import nan
from pathlib import Path

from umbrella.cli import Arguments, make_console, progress_bar, run_command
from umbrella.config import load_settings
from umbrella.paths import SETTINGS, TRAININGS, storage_of

OPTIONS = {"--resume": {"help": "resume a training: its name, or last", "metavar": "NAME"}}


def main(args: Arguments) -> None:
    """Run the training; with --dry-run, print what would run."""
    settings = args.settings
    if name := args.options["resume"]:
        from umbrella.training.checkpoint_sync import find_run

        folder = find_run(settings.resources, TRAININGS, name, progress_bar)
        place = {"resources.storage": str(storage_of(folder)), "name": folder.name}
        settings = load_settings([folder / SETTINGS, *args.files], {**args.overrides, **place})
    settings = settings.with_values({f"tune.space.{name}": None for name in settings.tune.space})  # a single training
    if args.dry_run:
        from umbrella.tuning.sweep import dry_run

        dry_run(settings, args.given, progress_bar, make_console())
        return
    from umbrella.tracking.store import tracking_uri, ui_command
    from umbrella.training.checkpoint_files import best_checkpoint, read_metrics
    from umbrella.training.run import run_training

    def finish(folder: Path) -> None:
        metric = settings.tune.metric
        best = best_checkpoint(folder, metric, settings.tune.mode)
        if best:
            print(f"best checkpoint: {best}  ({metric} {read_metrics(best).get(metric, nan):.4g})")
        uri = tracking_uri(settings.resources.storage, settings.tracking.uri)
        print(f"checkpoints: {folder}\nruns in MLflow: {ui_command(uri, storage_of(folder))}")
        if best and settings.evaluate.at_end:
            from umbrella.evaluation_run.evaluate import evaluate_at_end

            evaluate_at_end(settings, best, folder.name, progress_bar, make_console())

    run_training(settings, progress_bar, finish)


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("train", argv, main, __doc__, options=OPTIONS)
