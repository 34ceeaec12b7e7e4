"""Which learning rate, and which turns should the loss see? Sweep any settings with Ray Tune; MLflow keeps every run.

Without arguments: ray_configs/tune.yaml on a phantom cohort, which is made when it is not there yet. Files that say
nothing of tune.space leave that question. A setting that is given on the command line is fixed and no longer swept.
A sweep that was stopped or killed goes on with --resume and its name, or --resume last, by itself or beside what began
it; of the settings, only those of resources can then be others.
"""

from pathlib import Path

from umbrella.cli import Option, Request, make_console, progress_bar, run_script

RESUME = Option("--resume", "go on with a sweep: its name, or last", value="NAME")
QUESTION = Path(__file__).resolve().parent.parent / "ray_configs" / "tune.yaml"


def main(request: Request) -> None:
    """Run the sweep, or say what it would run."""
    from umbrella.tuning.sweep_files import find_sweep, resume_spec

    console, settings, given, folder = make_console(), request.settings, request.given, None
    if name := request.options["resume"]:
        folder = find_sweep(settings, name)
        if not folder.exists() and settings.resources.upload:
            from umbrella.training.checkpoint_sync import download
            from umbrella.training.run_lock import run_lock

            if request.dry_run:
                print(f"would download {folder} from resources.upload, and go on with it")
                return
            with run_lock(folder):
                download(settings.resources, folder, progress_bar)
        settings, given = resume_spec(folder, request.files, request.overrides)
    if request.dry_run:
        from umbrella.tuning.dry_run import dry_run

        dry_run(settings, given, progress_bar, console)
        return
    from umbrella.tuning.report import SweepResult, print_result
    from umbrella.tuning.sweep import run_sweep

    def evaluate(answer: SweepResult) -> None:
        best = answer.trials[0].checkpoint
        if best and settings.evaluate.at_end:
            from umbrella.evaluation_run.evaluate import evaluate_at_end

            evaluate_at_end(answer.best, Path(best), answer.folder.name, progress_bar, console)

    run_sweep(settings, given, progress_bar, folder, lambda answer: print_result(answer, console), evaluate)


if __name__ == "__main__":
    run_script(main, __doc__, default_file=str(QUESTION), options=[RESUME])
