"""Importance: a planted effect is found, what has none is not, and with too little to go by there is no number."""

import numpy as np
import pytest

from umbrella.training.progress_log import FINISHED
from umbrella.tuning.results import MIN_TRIALS, Trial, compute_importance
from umbrella.tuning.sweep_files import FAILED


def planted(n: int, effect: str, seed: int = 0) -> list[Trial]:
    """Random points of which one setting decides; the rank is there with adapters only."""
    draws = np.random.default_rng(seed)
    trials = []
    for i in range(n):
        point = {
            "optim.lr": float(10 ** draws.uniform(-5, -1)),
            "optim.weight_decay": float(draws.uniform(0, 0.3)),
            "model.train": str(draws.choice(["all", "lora"])),
            "seed": i,
        }
        if point["model.train"] == "lora":
            point["model.lora_rank"] = int(draws.integers(1, 64))
        metric = 0.7 + draws.normal(0, 0.02)
        metric += {
            "lr": -0.1 * (np.log10(point["optim.lr"]) + 3) ** 2,
            "train": 0.2 * (point["model.train"] == "lora"),
            "rank": 0.01 * (point.get("model.lora_rank", 32) - 32),
            "none": 0.0,
        }[effect]
        trials.append(Trial(f"t{i}", point, FINISHED, float(metric), 0.5, 30, "/c"))
    return trials


EFFECTS = {"lr": "optim.lr", "rank": "model.lora_rank", "train": "model.train"}


@pytest.mark.parametrize(("effect", "name"), EFFECTS.items())
def test_the_setting_that_decides_is_found_also_where_some_points_lack_it(effect: str, name: str) -> None:
    found = compute_importance(planted(24, effect))
    assert found.significant[0] == name
    assert found.shares[name] > 0.9  # with the rank in place of whether there is one, too
    assert "optim.weight_decay" in found.shares
    assert "optim.weight_decay" not in found.significant
    assert "seed" not in found.shares
    assert found.r2 > 0.3


def test_where_nothing_matters_nothing_is_claimed() -> None:
    found = compute_importance(planted(24, "none"))
    assert (found.significant, found.shares) == ([], {})
    assert f"R² = {found.r2:.2f}" in found.unavailable


def test_with_too_few_or_equal_trials_it_says_so_instead_of_a_number() -> None:
    few = planted(MIN_TRIALS - 1, "lr")
    failed = [Trial(f"f{i}", t.point, FAILED, t.metric) for i, t in enumerate(few)]
    flat = [Trial(f"e{i}", t.point, FINISHED, 0.5) for i, t in enumerate(planted(MIN_TRIALS, "lr"))]
    seeds = [Trial(f"s{i}", {"seed": i}, FINISHED, 0.5 + i) for i in range(MIN_TRIALS)]
    for trials, why in ((few + failed, "At least 8"), (flat, "same metric"), (seeds, "No setting")):
        found = compute_importance(trials)
        assert found.shares == {}
        assert why in found.unavailable
