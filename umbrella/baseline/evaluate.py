"""What a trained network answered, in the tables of any evaluation."""

from collections.abc import Sequence
from pathlib import Path

import ray

from umbrella.assessment.assessment import AS_ASKED, Assessment
from umbrella.baseline.job import PREDICTIONS, BaselineJob
from umbrella.baseline.samples import Sample
from umbrella.evaluation.prediction import read_predictions
from umbrella.evaluation.tables import tabulate
from umbrella.training.progress import best_checkpoint


def assess(job: BaselineJob) -> Assessment:
    """The assessment of a training that has ended."""
    samples: Sequence[Sample] = ray.get(job.samples)
    settings = job.settings.with_values({"evaluate.controls": [], "evaluate.generate": False})
    predictions = read_predictions(Path(job.folder) / PREDICTIONS)
    labels = list({(sample.subject_id, sample.label): sample.label for sample in samples}.values())
    groups = tabulate(predictions, settings.evaluate, settings.seed, {job.target: labels})
    return Assessment(
        settings=settings,
        model=str(best_checkpoint(job.folder, settings.tune.metric, settings.tune.mode)),
        split=settings.evaluate.split,
        predictions={AS_ASKED: predictions},
        groups={AS_ASKED: groups},
        facts={"model": f"baseline: SFCN for {job.target}", **job.data},
    )
