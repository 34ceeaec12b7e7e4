"""An evaluation in MLflow: in the run of the training that it is of, or in one of its own."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

from umbrella.assessment.assessment import AS_ASKED, Assessment
from umbrella.assessment.report import write_report
from umbrella.assessment.section import CHIEF
from umbrella.base import note
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.subgroups import band_names
from umbrella.paths import METRICS, PROGRESS, REPORT, SETTINGS
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.provenance import describe
from umbrella.tracking.redaction import read_salt, redact_subjects
from umbrella.tracking.run_status import find_run
from umbrella.tracking.store import is_metric, open_experiment, tracking_uri
from umbrella.training.training_state import read_training_state

ARTIFACTS = "evaluation"
"""Folder of the report among a run's artifacts."""


def log(assessment: Assessment, folder: Path, asked: Sequence[Conversation]) -> None:
    """Tell MLflow what was found, under the names that ``metrics`` gives, and keep report and numbers as artifacts.

    With ``tracking.hash_subjects`` the report is without pictures of single subjects, which show their names.

    Args:
        folder: of the evaluation, whole.
    """
    settings, checkpoint = assessment.settings, Path(assessment.model)
    storage = Path(settings.resources.storage).absolute()
    uri = tracking_uri(storage, settings.tracking.uri)
    experiment = open_experiment(uri, settings.experiment, storage)
    training = find_run(uri, checkpoint.parent)
    if training:
        tracker = training
    else:
        tracker = MlflowLogger.start(uri, experiment, f"evaluation of {checkpoint.parent.name}", folder=folder)
        told = {k: v for k, v in settings.flat().items() if k.split(".")[0] in ("evaluate", "checkpoint", "data")}
        tracker.params(told)
        tracker.text(settings.to_yaml(), SETTINGS)
    found = dict(metrics(assessment))
    refused = sorted(name for name in found if not is_metric(name))
    if refused:
        note(f"MLflow takes no such names, so it has not: {', '.join(refused)}")
    paths = getattr(settings.data, assessment.split)
    tracker.inputs([describe(assessment.split, asked, str(assessment.facts["data fingerprint"]), paths)])
    step = read_training_state(checkpoint).step if (checkpoint / PROGRESS).is_file() else 0
    tracker.results({name: value for name, value in found.items() if name not in refused}, step)
    for name, text in _texts(assessment, folder, asked).items():
        tracker.text(text, f"{ARTIFACTS}/{name}")
    if not training:
        tracker.end()


def metrics(assessment: Assessment) -> Iterator[tuple[str, float]]:
    """Names and values for MLflow: ``test/<target>/<way>/<level>/<metric>``, of all of a target's answers.

    Of a control ``test_shuffled/...`` and ``test_text_only/...``; of what a target is judged by also ``.../low`` and
    ``.../high``. What is not defined is left out.
    """
    for condition, groups in assessment.groups.items():
        prefix = assessment.split if condition == AS_ASKED else f"{assessment.split}_{condition}"
        for group in (group for group in groups if group.by == "all"):
            values = {}
            for name, estimate in group.metrics.items():
                values[name] = estimate.value
                if name.split("/")[-1] == CHIEF[group.kind]:
                    values |= {f"{name}/low": estimate.low, f"{name}/high": estimate.high}
            values |= group.references
            if group.invalid is not None:
                values["invalid"] = group.invalid
            yield from ((f"{prefix}/{group.target}/{n}", v) for n, v in values.items() if isfinite(v))


def _texts(assessment: Assessment, folder: Path, asked: Sequence[Conversation]) -> dict[str, str]:
    """Name to content of the files that MLflow gets."""
    names = (REPORT, METRICS)
    settings = assessment.settings
    if not settings.tracking.hash_subjects:
        return {name: (folder / name).read_text(encoding="utf-8") for name in names}
    subjects = {subject for c in asked for subject in c.subjects}
    with TemporaryDirectory() as temporary:
        write_report(Path(temporary), nameless(assessment, subjects, read_salt(settings.resources.storage)), ())
        return {name: (Path(temporary) / name).read_text(encoding="utf-8") for name in names}


def nameless(assessment: Assessment, subjects: Collection[str], salt: str) -> Assessment:
    """The same, with these subjects hashed in all that a report without pictures of subjects tells beside numbers."""
    # Not on the page that is made of it: there an id such as 24 looks like any count.
    hidden = partial(redact_subjects, subjects=subjects, salt=salt)
    bands = band_names(assessment.settings.evaluate.bands)
    groups = {
        condition: [replace(g, value=g.value if g.value in bands else hidden(g.value)) for g in own]
        for condition, own in assessment.groups.items()
    }
    return replace(assessment, groups=groups, notes=[hidden(note) for note in assessment.notes])
