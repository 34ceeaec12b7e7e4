"""Metrics of numbers and of free texts: against scikit-learn and scipy, and worked out by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from umbrella.evaluation.metrics import number_metrics, text_metrics


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_numbers_are_measured_as_scikit_learn_and_scipy_do(offset: float) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(50, 15, 60) + offset
    said = truth + random.normal(2, 8, 60)
    weights = random.integers(0, 4, (5, 60)).astype(float)
    ours = number_metrics(truth, said, weights)
    for i, w in enumerate(weights):
        repeated = np.repeat(np.arange(60), w.astype(int))
        assert ours["mae"][i] == pytest.approx(sk.mean_absolute_error(truth, said, sample_weight=w))
        assert ours["rmse"][i] == pytest.approx(sk.root_mean_squared_error(truth, said, sample_weight=w))
        assert ours["r2"][i] == pytest.approx(sk.r2_score(truth, said, sample_weight=w))
        assert ours["pearson"][i] == pytest.approx(stats.pearsonr(truth[repeated], said[repeated]).statistic)


def test_what_varies_by_rounding_alone_does_not_vary() -> None:
    same, other = np.full(3, 0.1) * 3, np.array([1.0, 2.0, 4.0])
    drawn = np.array([[1.0, 1, 1], [3, 0, 0], [0, 0, 0]])
    found = number_metrics(same, other, drawn)
    assert np.isnan(found["r2"]).all()
    assert np.isnan(found["pearson"]).all()
    found = number_metrics(other, same, drawn)
    assert np.isnan(found["pearson"]).all()
    assert np.isnan(found["r2"]).tolist() == [False, True, True]
    assert np.isnan(found["mae"]).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("truth", "text", "token_f1", "rouge_l", "exact"),
    [
        ("The scan is normal.", "the scan is normal", 1, 1, 1),
        ("A scan is normal.", "The scan is normal", 1, 3 / 4, 1),  # articles count for ROUGE
        ("old brain small", "small old brain", 1, 2 / 3, 0),  # the order counts for ROUGE
        ("large left lesion", "lesion", 0.5, 0.5, 0),
        ("lesion lesion", "lesion", 2 / 3, 2 / 3, 0),
        ("lesion", "", 0, 0, 0),
        ("...", "", 1, 1, 1),
    ],
)
def test_texts_are_measured_as_squad_and_rouge_do(
    truth: str, text: str, token_f1: float, rouge_l: float, exact: float
) -> None:
    expected = {"token_f1": token_f1, "rouge_l": rouge_l, "exact": exact}
    assert text_metrics(truth, text) == pytest.approx(expected)
    assert text_metrics(text, truth) == pytest.approx(expected)
