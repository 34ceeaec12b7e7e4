"""One small training gives the order, masks, losses and metrics that are committed in golden.json.

Order and masks are exact. Losses and metrics have a relative tolerance, because sums round differently on other CPUs.
``python -m tests.ray.test_golden`` writes golden.json anew. Do so only in a commit that changes numbers on purpose, and
say there which ones and why; ``benchmarks/compare_commits.py`` shows what changed.
"""

import json
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import SMALL
from tests.ray.conftest import no_progress
from umbrella.cluster import start_ray
from umbrella.config import Settings, load_settings
from umbrella.data.ingest import load_splits
from umbrella.data.masking import loss_weights
from umbrella.data.rendering import load_renderer
from umbrella.data.settings import MaskPolicy
from umbrella.data.splits import Splits
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.checkpoint_files import read_history
from umbrella.training.launch import run_job
from umbrella.training.run import make_job

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-4
TRAINING = {
    "name": "golden",
    "experiment": "golden",
    "data.log_samples": True,
    "train.epochs": 3,
    "train.evaluate_every": 5,
    "train.batch_size": 2,
    "train.accumulate": 2,
    "train.augment.shift": 0.1,
    "train.augment.noise": 0.1,
}
"""15 steps of two micro-batches, evaluated three times."""
POLICIES: dict[str, dict[str, Any]] = {
    "assistant": {},
    "last assistant, each sample weighs the same": {"supervise": "last_assistant", "normalize": "sample"},
    "all turns and headers, by task": {"supervise": "all", "turn_header": True, "task_weights": {"T2": 0.5, "T3": 2.0}},
}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def measure(settings: Settings) -> dict[str, Any]:
    """Train in this process, as a trial of a sweep does.

    Args:
        settings: of a training that Ray is started for.

    Returns:
        What golden.json holds.
    """
    splits, storage = load_splits(settings, no_progress), Path(settings.resources.storage)
    folder, uri = storage / "trainings" / settings.name, tracking_uri(storage)
    experiment = open_experiment(uri, settings.experiment, storage)
    tracking = {"uri": uri, "experiment": experiment, "name": settings.name, "trial": settings.name}
    run_job(make_job(settings, splits, tracking, str(folder)), in_process=True)
    lines = map(json.loads, (folder / "samples_0.jsonl").read_text(encoding="utf-8").splitlines())
    client = MlflowClient(uri)
    (run,) = client.search_runs([experiment])
    losses, tokens = (
        client.get_metric_history(run.info.run_id, f"train/{name}") for name in ("loss", "supervised_tokens")
    )
    return {
        "order": {str(line["position"]): line["task_ids"] for line in lines if "task_ids" in line},
        "supervised_tokens": [int(m.value) for m in sorted(tokens, key=lambda m: m.step)],
        "masks": masks(settings, splits),
        "losses": [m.value for m in sorted(losses, key=lambda m: m.step)],
        "metrics": {
            str(row["step"]): {name: value for name, value in row.items() if name.startswith("eval/")}
            for row in read_history(folder)
        },
    }


def masks(settings: Settings, splits: Splits) -> dict[str, Any]:
    """Spans with their text, and runs of equal weights under each policy, of one conversation of each task type."""
    renderer, found = load_renderer(settings), {}
    for conversation in {c.task_type: c for c in reversed(splits.train)}.values():
        example = renderer.render(conversation)
        spans = [
            [s.turn, s.role, s.kind, s.stop - s.start, renderer.tokenizer.decode(example.input_ids[s.start : s.stop])]
            for s in example.spans
        ]
        weights = {name: loss_weights(example, MaskPolicy(**policy)).tolist() for name, policy in POLICIES.items()}
        runs = {name: [[w, len(list(run))] for w, run in groupby(values)] for name, values in weights.items()}
        found[conversation.task_id] = {"spans": spans, "weights": runs}
    return found


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """The committed file."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def now(small_settings: Any, ray_session: Any) -> dict[str, Any]:
    """What this code computes."""
    return measure(small_settings(TRAINING))


def test_sample_order_equals_the_golden_file(now: dict[str, Any], golden: dict[str, Any]) -> None:
    assert now["order"] == golden["order"]


def test_spans_and_weights_equal_the_golden_file(now: dict[str, Any], golden: dict[str, Any]) -> None:
    assert now["masks"] == golden["masks"]
    assert now["supervised_tokens"] == golden["supervised_tokens"]


def test_losses_are_within_tolerance_of_the_golden_file(now: dict[str, Any], golden: dict[str, Any]) -> None:
    assert len(golden["losses"]) == 15
    assert now["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE, abs=0)


def test_evaluation_metrics_are_within_tolerance_of_the_golden_file(
    now: dict[str, Any], golden: dict[str, Any]
) -> None:
    assert list(now["metrics"]) == ["5", "10", "15"]
    for step, metrics in golden["metrics"].items():
        assert now["metrics"][step] == pytest.approx(metrics, rel=TOLERANCE, abs=0, nan_ok=True)


def as_json(value: Any, indent: str = "") -> str:
    """JSON with one item of a dictionary, and one list without dictionaries, in a line."""
    if isinstance(value, dict):
        deeper = f"{indent} "
        items = (f"{deeper}{json.dumps(key)}: {as_json(item, deeper)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    return json.dumps(value, ensure_ascii=False)


def main() -> None:
    """Write golden.json."""
    with tempfile.TemporaryDirectory() as storage:
        settings = load_settings(overrides=SMALL | TRAINING | {"resources.storage": storage})
        start_ray(settings.resources, log_to_driver=False)
        GOLDEN.write_text(as_json(measure(settings)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
