"""Scores of confounds, matched subjects, partial correlations and external sites, on planted cases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error

from tests.conftest import make_conversation, make_prediction
from umbrella.config import Settings
from umbrella.evaluation.confounds import CALIPER, analyse_confounds, brain_volumes, match, site_drop
from umbrella.evaluation.group_metrics import tabulate
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import AS_ASKED, EvaluationResult, write_report
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.evaluation_run.evaluate import with_confounds
from umbrella.modality import Modality
from umbrella.volumes.store import VolumeStore

SETTINGS = EvaluateSettings(bootstrap=200)
SEXES = ("female", "male")
Draw = Callable[[np.random.Generator, int], float]


def of_both_sexes(draw: np.random.Generator, male: int) -> float:
    return draw.normal(1200, 100)


def of_each_sex(draw: np.random.Generator, male: int) -> float:
    return draw.normal(1200 + 160 * male, 100)


def people(number: int, seed: int, head: Draw, sees: str = "head") -> list[Prediction]:
    """Men and women with a head size; the answer depends on the head size, or on the label and noise ("label")."""
    draw, made = np.random.default_rng(seed), []
    for i in range(number):
        male = i % 2
        size = head(draw, male)
        evidence = (size - 1280) / 40 if sees == "head" else 2 * male - 1 + draw.normal(0, 0.8)
        probability = 1 / (1 + np.exp(-evidence))
        metadata = {"brain_volume": size, "site": "abc"[i % 3], "sex": SEXES[male], "age": float(draw.integers(20, 80))}
        answer = dict(zip(SEXES, (1 - probability, probability), strict=True))
        made.append(make_prediction(f"{seed}-{i}", SEXES[male], metadata=metadata, probabilities=answer))
    return made


def ages(number: int, seed: int) -> list[Prediction]:
    """Ages that depend on brain volume, site and chance; the answers know half of the chance."""
    draw, made = np.random.default_rng(seed), []
    for i in range(number):
        volume, site, own = draw.normal(), i % 2, draw.normal()
        label, answer = (50 + 5 * volume + 4 * site + 5 * part for part in (own, 0.6 * own + 0.8 * draw.normal()))
        metadata = {"brain_volume": volume, "site": "ab"[site]}
        made.append(make_prediction(f"{seed}-{i}", label, target="age", predicted=answer, metadata=metadata))
    return made


def analyse(predictions: list[Prediction], training: list[Prediction], **others: Any) -> Any:
    return analyse_confounds(predictions, training, {}, SETTINGS.model_copy(update=others))[0]


def test_a_label_that_is_head_size_is_explained_by_the_confounds() -> None:
    found = analyse(people(400, 1, of_each_sex), people(300, 2, of_each_sex))
    assert found.model.value > 0.75
    assert found.confounds_alone.value > 0.75
    assert found.difference.low < 0 < found.difference.high
    assert abs(found.matched["brain_volume"][1].value - 0.5) < 0.03
    assert found.matched["age"][1].value > 0.75
    assert found.partial.low < 0 < found.partial.high


def test_a_label_that_is_independent_of_head_size_is_not_explained_by_the_confounds() -> None:
    found = analyse(people(400, 1, of_both_sexes, "label"), people(300, 2, of_both_sexes))
    assert found.confounds_alone.low < 0.5 < found.confounds_alone.high
    assert found.difference.low > 0.2
    assert found.partial.low > 0.5
    for number, score in found.matched.values():
        assert number > 300
        assert abs(score.value - found.model.value) < 0.03


def test_scores_and_partial_correlations_equal_scikit_learn() -> None:
    predictions, training = ages(80, 1), ages(100, 2)
    found = analyse(predictions, training)
    labels, answers = ([getattr(p, name) for p in predictions] for name in ("label", "predicted"))
    assert found.model.value == pytest.approx(mean_absolute_error(labels, answers))
    fields = [[p.metadata for p in rows] for rows in (training, predictions)]
    known, new = (np.array([[m["site"] == "a", m["site"] == "b", m["brain_volume"]] for m in of]) for of in fields)
    mean, deviation = known[:, 2].mean(), known[:, 2].std()
    for table in (known, new):
        table[:, 2] = (table[:, 2] - mean) / deviation
    ridge = RidgeCV(np.logspace(-3, 3, 13)).fit(known, [p.label for p in training])
    assert found.confounds_alone.value == pytest.approx(mean_absolute_error(labels, ridge.predict(new)))
    left = [np.array(values) - LinearRegression().fit(new, values).predict(new) for values in (labels, answers)]
    assert found.partial.value == pytest.approx(np.corrcoef(*left)[0, 1])
    assert found.matched == {}

    sexes = people(60, 1, of_each_sex)
    said = [max(p.probabilities, key=p.probabilities.__getitem__) for p in sexes]
    found = analyse(sexes, people(60, 2, of_each_sex))
    assert found.model.value == pytest.approx(balanced_accuracy_score([p.label for p in sexes], said))


def test_intervals_of_partial_correlations_have_their_coverage() -> None:
    training = ages(60, 0)
    found = [analyse(ages(60, seed), training, confounds=["brain_volume", "site"]).partial for seed in range(1, 201)]
    assert 0.89 < np.mean([low < 0.6 < high for _, low, high in found]) < 0.99


def test_only_confounds_that_most_subjects_have_are_used_and_others_are_left_out() -> None:
    predictions, training = people(40, 1, of_each_sex), people(40, 2, of_each_sex)
    predictions[0].metadata["age"] = None  # type: ignore[index]
    predictions[1].metadata["brain_volume"] = float("nan")  # type: ignore[index]
    for i, p in enumerate(training):
        p.metadata["motion"] = 0.1 * i if i < 15 else None  # type: ignore[index]
        p.metadata["scanner"] = "one"  # type: ignore[index]
    names = ["sex", "brain_volume", "age", "motion", "scanner", "education"]
    found = analyse(predictions, training, confounds=names)
    assert found.names == ("brain_volume", "age")
    assert (found.subjects, found.left_out) == (38, 2)
    assert analyse(predictions, training, confounds=["sex", "scanner"]) is None
    assert analyse([], training) is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (str, "it has more than one category per five subjects"),
        (lambda i: i if i < 20 else None, "at least half of the subjects do not have it"),
        (lambda _: "a", "it is constant in the training split"),
        (lambda i: "abcd"[i % 4], None),
        (lambda i: 0.5 * i, None),
    ],
)
def test_a_confound_that_is_not_used_has_a_reason(values: Callable[[int], Any], reason: str | None) -> None:
    predictions, training = people(40, 1, of_each_sex), people(40, 2, of_each_sex)
    for rows in (predictions, training):
        for i, p in enumerate(rows):
            p.metadata.update(scanner=values(i), age=None)  # type: ignore[attr-defined]
    settings = SETTINGS.model_copy(update={"confounds": ["sex", "age", "brain_volume", "scanner"]})
    found, reasons = analyse_confounds(predictions, training, {}, settings)
    assert found is not None
    assert found.names == ("brain_volume", "scanner")[: 1 + (reason is None)]
    assert reasons == ({"scanner": reason} if reason else {})


def test_confounds_have_no_score_where_a_class_has_one_training_subject() -> None:
    training = people(40, 2, of_each_sex)
    found = analyse(people(40, 1, of_each_sex), [p for p in training if p.label == "male"] + training[:1])
    assert found.model.value > 0.5
    assert np.isnan([*found.confounds_alone, *found.difference]).all()


@pytest.mark.parametrize(("number", "defined"), [(7, False), (8, True)])
def test_a_partial_correlation_needs_two_subjects_per_coefficient(number: int, defined: bool) -> None:
    found = analyse(ages(number, 1), ages(40, 2), confounds=["site", "brain_volume"])
    assert found.coefficients == 4
    assert np.isfinite(found.partial.value) == defined


@pytest.mark.parametrize("classes", [2, 3])
def test_matched_subjects_are_alike_and_each_is_used_once(classes: int) -> None:
    draw = np.random.default_rng(0)
    labels = [str(i % classes) for i in range(90)]
    sizes = [float(draw.normal(int(label), 1)) for label in labels]
    sites = [str(draw.integers(3)) for _ in labels]
    for values in (sizes, sites):
        sets = match(values, labels)
        assert len(sets) > 5
        assert all(sorted(labels[i] for i in one) == [str(c) for c in range(classes)] for one in sets)
        assert len({i for one in sets for i in one}) == classes * len(sets)
    assert all(len({sites[i] for i in one}) == 1 for one in match(sites, labels))
    anchors = match(sizes, labels)
    assert all(abs(sizes[i] - sizes[one[0]]) <= CALIPER * np.std(sizes) for one in anchors for i in one)


def of_sites(seed: int, errors: dict[str, float]) -> list[Prediction]:
    draw, made = np.random.default_rng(seed), []
    for i in range(90):
        site, label = "abc"[i % 3], float(draw.integers(20, 80))
        answer = label + draw.normal(0, errors[site])
        made.append(make_prediction(f"s{i}", label, target="age", predicted=answer, metadata={"site": site}))
    return made


def test_the_drop_at_external_sites_is_found_where_there_is_one() -> None:
    found = site_drop(of_sites(0, {"a": 5, "b": 5, "c": 15}), {"a", "b"}, SETTINGS)
    assert found is not None
    assert found.subjects == (60, 30)
    assert found.difference.low > 0
    assert found.difference.value == pytest.approx(found.external.value - found.known.value)
    equal = [site_drop(of_sites(seed, dict.fromkeys("abc", 5.0)), {"a", "b"}, SETTINGS) for seed in range(200)]
    assert 0.89 < np.mean([drop.difference.low < 0 < drop.difference.high for drop in equal if drop]) < 0.99
    assert site_drop(of_sites(0, dict.fromkeys("abc", 5.0)), set("abc"), SETTINGS) is None
    assert site_drop([], {"a"}, SETTINGS) is None


def test_brain_volume_is_that_of_the_foreground_in_the_store(tmp_path: Path) -> None:
    voxels = np.zeros((8, 8, 8), np.float32)
    voxels[2:6, 2:6, 2:7] = np.arange(1, 81).reshape(4, 4, 5)
    nib.Nifti1Image(voxels, np.diag([2, 3, 4, 1])).to_filename(tmp_path / "a.nii")
    nib.Nifti1Image(voxels, np.diag([2, 2, 2, 1])).to_filename(tmp_path / "b.nii")
    modalities = {
        "sMRI": Modality(grid=(8,) * 3, patch=(8,) * 3),
        "dMRI": Modality(grid=(16,) * 3, patch=(8,) * 3, fit="spacing", spacing=2.0),
    }
    store = VolumeStore(tmp_path / "store", modalities, 10**6)
    files = {str(tmp_path / f"{name}.nii"): kind for name, kind in (("a", "sMRI"), ("b", "dMRI"), ("missing", "sMRI"))}
    asked = [make_conversation(("user", [(kind, f)]), ("assistant", "x"), task_id=f) for f, kind in files.items()]
    assert brain_volumes(asked, store) == {}
    a, b, _ = files
    for file in (a, b):
        store.get(file, files[file])
    assert brain_volumes(asked, store) == pytest.approx({a: 80 * 24 / 1000, b: 80 * 8 / 1000})


def test_an_evaluation_has_the_confounds_of_each_target(tmp_path: Path) -> None:
    values = {"resources.storage": str(tmp_path), "evaluate.bootstrap": 100}
    settings = Settings().with_values({**values, "evaluate.confounds": ["age", "site", "brain_volume", "motion"]})
    answers = people(30, 1, of_each_sex)
    training = [
        make_conversation(("assistant", "x"), task_id=p.subject_id, metadata={**p.metadata, "site": "a"} | labelled)
        for p in people(30, 2, of_each_sex)
        for labelled in [{"target": "sex", "subject_label": p.label}]
    ]
    groups = {AS_ASKED: tabulate(answers, settings.evaluate)}
    result = EvaluationResult(settings, "m", "test", {AS_ASKED: answers}, groups, {})
    result = with_confounds(result, training, [])
    assert result.confounds["sex"].names == ("age", "brain_volume")
    assert result.notes == ["confound motion is not used for sex: at least half of the subjects do not have it"]
    assert result.site_drop["sex"].subjects == (10, 20)
    page = write_report(tmp_path, result, ()).read_text(encoding="utf-8")
    assert "Confounds: age, brain_volume." in page
    assert "External sites" in page
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    number, score = result.confounds["sex"].matched["age"]
    assert metrics["confounds"]["sex"]["matched"]["age"] == [number, score._asdict()]
