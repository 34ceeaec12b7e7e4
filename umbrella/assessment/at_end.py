"""The evaluation that a training, and the winner of a sweep, ends with."""

from pathlib import Path

from rich.console import Console

from umbrella.assessment.questions import of_checkpoint
from umbrella.assessment.run import evaluate
from umbrella.assessment.summary import print_evaluation
from umbrella.base import ProgressBar
from umbrella.config import Settings
from umbrella.evaluation.answering import settings_of


def evaluate_at_end(settings: Settings, checkpoint: Path, name: str, progress: ProgressBar, console: Console) -> None:
    """Evaluate a checkpoint on ``evaluate.split``, if ``evaluate.at_end`` says so and there is that split.

    Args:
        settings: of the training.
        name: of the training or sweep; the evaluation's folder has it.

    Raises:
        UserError: as ``run.evaluate``.
    """
    if not settings.evaluate.at_end:
        return
    own = settings_of(checkpoint.absolute(), settings.model.dtype)
    named = settings.model_copy(update={"name": name, "output": ""})
    evaluated = evaluate(of_checkpoint(named, checkpoint.absolute(), own), progress)
    if evaluated:
        print_evaluation(evaluated, console)
    else:
        console.print(f"no evaluation: data.{settings.evaluate.split} is not set", markup=False, highlight=False)
