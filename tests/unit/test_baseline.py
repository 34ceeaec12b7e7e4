"""The baseline: its network, its labels and its samples."""

from typing import Any

import pytest

from tests.conftest import make_conversation
from umbrella.base import UserError
from umbrella.baseline.run import training_settings
from umbrella.baseline.targets import LabelEncoding, fit_encoding, make_samples, pair_with_volumes
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation


@pytest.mark.parametrize(
    ("grid", "blocks"), [((2, 2, 2), 0), ((4, 9, 5), 1), ((8, 8, 8), 2), ((24, 24, 24), 3), ((96, 96, 96), 5)]
)
def test_the_number_of_halving_blocks_follows_the_grid(grid: tuple[int, int, int], blocks: int) -> None:
    import torch

    from umbrella.baseline.task import Sfcn

    net = Sfcn(grid, [1, 1, 1, 1, 1, 2], 7, inputs=2).eval()  # of one channel: the largest grid would take seconds
    assert net.blocks == blocks
    out = net(torch.randn(2, 2, *grid))
    assert out.shape == (2, 7)
    assert torch.allclose(out.exp().sum(1), torch.ones(2))


def test_the_network_of_the_paper_has_the_number_of_parameters_of_the_paper() -> None:
    from umbrella.baseline.task import Sfcn

    channels = [32, 64, 128, 256, 256, 64]
    kernels = 27 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 256) + 256 * 64
    biases, norms, head = sum(channels), 2 * sum(channels), 64 * 40 + 40
    assert kernels + biases + norms + head == 2_952_936
    net = Sfcn((160, 192, 160), channels, 40)
    assert sum(weight.numel() for weight in net.parameters()) == 2_952_936


@pytest.mark.parametrize("age", [20, 20.4, 47, 63.25, 80])
def test_the_distribution_of_a_number_has_the_sum_1_and_the_number_as_mean(age: float) -> None:
    bins = fit_encoding("age", [20, 80, 33.0], 40)
    distribution = bins.encode(age)
    assert distribution.shape == (bins.num_outputs,) == (40,)
    assert distribution.sum() == pytest.approx(1)
    assert bins.decode(distribution.tolist()) == pytest.approx(age, abs=0.002 * bins.width)
    assert bins.encode(200).tolist() == bins.encode(80).tolist()


def test_labels_that_cannot_be_learned_are_refused() -> None:
    classes = fit_encoding("sex", ["male", "female", "male"], 40)
    assert classes == LabelEncoding(("female", "male"))
    assert (classes.encode("male").tolist(), classes.is_valid("other")) == ([0, 1], False)
    with pytest.raises(UserError, match=r"^target 'x': all labels in data\.train are 'male', so there is nothing"):
        fit_encoding("x", ["male", "male"], 40)
    with pytest.raises(UserError, match="has classes \\(male\\) and numbers"):
        fit_encoding("x", ["male", 3], 40)


@pytest.mark.parametrize(
    ("encoding", "labels", "metric"),
    [
        (LabelEncoding(("female", "male")), {"female", "male"}, "eval/x/balanced_accuracy"),
        (LabelEncoding(("female", "male")), {"male"}, "eval/loss"),
        (LabelEncoding(bins=40), set(), "eval/x/mae"),
    ],
)
def test_the_best_checkpoint_is_chosen_by_a_metric_that_is_defined(encoding: Any, labels: set, metric: str) -> None:
    tune = training_settings(load_settings(), "x", encoding, labels).tune
    assert (tune.metric, tune.mode) == (metric, "max" if metric.endswith("accuracy") else "min")


def about(subject: str, *turns: Any, label: Any = "male", **metadata: Any) -> Conversation:
    talk = [turn for content in turns for turn in (("user", list(content)), ("assistant", "Yes."))]
    found = {"subject_id": subject, "subject_label": label, "target": "sex", **metadata}
    return make_conversation(*talk, task_id=f"{subject}-{len(turns)}", metadata=found)


OWN, OTHER, OWN_D, OTHER_D = ("sMRI", "own"), ("sMRI", "other"), ("dMRI", "own_d"), ("dMRI", "other_d")
COMPARED = {"reference_id": "b"}


@pytest.mark.parametrize(
    ("turns", "metadata", "modality", "paths"),
    [
        ([[OWN, OWN_D, "?"]], {}, "sMRI", ["own"]),
        ([[OWN], [OWN_D, "?"]], {}, "sMRI", ["own"]),
        ([[OWN_D, "?"]], {}, "sMRI", []),
        ([[OTHER], [OWN, "?"]], COMPARED, "sMRI", ["own"]),
        ([[OTHER, OWN, "?"]], COMPARED, "sMRI", ["own"]),
        ([[OTHER, OTHER_D], [OWN, OWN_D, "?"]], COMPARED, "sMRI", ["own"]),
        ([[OTHER, OTHER_D], [OWN_D, "?"]], COMPARED, "sMRI", []),
        ([[OTHER, OWN_D, "?"]], COMPARED, "sMRI", []),
        ([[OTHER, OWN_D, "?"]], COMPARED, "dMRI", ["own_d"]),
    ],
)
def test_a_label_belongs_to_the_volume_of_the_subject_and_not_of_the_reference(
    turns: list, metadata: dict, modality: str, paths: list[str]
) -> None:
    assert [path for _, path in pair_with_volumes([about("a", *turns, **metadata)], "sex", modality)] == paths


def test_a_volume_of_several_conversations_is_one_sample_with_one_label() -> None:
    twice = [about("a", [("sMRI", "x")]), about("a", [("sMRI", "y")], [("sMRI", "x")], reference_id="b")]
    others = [about("b", [("sMRI", "y")], label="female"), about("c", [("sMRI", "z")], target="age", label=3)]
    pairs = pair_with_volumes([*twice, *others], "sex", "sMRI")
    assert [(path, s.subject_id, s.label) for s, path in make_samples(pairs)] == [
        ("x", "a", "male"),
        ("y", "b", "female"),
    ]
    wrong = pair_with_volumes([*twice, about("d", [("sMRI", "x")], label="female")], "sex", "sMRI")
    with pytest.raises(UserError, match=r"^x: its sex is 'male' in a-1 and 'female' in d-1; one of them is wrong"):
        make_samples(wrong)
