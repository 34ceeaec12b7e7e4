"""Some validation questions and what the model finds likely, as a table that MLflow's page shows."""

import hashlib
import json
from collections.abc import Sequence

from umbrella.data.mask_audit import Hide
from umbrella.evaluation.predictions import Prediction, most_likely

FILE = "predictions.json"
SHOWN_AS = {"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])}
"""The tag by which MLflow's page knows the file for a table."""
COLUMNS = ("task_id", "task_type", "target", "subject", "truth", "chosen", "right", "probabilities", "nll_per_token")


def predictions_json(scored: Sequence[Prediction], count: int, hide: Hide) -> str:
    """A table of so many questions, of all of them by chance but the same in every run on the same data.

    ``probabilities`` are of the candidate answers; ``chosen`` is the most likely one, nothing where two are equally so.
    Questions without candidates (numbers) have ``nll_per_token`` alone: nats per token of the true answer.

    Args:
        hide: applied to what names subjects.
    """
    drawn = sorted(scored, key=lambda s: hashlib.sha256(s.task_id.encode()).digest())[:count]
    rows = []
    for s in sorted(drawn, key=lambda s: s.task_id):
        chosen = most_likely(s.probabilities)
        values = (
            hide(s.task_id, s.subjects),
            s.task_type,
            s.target,
            hide(s.subject_id, [s.subject_id]),
            s.label,
            chosen,
            chosen == s.label if s.probabilities else None,
            {label: round(p, 4) for label, p in s.probabilities.items()},
            None if s.nll_per_token is None else round(s.nll_per_token, 4),
        )
        rows.append(values)
    return json.dumps({"columns": COLUMNS, "data": rows})
