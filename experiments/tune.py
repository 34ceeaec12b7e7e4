"""Which learning rate, and which turns should the loss see? Sweep any settings with Ray Tune; MLflow keeps every run.

Without arguments: ray_configs/tune.yaml on a phantom cohort, which is made when it is not there yet. A setting that is
given on the command line is fixed and no longer swept.
"""

from pathlib import Path

from umbrella.cli import Request, make_console, progress_bar, run_script

QUESTION = Path(__file__).resolve().parent.parent / "ray_configs" / "tune.yaml"


def main(request: Request) -> None:
    """Run the sweep, or say what it would run."""
    from umbrella.tuning.describe import dry_run, print_answer
    from umbrella.tuning.sweep import run_sweep

    console = make_console()
    if request.dry_run:
        dry_run(request.settings, request.given, console)
    else:
        print_answer(run_sweep(request.settings, request.given, progress_bar), console)


if __name__ == "__main__":
    run_script(main, __doc__, default_file=str(QUESTION))
