"""The report of an evaluation and its figures."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_prediction
from umbrella.config import Settings
from umbrella.evaluation.figures import draw_confusion, draw_controls, draw_likelihood, draw_scatter
from umbrella.evaluation.group_metrics import Estimate, tabulate
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import (
    AS_ASKED,
    CONDITIONS,
    Case,
    EvaluationResult,
    format_interval,
    format_value,
    metric_name,
    write_report,
)
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.evaluation_run.evaluate import anonymised
from umbrella.inference.cases import select_cases
from umbrella.tracking.provenance import hash_subject

EVIL = "<script>alert('1')</script>"
NAN = float("nan")


def predictions(target: str, seed: int = 0, word: str = "male") -> list[Prediction]:
    """24 subjects with 3 conversations each, the last of them a comparison; some answers are invalid."""
    draw = np.random.default_rng(seed)
    made = []
    for i in range(24):
        label: Any = draw.uniform(20, 80) if target == "age" else ("female", word)[i % 2]
        for kind in range(3):
            other: dict[str, Any] = (
                {"predicted": label + draw.normal(0, 9)} if target == "age" else {"predicted": label}
            )
            if target != "age":
                share = draw.uniform(0.2, 1)
                other["probabilities"] = {label: share, ("female", word)[1 - i % 2]: 1 - share}
            if draw.random() < 0.1:
                other["predicted"] = None
            metadata = {"site": f"{word} {i % 3}", "age": 20 + 2 * i, "reference_label": "female"}
            other |= {
                "task_id": f"{target}_{i}_{kind}",
                "metadata": metadata if kind == 2 else {"site": f"{word} {i % 3}"},
            }
            made.append(make_prediction(f"sub-{i:04d}", label, target=target, text=word, **other))
    return made


def evaluation(targets: Sequence[str] = ("sex", "age"), word: str = "male", **others: Any) -> EvaluationResult:
    answers = {c: [p for t in targets for p in predictions(t, i, word)] for i, c in enumerate(CONDITIONS)}
    groups = {c: tabulate(rows, EvaluateSettings(bootstrap=100)) for c, rows in answers.items()}
    facts, notes = {"data fingerprint": "1f0c9a7e", word: 2}, [f"3 subjects are also in the training split: {word}"]
    made = EvaluationResult(Settings(), f"/models/{word}/step_0000100", "test", answers, groups, facts, notes)
    return replace(made, **others)


class Page(HTMLParser):
    """The tags of a page, its text, and the addresses that it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [text for name, text in attrs if name in ("src", "srcset", "data")]
        self.links += [text for name, text in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def write(folder: Path, result: EvaluationResult) -> Page:
    picture = BytesIO()
    Image.new("RGB", (40, 20)).save(picture, "PNG")
    cases = [
        Case(p, kind, (picture.getvalue(),), mapped=True)
        for target in ("sex", "age")
        for kind, p in select_cases([p for p in result.predictions[AS_ASKED] if p.target == target], 1)
    ]
    return Page(write_report(folder, result, cases).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    """The page of ``evaluation()``, with its other files in ``folder``."""
    return write(folder, evaluation())


def test_the_page_has_the_metrics_of_every_group(page: Page) -> None:
    shown = set(page.words)
    for condition, groups in evaluation().groups.items():
        for group in groups:
            name = "generated/subjects/mae" if group.target == "age" else "likelihood/subjects/balanced_accuracy"
            assert format_value(group.metrics[name].value) in shown, (condition, group)
            if condition == AS_ASKED:
                assert format_interval(group.metrics[name]) in page.text
            if condition == AS_ASKED and group.by == "all":
                for name, estimate in group.metrics.items():
                    assert f"{format_value(estimate.value)} {format_interval(estimate)}".strip() in page.text, name
                    assert metric_name(name.split("/", 2)[2]) in page.text
    assert page.text.index("3 subjects are also in the training split") < page.text.index("Results")
    assert "1f0c9a7e" in page.text
    assert "another label than the reference" in page.text


def test_the_page_is_self_contained(page: Page, folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert {urlsplit(address).scheme for address in page.addresses} == {"data"}
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in html
    assert "url(" not in html
    figures = {"1_age_controls", "1_age_scatter", "2_sex_confusion", "2_sex_controls", "2_sex_likelihood"}
    assert {file.stem for file in folder.glob("*.png")} == figures
    assert len(page.addresses) == len(figures) + 4, "a best and a worst case of each target"
    assert page.links
    assert all((folder / link).exists() for link in page.links)


def test_names_from_the_data_are_never_html(page: Page, tmp_path: Path) -> None:
    evil = write(tmp_path, evaluation(word=EVIL))
    assert evil.tags == page.tags
    assert evil.text.count(EVIL) > 12


def test_metrics_json_and_predictions_csv_have_everything(page: Page, folder: Path) -> None:
    result = evaluation()
    groups = json.loads((folder / "metrics.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert {c: len(of_one) for c, of_one in groups.items()} == {c: len(of_one) for c, of_one in result.groups.items()}
    first = result.groups[AS_ASKED][0].metrics["generated/subjects/mae"]
    assert groups[AS_ASKED][0]["metrics"]["generated/subjects/mae"] == first._asdict()
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(CONDITIONS) * 2 * 24 * 3
    prediction = result.predictions[AS_ASKED][0]
    assert table[0]["condition"] == AS_ASKED
    assert table[0]["said"] == (prediction.predicted or "")
    assert float(table[0]["p(female)"]) == prediction.probabilities["female"]
    assert table[-1]["p(male)"] == ""
    assert json.loads(table[0]["metadata"]) == prediction.metadata


def test_candidates_of_a_question_have_no_columns_of_their_own(tmp_path: Path) -> None:
    shares = {"left": 0.9, "right, mostly": 0.1}
    own = make_prediction("a", "left", target="side", probabilities=shares, metadata={"candidates": [*shares]})
    result = evaluation(["sex"])
    answers = {AS_ASKED: [*result.predictions[AS_ASKED], own]}
    write(tmp_path, replace(result, predictions=answers, groups={AS_ASKED: result.groups[AS_ASKED]}))
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        *others, last = csv.DictReader(file)
    assert [name for name in last if name.startswith("p(")] == ["p(female)", "p(male)"]
    assert (json.loads(last["probabilities"]), last["p(male)"]) == (shares, "")
    assert {row["probabilities"] for row in others} == {""}


def test_undefined_metrics_are_null_and_a_report_without_controls_says_so(tmp_path: Path) -> None:
    answers = [make_prediction("ab"[i % 2], None, target="finding", text=f"{i}.", truth="1.") for i in range(4)]
    (whole, *_) = tabulate(answers, EvaluateSettings(bootstrap=100))
    whole.metrics = {**whole.metrics, "generated/subjects/exact": Estimate(0.25, NAN, NAN)}
    page = write(tmp_path, evaluation(groups={AS_ASKED: [whole]}, predictions={AS_ASKED: answers}, notes=(), facts={}))
    assert "it is not known how much of the score comes from the images" in page.text
    assert "token F1 0.250" in page.text
    assert "nan" not in page.text.lower().split()
    (group,) = json.loads((tmp_path / "metrics.json").read_text())[AS_ASKED]
    assert group["metrics"]["generated/subjects/exact"] == {"value": 0.25, "low": None, "high": None}


def test_hashed_subject_ids_change_no_number() -> None:
    notes = ["two subjects are also in the training split: 24, 0"]
    named = evaluation(["sex"], notes=notes)
    hidden = anonymised(named, {"24", "0", "1", "40"}, "salt")
    assert hidden.notes == [notes[0].replace("24, 0", ", ".join(hash_subject(i, "salt") for i in ("24", "0")))]
    values = [group.value for group in hidden.groups[AS_ASKED]]
    assert "40 to 60" in values
    assert f"male {hash_subject('1', 'salt')}" in values
    for group, other in zip(named.groups[AS_ASKED], hidden.groups[AS_ASKED], strict=True):
        assert replace(group, value="") == replace(other, value="")


def test_figures_show_the_values_that_they_are_given() -> None:
    controls = draw_controls([("asked", Estimate(0.8, 0.7, 0.9), "a"), ("text", Estimate(0.5, NAN, NAN), "b")], "x", [])
    assert [line.get_xdata()[0] for line in controls.axes[0].lines if line.get_marker() == "o"] == [0.8, 0.5]
    confusion = draw_confusion([("a", [[5, 1, 0], [2, 3, 4]])], ["f", "m"])
    assert [t.get_text() for t in confusion.axes[0].texts] == ["5", "1", "0", "2", "3", "4"]
    assert [t.get_text() for t in confusion.axes[0].get_xticklabels()] == ["f", "m", "none"]
    sure = {"female": {"female": 0.9, "male": 0.1}, "male": {"female": 0.3, "male": 0.7}}
    sex = [replace(p, probabilities=sure[str(p.label)]) for p in predictions("sex")]
    roc, reliability = draw_likelihood(sex, ("female", "male")).axes
    assert "male: area 1" in [t.get_text() for t in roc.get_legend().get_texts()]
    np.testing.assert_allclose(reliability.collections[1].get_offsets(), [(0.7, 1), (0.9, 1)])
    ages = predictions("age")
    scatter = draw_scatter(ages, "age").axes[0]
    assert len(scatter.collections[0].get_offsets()) == sum(p.predicted is not None for p in ages)
    assert scatter.get_xlim() == scatter.get_ylim()
