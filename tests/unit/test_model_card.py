"""The model card and the drafts of checklists hold what the run knows, and mark the rest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_conversation, make_prediction
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.calibration import calibrate
from umbrella.evaluation.group_metrics import tabulate
from umbrella.evaluation.report import AS_ASKED, EvaluationResult
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.evaluation_run.model_card import AUTHORS, write_model_card

FEW = EvaluateSettings(bootstrap=100)
SEXES = ("female", "male|x")
"""The second name would break a table in which it is not escaped."""


def conversation(i: int, subject: str) -> Conversation:
    metadata = {
        "subject_id": subject,
        "subject_label": SEXES[i % 2],
        "target": "sex",
        "age": 20 + 10 * i,
        "site": "Oslo",
    }
    return make_conversation(("user", "Sex?"), ("assistant", "x"), task_id=f"{subject}-{i}", metadata=metadata)


def evaluation(checkpoint: Path, **overrides: Any) -> EvaluationResult:
    settings = load_settings(overrides={"data.train": ["/secret/cohort/train.jsonl"], **overrides})
    rows = {
        condition: [
            make_prediction(f"sub-{i:04d}", SEXES[i % 2], metadata={"site": "Oslo"}, text="?", probabilities=shares)
            for i in range(20)
            for own in [SEXES[(i + (i % 5 == 0) * wrong) % 2]]
            for shares in [{name: 0.8 if name == own else 0.2 for name in SEXES}]
        ]
        for condition, wrong in ((AS_ASKED, 1), ("text_only", 0))
    }
    groups = {condition: tabulate(of_one, FEW) for condition, of_one in rows.items()}
    facts = {"data fingerprint": "1f0c9a7e", "seconds": 7, "processes": "1 on CPU", "quarantined samples": 2}
    calibration = calibrate(rows[AS_ASKED], {"sex": 1.5}, FEW)
    notes = ["sub-0001 is twice"]
    return EvaluationResult(settings, str(checkpoint), "test", rows, groups, facts, notes, calibration=calibration)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of a training of 61 s, in a sweep whose other trial took 39 s."""
    for name, seconds in (("one", 61), ("two", 39)):
        folder = tmp_path / "trials" / name / "step_0000050"
        folder.mkdir(parents=True)
        (folder.parent / "evaluations.jsonl").write_text(f'{{"step": 50, "begun": 100, "time": {100 + seconds}}}\n')
    checkpoint = tmp_path / "trials" / "one" / "step_0000050"
    hub = "/cache/hub/models--llava-hf--llava-interleave-qwen-0.5b-hf/snapshots/1"
    (checkpoint / "settings.yaml").write_text(load_settings(overrides={"model.checkpoint": hub}).to_yaml())
    (checkpoint / "code.json").write_text(json.dumps({"torch": "2.9.1"}))
    (checkpoint / "progress.json").write_text(json.dumps({"step": 50, "position": 400}))
    return checkpoint


@pytest.fixture
def written(checkpoint: Path, tmp_path: Path) -> tuple[str, str]:
    splits = {name: [conversation(i, f"sub-{name}{i}") for i in range(n)] for name, n in (("train", 6), ("test", 4))}
    write_model_card(tmp_path, evaluation(checkpoint), splits, {"image_path": 2, "conversations.role": 1})
    return (tmp_path / "model_card.md").read_text("utf-8"), (tmp_path / "checklists.md").read_text("utf-8")


def test_the_metadata_block_parses_and_has_the_results(written: tuple[str, str]) -> None:
    _, block, _ = written[0].split("---\n", 2)
    metadata = yaml.safe_load(block)
    assert "license" not in metadata
    assert metadata["base_model"] == "llava-hf/llava-interleave-qwen-0.5b-hf"
    assert (metadata["library_name"], metadata["datasets"]) == ("umbrella-mri", ["cohort"])
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "cohort", "type": "cohort", "split": "test"}
    assert {"type": "balanced_accuracy", "name": "likelihood/subjects/balanced_accuracy", "value": 0.8} in result[
        "metrics"
    ]


def test_the_card_has_what_the_run_knows(written: tuple[str, str]) -> None:
    card = written[0]
    assert "| train | 6 | 6 | female 3, male\\|x 3 | mean 45.0, SD 17.1, 20 to 70 | Oslo 6 |" in card
    assert "2, because of (a sample may have several): image_path (2), conversations.role (1)" in card
    assert "is in both the training and the test split; this was checked. The evaluation did not compare other" in card
    assert "50 steps: 61 s on 1 x (0.5 CPUs, 0 GPUs); the 2 trials of the sweep 100 s; evaluation: 7 s" in card
    assert "energy: not measured" in card
    assert "| sex | balanced accuracy, likelihood, subjects | 0.800 (" in card
    assert "| sex | site | Oslo | 20 | balanced accuracy | 0.800 (" in card
    assert "| sex | 1.5 | calibration error | " in card
    assert "train.jsonl" in card
    assert "torch 2.9.1" in card


def test_the_card_has_no_subject_ids_and_no_folders(written: tuple[str, str]) -> None:
    for text in written:
        assert "sub-" not in text
        assert "/secret" not in text


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]


def test_tables_have_as_many_cells_in_each_row(written: tuple[str, str]) -> None:
    for text in written:
        for table in filter(None, (rows_of(part) for part in text.split("\n\n"))):
            assert {len(row) for row in table} == {len(table[0])}, table


def test_every_item_of_the_checklists_is_filled_or_marked(written: tuple[str, str]) -> None:
    parts = written[1].split("\n## ")[1:]
    numbers = []
    for part in parts:
        rows = [row for row in rows_of(part) if row[0] != "item"]
        assert all(len(row) == 3 and all(row) for row in rows)
        assert any(row[2] == AUTHORS for row in rows)
        assert sum(row[2] != AUTHORS for row in rows) > 15
        numbers.append([row[0] for row in rows])
    assert numbers[0] == [str(i) for i in range(1, 45)]
    assert len(numbers[1]) == len(set(numbers[1])) == 49
    assert {number.rstrip("abcdefg") for number in numbers[1]} == {str(i) for i in range(1, 20)}
    assert "| 12 | compute | 50 steps: 61 s on" in parts[1]
    assert "| 37 | performance with uncertainty | model_card.md, “Results” |" in parts[0]


def test_a_checkpoint_without_records_gives_a_card_too(tmp_path: Path) -> None:
    bare = {
        "data.train": [],
        "evaluate.pictures": 0,
        "evaluate.generate": False,
        "evaluate.allow_shared_subjects": True,
    }
    result = replace(evaluation(tmp_path / "somewhere", **bare), calibration={})
    result = replace(result, groups={AS_ASKED: result.groups[AS_ASKED]})
    write_model_card(tmp_path, result, {}, {})
    card = (tmp_path / "model_card.md").read_text("utf-8")
    assert "The synthetic phantom cohort, which has no patients" in card
    assert "unknown time" in card
    assert "Some subjects may be in the training and in the test split" in card
    assert f"## Software\n{AUTHORS}" in card
    assert "base_model" not in card
    assert card.count("\n\n## ") == card.count("## ") == 21
