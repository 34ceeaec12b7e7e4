"""The figures of a sweep: what each draws, for any search space."""

from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from umbrella.plots import DPI, GREEN, WIDTH, save_png
from umbrella.training.progress_log import FINISHED
from umbrella.tuning.figures import draw_curves, draw_metric, draw_ranking, draw_times
from umbrella.tuning.results import Configuration, Trial, rank_configurations
from umbrella.tuning.sweep_files import FAILED, STOPPED

METRIC = "eval/balanced_accuracy"


def trial(name: str, point: dict, metric: float | None, state: str = FINISHED, started: float = 0.0) -> Trial:
    times = {"begun": started, "time": 2 * started + 90.0}
    curve = [{"step": 10 * k, METRIC: (metric or 0) - 0.1 / k, "eval/loss": 1 / k} | times for k in (1, 2, 3)]
    return Trial(name, point, state, metric, 0.3, 30, "/c", "", curve if metric is not None else [])


def ranked(trials: list[Trial]) -> list[Configuration]:
    return rank_configurations(trials, "max")


def test_the_metric_has_a_panel_per_setting_and_a_line_per_combination_of_the_others() -> None:
    values = [
        (0.001, "all", 0.9, FINISHED),
        (0.01, "all", 0.6, STOPPED),
        (0.1, "all", 0.5, STOPPED),
        (0.001, "last_assistant", 0.8, FINISHED),
        (0.01, "last_assistant", 0.7, FINISHED),
        (0.1, "last_assistant", None, FAILED),
    ]
    grid = [trial(f"{i}", {"optim.lr": v[0], "mask.supervise": v[1]}, v[2], v[3]) for i, v in enumerate(values)]
    rate, policy = draw_metric(ranked(grid), METRIC).axes
    lines = [line.get_xydata().tolist() for line in rate.lines if len(line.get_xdata()) > 1]
    assert lines == [[[0.001, 0.9], [0.01, 0.6], [0.1, 0.5]], [[0.001, 0.8], [0.01, 0.7]]]
    assert [text.get_text() for text in rate.get_legend().texts] == ["supervise=all", "supervise=last_assistant"]
    hollow = {line.get_ydata()[0] for line in rate.lines if line.get_markerfacecolor() == "white"}
    assert hollow == {0.6, 0.5}
    assert (rate.get_xscale(), rate.get_xlabel(), rate.get_ylabel()) == ("log", "optim.lr", METRIC)
    assert [label.get_text() for label in policy.get_xticklabels()] == ["all", "last_assistant"]
    means = [line.get_xydata().tolist() for line in policy.lines if line.get_marker() == "_"]
    assert means == [[[0, pytest.approx(2 / 3)], [1, 0.75]]]
    assert rate.get_ylim() == policy.get_ylim()


def test_only_the_best_trial_has_a_star_and_only_in_panels_of_its_settings() -> None:
    trials = [trial("a", {"optim.lr": 0.1, "model.train": "all"}, 0.9)]
    trials += [trial(f"b{r}", {"optim.lr": 0.2, "model.train": "lora", "model.lora_rank": r}, 0.5) for r in (4, 8)]
    stars = {
        axes.get_xlabel().split("\n")[0]: [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "*"]
        for axes in draw_metric(ranked(trials), METRIC).axes
    }
    assert stars == {"optim.lr": [0.9], "model.train": [0.9], "model.lora_rank": []}


@pytest.mark.parametrize("rates", [[1e-4, 1e-2] * 4, [10.0**-i for i in range(7)], [0.1, 0.2, 0.3] * 2])
def test_trials_are_drawn_apart_and_within_the_panel(rates: list[float]) -> None:
    figure = draw_metric(ranked([trial(f"t{i}", {"optim.lr": r, "seed": i}, 0.5) for i, r in enumerate(rates)]), METRIC)
    [axes] = figure.axes
    figure.draw_without_rendering()
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    places = [line.get_transform().transform(line.get_xydata())[0] for line in points]
    assert len({tuple(place.round(3)) for place in places}) == len(rates)
    assert all(axes.bbox.x0 < x < axes.bbox.x1 for x, _ in places)
    assert max(x for x, _ in places) - min(x for x, _ in places) > 0.7 * axes.bbox.width


def test_curves_of_many_trials_name_the_best_five_and_one_is_thick() -> None:
    trials = [trial(f"t{i}", {"optim.lr": 1.0 + i}, 0.5 + i / 300) for i in range(100)]
    figure = draw_curves(ranked(trials), METRIC)
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels == [f"lr={n}" for n in (100, 99, 98, 97, 96)] + ["95 others"]
    for axes, last in zip(figure.axes, (trials[-1].curve[-1][METRIC], 1 / 3), strict=True):
        curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
        assert len(curves) == 100
        [thick] = [line for line in curves if line.get_linewidth() > 2]
        assert (to_hex(thick.get_color()).upper(), thick.get_ydata()[-1]) == (GREEN, last)


def test_the_ranking_shows_means_with_their_intervals() -> None:
    trials = [trial(f"{lr}{s}", {"optim.lr": lr, "seed": s}, lr + 0.1 * s) for lr in (0.1, 0.5) for s in (0, 1, 2)]
    [axes] = draw_ranking(ranked(trials), METRIC).axes
    bars = [container.get_children()[-1].get_segments()[0] for container in axes.containers]
    half = 4.3027 * 0.1 / 3**0.5  # Student's t
    assert [tuple(bar[:, 0]) for bar in bars] == [
        pytest.approx((mean - half, mean + half), rel=1e-4) for mean in (0.6, 0.2)
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr=0.5  1", "lr=0.1  2"]


@pytest.mark.parametrize(
    "points",
    [
        [{"mask.supervise": "all", "mask.end_of_turn": True}, {"mask.supervise": "all", "mask.end_of_turn": False}],
        [{"modalities.sMRI.grid": [8, 8, 8]}, {"modalities.sMRI.grid": [16, 16, 16]}],
        [{"optim.embedder_lr": None}, {"optim.embedder_lr": 0.1}],
        [{"model.train": "all"}, {"model.train": "lora", "model.lora_rank": 4}],
        [{"seed": 0}, {"seed": 1}],
        [{}, {}],
    ],
)
def test_any_search_space_can_be_drawn(tmp_path: Path, points: list[dict]) -> None:
    trials = [trial(f"t{i}", point, 0.5 + 0.1 * i) for i, point in enumerate(points)]
    configurations = ranked([*trials, Trial("dead", points[0], FAILED)])
    [times] = draw_times(trials).axes
    assert times.get_xlabel() == "seconds since the first trial began"
    for draw in (draw_metric, draw_curves, draw_ranking):
        with Image.open(save_png(tmp_path / "a.png", draw, configurations, METRIC)) as image:
            assert image.width >= 0.7 * WIDTH * DPI
            assert len(set(image.convert("RGB").resize((200, 200)).getdata())) > 20
