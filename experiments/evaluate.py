"""What does a trained model know, and does it know it from the images? Ask a checkpoint a whole split, with controls.

  evaluate.py checkpoint=STEP
  evaluate.py checkpoint=STEP data.test=other/test.jsonl evaluate.controls=[]

STEP is a step_... folder of a training. Everything else is as it was in the training unless it is given. --dry-run says
what would be asked.
"""

from umbrella.base import UserError
from umbrella.cli import Request, make_console, progress_bar, run_script


def main(request: Request) -> None:
    """Evaluate, or say what would be asked."""
    from umbrella.assessment.checkpoints import named_checkpoint
    from umbrella.assessment.questions import read_questions, settings_for
    from umbrella.assessment.run import evaluate
    from umbrella.assessment.summary import print_evaluation, print_plan

    settings = settings_for(named_checkpoint(request.settings), request.files, request.overrides)
    split = settings.evaluate.split
    nothing = UserError(f"data.{split} is not set: name the conversations to ask, or another evaluate.split")
    if request.dry_run:
        questions = read_questions(settings, progress_bar, volumes=False)
        if questions is None:
            raise nothing
        print_plan(settings, questions, make_console())
        return
    evaluated = evaluate(settings, progress_bar)
    if evaluated is None:
        raise nothing
    print_evaluation(evaluated, make_console())


if __name__ == "__main__":
    run_script(main, __doc__)
