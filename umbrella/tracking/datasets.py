"""The data of a run as MLflow's inputs: how many, about whom, and how their labels are spread."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from umbrella.conversations.schema import Conversation


def describe(
    split: str, conversations: Sequence[Conversation], fingerprint: str, paths: Sequence[str]
) -> dict[str, Any]:
    """What is told of a split. Classes are counted, numbers have their mean; nobody is named.

    Args:
        split: "training", "validation" or "test", the context of MLflow's input.
        fingerprint: of the data that the split is of.
        paths: where they come from; none where from the phantom cohort.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    numbers: dict[str, list[float]] = defaultdict(list)
    for c in conversations:
        if isinstance(c.label, str):
            counts[c.target][c.label] += 1
        elif c.label is not None:
            numbers[c.target].append(float(c.label))
    labels: dict[str, Any] = {target: dict(sorted(count.items())) for target, count in sorted(counts.items())}
    labels |= {t: {"count": len(some), "mean": sum(some) / len(some)} for t, some in sorted(numbers.items())}
    return {
        "name": split,
        "digest": fingerprint,
        "source": ", ".join(paths) or "phantom cohort",
        "profile": {
            "split": split,
            "conversations": len(conversations),
            "subjects": len({c.subject_id for c in conversations}),
            "labels": labels,
        },
    }


def to_input(told: Mapping[str, Any]) -> DatasetInput:
    """``describe``'s answer as MLflow has it."""
    dataset = Dataset(
        name=told["name"],
        digest=told["digest"],
        source_type="local",
        source=json.dumps({"uri": told["source"]}),
        profile=json.dumps(told["profile"]),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", told["name"])])
