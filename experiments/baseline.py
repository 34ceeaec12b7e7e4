"""What the field would use: a small 3D CNN for each target, on the same data and evaluated as a language model is.

Without arguments: sex and age of the phantom cohort, which is made when it is not there yet.
"""

from umbrella.cli import Request, make_console, progress_bar, run_script


def main(request: Request) -> None:
    """Train and evaluate, or say what would be."""
    if request.dry_run:
        from umbrella.baseline.run import load_checked

        make_console().print(request.settings.to_yaml(), markup=False, highlight=False)
        _, heads = load_checked(request.settings, progress_bar, dry_run=True)
        for target, head in heads.items():
            make_console().print(f"would learn {target}: {head.in_words}", markup=False, highlight=False)
        return
    from umbrella.assessment.summary import print_evaluation
    from umbrella.baseline.run import run_baseline

    for evaluated in run_baseline(request.settings, progress_bar):
        print_evaluation(evaluated, make_console())


if __name__ == "__main__":
    run_script(main, __doc__)
