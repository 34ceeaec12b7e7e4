"""What a trained network answered, as any evaluation: its tables, its report, and both in the run of the training."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from umbrella.assessment.assessment import AS_ASKED, Assessment
from umbrella.assessment.report import interval, named, value, write_report
from umbrella.assessment.section import CHIEF
from umbrella.base import UserError
from umbrella.baseline.job import PREDICTIONS, BaselineJob
from umbrella.evaluation.prediction import read_predictions
from umbrella.evaluation.tables import tabulate
from umbrella.tracking.runs import Tracker
from umbrella.training.progress import best_checkpoint, read_progress

if TYPE_CHECKING:
    from rich.table import Table


def assess(job: BaselineJob) -> Assessment:
    """The assessment of a training that has ended.

    Raises:
        UserError: it has no checkpoint that was evaluated.
    """
    tune = job.settings.tune
    best = best_checkpoint(job.folder, tune.metric, tune.mode)
    if best is None:
        raise UserError(f"{job.folder}: no checkpoint with a {tune.metric}; train anew under another name")
    settings = job.settings.with_values({"evaluate.controls": [], "evaluate.generate": False, "evaluate.pictures": 0})
    predictions = read_predictions(Path(job.folder) / PREDICTIONS)
    labels = list({(sample.subject_id, sample.label): sample.label for sample in ray.get(job.samples)}.values())
    groups = tabulate(predictions, settings.evaluate, settings.seed, {job.target: labels})
    return Assessment(
        settings=settings,
        model=str(best),
        split=settings.evaluate.split,
        predictions={AS_ASKED: predictions},
        groups={AS_ASKED: groups},
        facts={"network": f"SFCN, a 3D CNN, for {job.target}", **job.data},
        notes=["This is the baseline: a network that sees one volume of each conversation, and no words."],
    )


def keep(assessment: Assessment, job: BaselineJob) -> Path:
    """Write the report into the training's folder, and it and the numbers into the training's run; the page."""
    page = write_report(Path(job.folder) / f"report_{assessment.split}", assessment, ())
    tracker = Tracker(str(job.tracking["uri"]), job.folder)
    whole = [group for group in assessment.groups[AS_ASKED] if group.by == "all"]
    measured = {
        f"{assessment.split}/{group.target}/{name}": estimate.value
        for group in whole
        for name, estimate in group.metrics.items()
        if isfinite(estimate.value)
    }
    tracker.metrics(measured, read_progress(assessment.model).step)
    tracker.flush()
    for name in ("report.html", "metrics.json"):
        tracker.artifact(page.with_name(name), f"report_{assessment.split}")
    return page


def table(assessment: Assessment) -> "Table":
    """The chief metric of every group, with its interval and what is reached without looking."""
    from rich.table import Table

    drawn = Table("target", "part", "conversations", "subjects", "metric", "value", "interval", "without looking")
    for group in assessment.groups[AS_ASKED]:
        chief = CHIEF[group.kind]
        way = "likelihood" if group.kind == "classes" else "generated"
        estimate = group.metrics[f"{way}/subjects/{chief}"]
        blind = group.references.get("chance" if group.kind == "classes" else "mean/mae")
        part = "all" if group.by == "all" else f"{group.by} {group.value}"
        counts = (str(group.conversations), str(group.subjects))
        drawn.add_row(
            group.target, part, *counts, named(chief), value(estimate.value), interval(estimate), value(blind)
        )
    return drawn
