"""The baseline: train a small 3D CNN for each target on the same data, and evaluate it like a language model.

Without arguments: sex and age of the phantom cohort, which is made when it is not there yet.
"""

from umbrella.cli import Request, make_console, progress_bar, run_script


def main(request: Request) -> None:
    """Train and evaluate; in a dry run, print the targets."""
    if request.dry_run:
        from umbrella.baseline.run import load_and_check

        make_console().print(request.settings.to_yaml(), markup=False, highlight=False)
        _, encodings = load_and_check(request.settings, progress_bar, dry_run=True)
        for target, encoding in encodings.items():
            make_console().print(f"would learn {target}: {encoding.description}", markup=False, highlight=False)
        return
    from umbrella.baseline.run import run_baseline
    from umbrella.evaluation.report import print_evaluation

    for result, page in run_baseline(request.settings, progress_bar):
        print_evaluation(result, page, make_console())


if __name__ == "__main__":
    run_script(main, __doc__)
