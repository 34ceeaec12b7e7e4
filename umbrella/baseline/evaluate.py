"""What a trained network answered, as any evaluation: tables, files, report, and all of it in the training's run."""

import time
from pathlib import Path

from umbrella.assessment.assessment import AS_ASKED, Assessment
from umbrella.assessment.run import Evaluated, write
from umbrella.assessment.tracked import log
from umbrella.base import UserError
from umbrella.baseline.job import PREDICTIONS, BaselineJob
from umbrella.baseline.samples import asked
from umbrella.data.intake import Splits, fingerprint
from umbrella.evaluation.prediction import read_predictions
from umbrella.evaluation.tables import tabulate
from umbrella.storage import check_writable
from umbrella.training.progress import best_checkpoint

NOTE = "this network sees one volume of each conversation and no words; its numbers are computed, not generated"


def evaluate(job: BaselineJob, splits: Splits) -> Evaluated:
    """Count, write and track what the network of a training that has ended answered.

    Raises:
        UserError: it has no checkpoint that was evaluated; a folder that cannot be written to.
    """
    tune, split, own = job.settings.tune, job.settings.evaluate.split, job.settings.baseline
    best = best_checkpoint(job.folder, tune.metric, tune.mode)
    if best is None:
        raise UserError(f"{job.folder}: no checkpoint with a {tune.metric}; train anew under another name")
    folder = Path(job.settings.resources.storage).absolute() / "evaluations" / str(job.tracking["name"])
    if job.settings.output:  # a folder in it for each target
        folder = Path(job.settings.output).absolute() / job.target.replace("/", "_")
    check_writable(folder, f"output={folder}")
    # What a person may have asked of a language model, and this one has not.
    settings = job.settings.with_values({"evaluate.controls": [], "evaluate.generate": False, "evaluate.pictures": 0})
    predictions = read_predictions(Path(job.folder) / PREDICTIONS)
    labels = [c.label for c in splits.train if c.target == job.target and c.label is not None]
    groups = tabulate(predictions, settings.evaluate, settings.seed, {job.target: labels})
    conversations = getattr(splits, split)
    facts: dict[str, str | int | float] = {
        "network": f"SFCN, a 3D CNN, for {job.target}",
        "data fingerprint": fingerprint({split: conversations}),
        "quarantined samples": splits.quarantined,
        "seconds": round(time.time() - job.begun),
    }
    of_target = [c for c in conversations if c.target == job.target]
    answered = [c for c, _ in asked(conversations, job.target, own.modality)]
    notes = [NOTE]
    if len(answered) < len(of_target):
        notes.append(
            f"{len(answered)} of {len(of_target)} conversations about {job.target} have a {own.modality} to see"
        )
    assessment = Assessment(settings, str(best), split, {AS_ASKED: predictions}, {AS_ASKED: groups}, facts, notes)
    page = write(folder, assessment, ())
    log(assessment, folder, answered)
    return Evaluated(assessment, folder, page)
