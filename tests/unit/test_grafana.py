"""The Grafana dashboard in ray_configs/ asks whichever Prometheus a person has for what trainings tell Ray."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella.training.progress_log import EVALUATION_GAUGE, gauge_name
from umbrella.training.throughput import Throughput, memory

FILE = Path(__file__).resolve().parents[2] / "ray_configs" / "grafana_dashboard.json"
LABELS = {"run", "trial", "metric"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    """Every PromQL expression: of the panels, and of the variables."""
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def test_each_metric_that_is_asked_for_is_one_that_a_training_tells(dashboard: dict[str, Any]) -> None:
    throughput = Throughput()
    throughput.step(1, 1)
    told = {"train/loss", "train/lr", *throughput.recent(), *memory(torch.device("cuda"))}
    gauges = {f"ray_{name}" for name in [EVALUATION_GAUGE, *map(gauge_name, told)]}
    asked = {name for query in queries(dashboard) for name in re.findall(r"\bray_\w+", query)}
    assert asked <= gauges


def test_queries_and_legends_use_labels_and_variables_that_are_there(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for query in queries(dashboard):
        assert set(re.findall(r"(\w+)=~?\"", query)) <= LABELS
        assert set(re.findall(r"\$(\w+)", query)) <= variables
    legends = {target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert legends == {"{{run}}"}
    assert all("max by (run, trial)" in target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


def test_all_data_come_from_the_source_that_a_person_chooses(dashboard: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert dashboard["templating"]["list"][0]["name"] == "datasource"
    for panel in dashboard["panels"]:
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen, chosen]
    asked = [variable["datasource"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert asked == [chosen] * 3
    assert "__inputs" not in dashboard, "a provisioned file is asked for no input"


def test_panels_have_numbers_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert all(
        panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        for panel in dashboard["panels"]
    )
