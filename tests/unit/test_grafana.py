"""The Grafana dashboard in ray_configs/ queries the gauges of trainings from the Prometheus that the user chooses."""

import json
import re
from pathlib import Path

import torch

from umbrella.training.progress_log import EVALUATION_GAUGE, Throughput, gauge_name, memory

FILE = Path(__file__).resolve().parents[2] / "ray_configs" / "grafana_dashboard.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS, VARIABLES = DASHBOARD["panels"], DASHBOARD["templating"]["list"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
ASKED = [variable for variable in VARIABLES if variable["type"] == "query"]
QUERIES = [target["expr"] for target in TARGETS] + [variable["query"]["query"] for variable in ASKED]


def test_queries_are_of_gauges_labels_and_variables_that_exist() -> None:
    throughput = Throughput()
    throughput.step(1, 1)
    metrics = {"train/loss", "train/lr", *throughput.recent(), *memory(torch.device("cuda"))}
    gauges = {f"ray_{name}" for name in [EVALUATION_GAUGE, *map(gauge_name, metrics)]}
    variables = {variable["name"] for variable in VARIABLES}
    for query in QUERIES:
        assert set(re.findall(r"\bray_\w+", query)) <= gauges
        assert set(re.findall(r"(\w+)=~?\"", query)) <= {"run", "trial", "metric"}
        assert set(re.findall(r"\$(\w+)", query)) <= variables
    assert {target["legendFormat"] for target in TARGETS} == {"{{run}}"}
    assert all("max by (run, trial)" in target["expr"] for target in TARGETS)


def test_all_data_come_from_the_source_that_the_user_chooses() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert VARIABLES[0]["name"] == "datasource"
    assert all(part["datasource"] == chosen for part in [*PANELS, *TARGETS, *ASKED])
    assert len(ASKED) == 3
    assert "__inputs" not in DASHBOARD, "a provisioned file is asked for no input"


def test_panels_have_ids_titles_and_units_and_do_not_overlap() -> None:
    assert sorted(panel["id"] for panel in PANELS) == list(range(1, len(PANELS) + 1))
    assert all(p["title"] and p["description"] and p["fieldConfig"]["defaults"]["unit"] for p in PANELS)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
