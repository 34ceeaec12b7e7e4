"""The baseline: its network, and what it learns from."""

from typing import Any

import pytest

from tests.conftest import make_conversation
from umbrella.base import UserError
from umbrella.baseline.run import training_settings
from umbrella.baseline.targets import BinEncoding, ClassEncoding, find_volume, fit_encoding, make_samples
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation

CHANNELS = [32, 64, 128, 256, 256, 64]


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [((2, 2, 2), 0), ((4, 9, 5), 1), ((8, 8, 8), 2), ((24, 24, 24), 3), ((96, 96, 96), 5), ((160, 192, 160), 5)],
)
def test_the_number_of_halving_blocks_follows_the_grid(grid: tuple[int, int, int], blocks: int) -> None:
    import torch

    from umbrella.baseline.task import Sfcn

    channels = [1, 1, 1, 1, 1, 2]  # of one channel: the largest grid would take seconds
    net = Sfcn(grid, channels, 7).eval()
    assert net.blocks == blocks
    out = net(torch.randn(2, 1, *grid))
    assert out.shape == (2, 7)
    assert torch.allclose(out.exp().sum(1), torch.ones(2))


def test_the_network_of_the_paper_has_as_many_parameters_as_one_counts_by_hand() -> None:
    from umbrella.baseline.task import Sfcn

    kernels = 27 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 256) + 256 * 64
    biases, norms, head = sum(CHANNELS), 2 * sum(CHANNELS), 64 * 40 + 40
    assert kernels + biases + norms + head == 2_952_936
    net = Sfcn((160, 192, 160), CHANNELS, 40)
    assert sum(weight.numel() for weight in net.parameters()) == 2_952_936


def test_frames_of_a_series_are_channels() -> None:
    import torch

    from umbrella.baseline.task import Sfcn

    assert Sfcn((8, 8, 8), [4, 4, 4], 3, inputs=5)(torch.randn(2, 5, 8, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("age", [20, 20.4, 47, 63.25, 80])
def test_a_soft_label_sums_to_one_and_its_mean_is_the_age(age: float) -> None:
    bins = fit_encoding("age", [20, 80, 33.0], 40)
    assert isinstance(bins, BinEncoding)
    soft = bins.encode(age)
    assert soft.shape == (40,)
    assert soft.sum() == pytest.approx(1)
    assert bins.decode(soft.tolist()) == pytest.approx(age, abs=0.002 * bins.width)
    assert bins.encode(200).tolist() == bins.encode(80).tolist()


def test_labels_that_cannot_be_learned_are_refused() -> None:
    assert fit_encoding("sex", ["male", "female", "male"], 40) == ClassEncoding(("female", "male"))
    with pytest.raises(UserError, match=r"^target 'x': all labels in data\.train are 'male', so there is nothing"):
        fit_encoding("x", ["male", "male"], 40)
    with pytest.raises(UserError, match="has classes \\(male\\) and numbers"):
        fit_encoding("x", ["male", 3], 40)


@pytest.mark.parametrize(
    ("encoding", "labels", "metric"),
    [
        (ClassEncoding(("female", "male")), {"female", "male"}, "eval/x/balanced_accuracy"),
        (ClassEncoding(("female", "male")), {"male"}, "eval/loss"),
        (BinEncoding(0, 1, 40), set(), "eval/x/mae"),
    ],
)
def test_the_best_checkpoint_is_chosen_by_a_metric_that_there_is(encoding: Any, labels: set, metric: str) -> None:
    tune = training_settings(load_settings(), "x", encoding, labels).tune
    assert (tune.metric, tune.mode) == (metric, "max" if metric.endswith("accuracy") else "min")


def about(subject: str, *turns: Any, label: Any = "male", **metadata: Any) -> Conversation:
    talk = [turn for content in turns for turn in (("user", list(content)), ("assistant", "Yes."))]
    found = {"subject_id": subject, "subject_label": label, "target": "sex", **metadata}
    return make_conversation(*talk, task_id=f"{subject}-{len(turns)}", metadata=found)


def test_a_sample_is_the_subjects_own_scan_and_never_the_references() -> None:
    def chosen(*turns: Any, modality: str = "sMRI", **metadata: Any) -> str | None:
        return find_volume(about("a", *turns, **metadata), modality)

    own, other, own_d, other_d = ("sMRI", "own"), ("sMRI", "other"), ("dMRI", "own_d"), ("dMRI", "other_d")
    reference = {"reference_id": "b"}
    assert chosen([own, "?"]) == "own"
    assert chosen([own, own_d, "?"]) == "own"
    assert chosen([own], [own_d, "?"]) == "own"
    assert chosen([own_d, "?"]) is None
    assert chosen([other], [own, "?"], **reference) == "own"
    assert chosen([other, own, "?"], **reference) == "own"
    assert chosen([other, other_d], [own, own_d, "?"], **reference) == "own"
    assert chosen([other, other_d], [own_d, "?"], **reference) is None
    assert chosen([other, own_d, "?"], **reference) is None
    assert chosen([other, own_d, "?"], modality="dMRI", **reference) == "own_d"


def test_a_volume_that_is_asked_about_twice_is_one_sample_with_one_label() -> None:
    twice = [about("a", [("sMRI", "x")]), about("a", [("sMRI", "y")], [("sMRI", "x")], reference_id="b")]
    others = [about("b", [("sMRI", "y")], label="female"), about("c", [("sMRI", "z")], target="age", label=3)]
    assert [(s.path, s.subject_id, s.label) for s in make_samples([*twice, *others], "sex", "sMRI")] == [
        ("x", "a", "male"),
        ("y", "b", "female"),
    ]
    with pytest.raises(UserError, match=r"^x: its sex is 'male' in a-1 and 'female' in d-1; one of them is wrong"):
        make_samples([*twice, about("d", [("sMRI", "x")], label="female")], "sex", "sMRI")
