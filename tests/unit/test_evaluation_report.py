"""The report of an evaluation: all numbers, one file, nothing from elsewhere, and no words taken as HTML."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from umbrella.config import Settings
from umbrella.evaluation.figures import aggregate_subjects, draw_confusion, draw_controls, draw_likelihood, draw_scatter
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
from umbrella.evaluation.subgroups import Estimate, Group
from umbrella.evaluation_run.evaluate import anonymised
from umbrella.inference.cases import select_cases
from umbrella.tracking.redaction import hash_subject

CLASSES = {"sex": ("female", "male"), "diagnosis": ("AD", "CN", "MCI"), "age": ()}
CLASS_METRICS = ("accuracy", "balanced_accuracy", "f1")
NUMBER_METRICS = ("mae", "rmse", "r2", "pearson")
EVIL = "<script>alert('1')</script>"
NAN = float("nan")


def rows(target: str, seed: int = 0, skill: float = 1.5) -> list[Prediction]:
    """24 subjects with 3 conversations each; the last is a comparison; some answers are invalid."""
    draw = np.random.default_rng(seed)
    made = []
    for subject in range(24):
        label = draw.uniform(20, 80) if target == "age" else CLASSES[target][subject % len(CLASSES[target])]
        for kind in range(3):
            said = None if draw.random() < 0.08 else label + draw.normal(0, 9) if target == "age" else label
            probabilities = {}
            if CLASSES[target]:
                scores = draw.normal(size=len(CLASSES[target])) + skill * np.array(
                    [c == label for c in CLASSES[target]]
                )
                shares = np.exp(scores) / np.exp(scores).sum()
                probabilities = dict(zip(CLASSES[target], shares.tolist(), strict=True))
                said = said and max(probabilities, key=probabilities.__getitem__)
            text = "I cannot say." if said is None else f"{said:.0f} years." if target == "age" else f"{said}."
            made.append(
                Prediction(
                    task_id=f"sub-{subject:04d}_{target}_{kind}",
                    task_type="T3" if kind == 2 else "T1",
                    subject_id=f"sub-{subject:04d}",
                    target=target,
                    label=label,
                    truth=f"{label}.",
                    metadata={"site": f"site {subject % 3}"},
                    volumes=(("sMRI", f"/data/sub-{subject:04d}_T1w.nii.gz"),),
                    probabilities=probabilities,
                    answer_nll=2.0,
                    answer_tokens=4,
                    text=text,
                    said=said,
                )
            )
    return made


def group(target: str, by: str = "all", of: str = "", shift: float = 0.0, seed: int = 0) -> Group:
    """Numbers out of the air, no two alike."""
    draw = np.random.default_rng([seed, *f"{target}{by}{of}{shift}".encode()])
    classes = CLASSES[target]
    kind: Literal["classes", "numbers"] = "classes" if classes else "numbers"

    def estimate(name: str) -> Estimate:
        large = name in ("mae", "rmse")
        middle = draw.uniform(5, 9) - 9 * shift if large else draw.uniform(0.7, 0.9) + shift
        return Estimate(middle, middle - draw.uniform(0.05, 0.1), middle + draw.uniform(0.05, 0.1))

    per_class = [f"{m}/{c}" for m in ("recall", "precision") for c in classes]
    two = ["sensitivity", "specificity"] if len(classes) == 2 else []
    names = [
        f"{way}/{level}/{metric}"
        for way in (("likelihood", "generated") if classes else ("generated",))
        for level in ("conversations", "subjects", *(("votes",) if classes else ()))
        for metric in (*CLASS_METRICS, *per_class, *two)
        + (("auc", "brier", "calibration_error") if way == "likelihood" and level != "votes" else ())
        if classes
    ] or [f"generated/{level}/{metric}" for level in ("conversations", "subjects") for metric in NUMBER_METRICS]
    counts = [[int(n) for n in row] for row in draw.integers(1, 20, (len(classes), len(classes) + 1))]
    return Group(
        target=target,
        kind=kind,
        by=by,
        value=of,
        conversations=int(draw.integers(30, 90)),
        subjects=int(draw.integers(10, 24)),
        classes=classes,
        invalid=int(draw.integers(1, 9)),
        ties={"likelihood": 0, "generated": int(draw.integers(1, 5))} if classes else {},
        metrics={name: estimate(name.rsplit("/", 1)[-1] if not classes else name) for name in names},
        references={"chance": 1 / len(classes), "majority": 0.54} if classes else {"mean/mae": 14.2, "mean/rmse": 17.0},
        confusion={f"{w}/{at}": counts for w in ("likelihood", "generated") for at in ("conversations", "subjects")}
        if classes
        else {},
    )


def assessment(targets: Sequence[str] = ("sex", "diagnosis", "age"), **others: Any) -> EvaluationResult:
    parts = [("task_type", "T1"), ("task_type", "T3"), ("comparison_type", "different"), ("comparison_type", "same")]
    parts += [("site", f"site {i}") for i in range(3)] + [("age", band) for band in ("below 40", "40 to 60", "from 60")]
    shifts = dict(zip(CONDITIONS, (0.0, -0.25, -0.3), strict=True))
    made = EvaluationResult(
        settings=Settings(),
        model="/models/step_0000100",
        split="test",
        predictions={c: [p for t in targets for p in rows(t, i)] for i, c in enumerate(CONDITIONS)},
        groups={
            c: [group(t, by, of, shift=shift) for t in targets for by, of in [("all", ""), *parts]]
            for c, shift in shifts.items()
        },
        facts={"data fingerprint": "1f0c9a7e", "quarantined samples": 2, "seconds": 93.21, "device": "cpu"},
        notes=["3 subjects are also in the training split: sub-0001, sub-0002, sub-0003"],
    )
    return replace(made, **others)


class Page(HTMLParser):
    """The tags of a page, its text, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [text for name, text in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult]:
    """The folder of a report, and what it was made of."""
    folder, found = tmp_path_factory.mktemp("evaluation"), assessment()
    picture = BytesIO()
    Image.new("RGB", (40, 20)).save(picture, "PNG")
    asked = found.predictions[AS_ASKED]
    cases = [
        Case(p, kind, (picture.getvalue(),), mapped=True)
        for target in CLASSES
        for kind, p in select_cases([p for p in asked if p.target == target], 1)
    ]
    write_report(folder, found, cases)
    return folder, found


@pytest.fixture(scope="module")
def page(written: tuple[Path, EvaluationResult]) -> Page:
    return Page((written[0] / "report.html").read_text(encoding="utf-8"))


def test_every_group_has_its_numbers_on_the_page(page: Page, written: tuple[Path, EvaluationResult]) -> None:
    shown = set(page.words)
    for condition, groups in written[1].groups.items():
        for one in groups:
            name = "generated/subjects/mae" if one.target == "age" else "likelihood/subjects/balanced_accuracy"
            assert format_value(one.metrics[name].value) in shown, (condition, one)
            if condition == AS_ASKED:
                if one.by not in ("all", "comparison_type"):
                    assert f"{one.value} {one.conversations} {one.subjects} " in page.text
                assert format_interval(one.metrics[name]) in page.text
                assert str(one.invalid) in shown
    for whole in (g for g in written[1].groups[AS_ASKED] if g.by == "all"):
        for name, estimate in whole.metrics.items():
            assert f"{format_value(estimate.value)} {format_interval(estimate)}" in page.text, name
            assert metric_name(name.split("/", 2)[2]) in page.text


def test_the_page_needs_nothing_but_itself(page: Page, written: tuple[Path, EvaluationResult]) -> None:
    html = (written[0] / "report.html").read_text(encoding="utf-8")
    assert {urlsplit(address).scheme for address in page.addresses} == {"data"}
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in html
    assert "url(" not in html
    assert not page.open
    pictures = sorted(file.name for file in written[0].glob("*.png"))
    drawn = {"1_sex": "controls confusion likelihood", "2_diagnosis": "controls confusion likelihood"}
    drawn["3_age"] = "controls scatter"
    assert pictures == sorted(f"{target}_{name}.png" for target, names in drawn.items() for name in names.split())
    assert len(page.addresses) == len(pictures) + 6  # a best and a worst case of each target


def test_what_must_be_known_stands_before_the_numbers(page: Page) -> None:
    assert page.text.index("3 subjects are also in the training split") < page.text.index("Results")
    assert "1f0c9a7e" in page.text
    assert "another label than the reference" in page.text


def test_what_people_wrote_is_never_taken_as_html(tmp_path: Path) -> None:
    def page_of(word: str) -> Page:
        fine = assessment(["sex"])
        sex = [replace(g, value=word if g.by == "site" else g.value) for g in fine.groups[AS_ASKED]]
        renamed = {"female": "female", "male": word}
        groups = [
            replace(
                g,
                target=word,
                classes=("female", word),
                metrics={name.replace("/male", f"/{word}"): e for name, e in g.metrics.items()},
            )
            for g in sex
        ]
        asked = [
            replace(
                p,
                target=word,
                subject_id=word + p.subject_id,
                label=renamed[str(p.label)],
                text=word,
                probabilities={renamed[c]: share for c, share in p.probabilities.items()},
            )
            for p in fine.predictions[AS_ASKED]
        ]
        cases = [Case(p, kind, ()) for kind, p in select_cases(asked, 1)]
        found = replace(fine, predictions={AS_ASKED: asked}, groups={AS_ASKED: groups}, model=word, notes=[word])
        found = replace(found, facts={word: word})
        return Page(write_report(tmp_path / str(len(word)), found, cases).read_text(encoding="utf-8"))

    tame, page = page_of("x"), page_of(EVIL)
    assert page.tags == tame.tags
    assert page.text.count(EVIL) > 12


def test_subjects_are_hashed_and_no_number_changes_where_ids_are_numbers(tmp_path: Path) -> None:
    named = assessment(notes=["two subjects are also in the training split: 24, 0"])
    hidden = anonymised(named, {"24", "0", "1", "40"}, "salt")
    assert hidden.notes == [
        f"two subjects are also in the training split: {hash_subject('24', 'salt')}, {hash_subject('0', 'salt')}"
    ]
    for name, told in (("named", named), ("hidden", hidden)):
        write_report(tmp_path / name, told, ())
    before, after = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("named", "hidden"))
    assert "40 to 60" in [group["value"] for group in after["as_asked"]]
    for condition, groups in before.items():
        for group, other in zip(groups, after[condition], strict=True):
            assert group | {"value": ""} == other | {"value": ""}


def test_metrics_json_has_all_groups_and_null_for_what_is_not_defined(tmp_path: Path) -> None:
    found = assessment(["sex"])
    first = replace(found.groups[AS_ASKED][0], metrics={"likelihood/subjects/auc": Estimate(0.5, NAN, NAN)})
    found = replace(found, groups=dict(found.groups) | {AS_ASKED: [first, *found.groups[AS_ASKED][1:]]})
    found = replace(found, predictions={AS_ASKED: []})  # and so few figures
    page = write_report(tmp_path, found, [])
    read = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert {condition: len(groups) for condition, groups in read.items()} == dict.fromkeys(CONDITIONS, 11)
    assert read[AS_ASKED][0]["metrics"] == {"likelihood/subjects/auc": {"value": 0.5, "low": None, "high": None}}
    assert read["shuffled"][3]["value"] == "different"
    assert "nan" not in Page(page.read_text()).text.lower().split()


def test_predictions_csv_has_a_row_for_each_answer(written: tuple[Path, EvaluationResult]) -> None:
    with (written[0] / "predictions.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 * 3 * 24 * 3
    first = written[1].predictions[AS_ASKED][0]
    assert table[0]["condition"] == AS_ASKED
    assert float(table[0]["p(female)"]) == first.probabilities["female"]
    assert table[0]["p(MCI)"] == ""
    assert json.loads(table[0]["metadata"]) == first.metadata


def test_without_controls_the_page_says_that_nothing_is_known_of_the_images(tmp_path: Path) -> None:
    fine = assessment(["age"])
    only = {AS_ASKED: fine.groups[AS_ASKED]}
    page = Page(write_report(tmp_path, replace(fine, groups=only, notes=(), facts={}), []).read_text())
    assert "it is not known how much of the score comes from the images" in page.text


def test_free_texts_have_a_report_too(tmp_path: Path) -> None:
    metrics = {f"generated/conversations/{m}": Estimate(0.4, 0.3, 0.5) for m in ("token_f1", "rouge_l", "exact")}
    whole = Group("finding", "texts", "all", "", 9, 3, (), 0, {}, metrics, {})
    answers = [replace(p, target="finding", label=None, probabilities={}, said=None) for p in rows("age")[:9]]
    found = assessment(["age"], groups={AS_ASKED: [whole]}, predictions={AS_ASKED: answers})
    page = Page(write_report(tmp_path, found, []).read_text())
    assert "token F1 0.400 (0.300 to 0.500)" in page.text


def test_a_subject_is_the_mean_of_its_conversations() -> None:
    one = replace(rows("age")[0], probabilities={"a": 0.2, "b": 0.8}, said=10.0)
    rest = [replace(one, probabilities={"a": 0.6, "b": 0.4}, said=20.0), replace(one, said=None, probabilities={})]
    (merged,) = aggregate_subjects([one, *rest])
    assert merged.said == 15
    assert merged.probabilities == pytest.approx({"a": 0.4, "b": 0.6})


def test_figures_show_what_they_are_given() -> None:
    controls = draw_controls([("asked", Estimate(0.8, 0.7, 0.9), "a"), ("text", Estimate(0.5, NAN, NAN), "b")], "x", [])
    assert [line.get_xdata()[0] for line in controls.axes[0].lines if line.get_marker() == "o"] == [0.8, 0.5]
    confusion = draw_confusion([("a", [[5, 1, 0], [2, 3, 4]])], ["f", "m"])
    assert [t.get_text() for t in confusion.axes[0].texts] == ["5", "1", "0", "2", "3", "4"]
    assert [t.get_text() for t in confusion.axes[0].get_xticklabels()] == ["f", "m", "none"]
    sure = {"female": {"female": 0.9, "male": 0.1}, "male": {"female": 0.3, "male": 0.7}}
    sex = [replace(p, probabilities=sure[str(p.label)]) for p in rows("sex")]
    roc, reliability = draw_likelihood(sex, ("female", "male")).axes
    assert "male: area 1" in [t.get_text() for t in roc.get_legend().get_texts()]
    bins = reliability.collections[1].get_offsets()
    np.testing.assert_allclose(bins, [(0.7, 1), (0.9, 1)])
    ages = rows("age")
    scatter = draw_scatter(ages, "age").axes[0]
    assert len(scatter.collections[0].get_offsets()) == sum(p.said is not None for p in ages)
    assert scatter.get_xlim() == scatter.get_ylim()
