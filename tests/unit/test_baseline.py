"""The baseline: its network, what it learns from, and a training on Ray from conversations to the tables."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import make_conversation
from umbrella.base import UserError
from umbrella.baseline.run import resolved
from umbrella.baseline.targets import Bins, Classes, fit, own_volume, samples_of
from umbrella.config import load_settings
from umbrella.conversations.conversation import Conversation

CHANNELS = [32, 64, 128, 256, 256, 64]


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [((2, 2, 2), 0), ((4, 9, 5), 1), ((8, 8, 8), 2), ((24, 24, 24), 3), ((96, 96, 96), 5), ((160, 192, 160), 5)],
)
def test_the_number_of_halving_blocks_follows_the_grid(grid: tuple[int, int, int], blocks: int) -> None:
    import torch

    from umbrella.baseline.network import Sfcn

    channels = [1, 1, 1, 1, 1, 2]  # of one channel: the largest grid would take seconds
    net = Sfcn(grid, channels, 7).eval()
    assert net.blocks == blocks
    out = net(torch.randn(2, 1, *grid))
    assert out.shape == (2, 7)
    assert torch.allclose(out.exp().sum(1), torch.ones(2))


def test_the_network_of_the_paper_has_as_many_parameters_as_one_counts_by_hand() -> None:
    from umbrella.baseline.network import Sfcn

    kernels = 27 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 256) + 256 * 64
    biases, norms, head = sum(CHANNELS), 2 * sum(CHANNELS), 64 * 40 + 40
    assert kernels + biases + norms + head == 2_952_936
    net = Sfcn((160, 192, 160), CHANNELS, 40)
    assert sum(weight.numel() for weight in net.parameters()) == 2_952_936


def test_frames_of_a_series_are_channels() -> None:
    import torch

    from umbrella.baseline.network import Sfcn

    assert Sfcn((8, 8, 8), [4, 4, 4], 3, inputs=5)(torch.randn(2, 5, 8, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("age", [20, 20.4, 47, 63.25, 80])
def test_a_soft_label_sums_to_one_and_its_mean_is_the_age(age: float) -> None:
    bins = fit("age", [20, 80, 33.0], 40)
    assert isinstance(bins, Bins)
    soft = bins.soft(age)
    assert soft.shape == (40,)
    assert soft.sum() == pytest.approx(1)
    assert bins.read(soft.tolist()) == pytest.approx(age, abs=0.002 * bins.width)
    assert bins.soft(200).tolist() == bins.soft(80).tolist()


def test_labels_that_cannot_be_learned_are_refused() -> None:
    assert fit("sex", ["male", "female", "male"], 40) == Classes(("female", "male"))
    with pytest.raises(UserError, match=r"^target 'x': all labels in data\.train are 'male', so there is nothing"):
        fit("x", ["male", "male"], 40)
    with pytest.raises(UserError, match="has classes \\(male\\) and numbers"):
        fit("x", ["male", 3], 40)


@pytest.mark.parametrize(
    ("head", "labels", "metric"),
    [
        (Classes(("female", "male")), {"female", "male"}, "eval/x/balanced_accuracy"),
        (Classes(("female", "male")), {"male"}, "eval/loss"),
        (Bins(0, 1, 40), set(), "eval/x/mae"),
    ],
)
def test_the_best_checkpoint_is_chosen_by_a_metric_that_there_is(head: Any, labels: set, metric: str) -> None:
    tune = resolved(load_settings(), "x", head, labels).tune
    assert (tune.metric, tune.mode) == (metric, "max" if metric.endswith("accuracy") else "min")


def about(subject: str, *turns: Any, label: Any = "male", **metadata: Any) -> Conversation:
    talk = [turn for content in turns for turn in (("user", list(content)), ("assistant", "Yes."))]
    found = {"subject_id": subject, "subject_label": label, "target": "sex", **metadata}
    return make_conversation(*talk, task_id=f"{subject}-{len(turns)}", metadata=found)


def test_a_sample_is_the_subjects_own_scan_and_never_the_references() -> None:
    def chosen(*turns: Any, modality: str = "sMRI", **metadata: Any) -> str | None:
        return own_volume(about("a", *turns, **metadata), modality)

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
    assert [(s.path, s.subject_id, s.label) for s in samples_of([*twice, *others], "sex", "sMRI")] == [
        ("x", "a", "male"),
        ("y", "b", "female"),
    ]
    with pytest.raises(UserError, match=r"^x: its sex is 'male' in a-1 and 'female' in d-1; one of them is wrong"):
        samples_of([*twice, about("d", [("sMRI", "x")], label="female")], "sex", "sMRI")


def cue(folder: Path, split: str, people: int) -> Path:
    """Conversations about volumes that are brighter on one side where the subject is male; ages are not to be seen."""
    draw = np.random.default_rng(len(split))
    lines = []
    for i in range(people):
        sex, age = ("female", "male")[i % 2], 20 + 60 * i // people
        voxels = draw.normal(size=(8, 8, 8))
        voxels[:4] += 3 * (sex == "male")
        path = folder / f"{split}{i}.nii"
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), path)
        for target, label in (("sex", sex), ("age", age)):
            one = about(f"{split}{i}", [("sMRI", path), "?"], label=label, target=target)
            lines.append(one.model_copy(update={"task_id": f"{split}{i}-{target}"}).model_dump_json())
    file = folder / f"{split}.jsonl"
    file.write_text("\n".join(lines))
    return file


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_small_training_learns_a_planted_cue_and_its_answers_fill_the_tables(
    small_settings: Callable[..., Any], mlflow_store: Callable[[Path], str], tmp_path: Path, capsys: Any
) -> None:
    from mlflow import MlflowClient

    from umbrella.assessment.summary import print_evaluation
    from umbrella.baseline.run import evaluate, make_jobs
    from umbrella.cli import make_console
    from umbrella.training.launch import run_job
    from umbrella.training.run import watch_job

    uri = mlflow_store(tmp_path)
    data = {f"data.{split}": str(cue(tmp_path, split, 16)) for split in ("train", "validation", "test")}
    own = {"baseline.target": "sex", "baseline.channels": [8, 8, 8], "baseline.epochs": 6, "baseline.batch_size": 8}
    more = {"resources.storage": str(tmp_path), "tracking.uri": uri, "name": "mine", "evaluate.bootstrap": 100}
    settings = small_settings({**data, **own, **more, "resources.keep_checkpoints": 9})
    splits, (job,) = make_jobs(settings, lambda things, what: things)
    watch_job(job)
    evaluated = evaluate(job, splits)
    found = evaluated.assessment
    print_evaluation(evaluated, make_console())
    assert "sex" in capsys.readouterr().out
    (predictions,) = found.predictions.values()
    assert [p.task_id for p in predictions] == [f"test{i}-sex" for i in range(16)]
    assert all(set(p.probabilities) == {"female", "male"} and p.text is None for p in predictions)
    group = found.groups["as_asked"][0]
    assert (group.target, group.kind, group.by, group.subjects, group.invalid) == ("sex", "classes", "all", 16, None)
    assert group.metrics["likelihood/subjects/balanced_accuracy"].value > 0.9
    assert Path(found.model).parent == tmp_path / "trainings" / "mine-sex"

    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'umbrella'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine-sex", "FINISHED")
    assert run.data.params["optim.lr"] == run.data.params["baseline.lr"] == "0.03"
    assert evaluated.page.exists()
    assert run.data.metrics["test/sex/likelihood/subjects/balanced_accuracy"] > 0.9
    assert {"eval/sex/balanced_accuracy", "train/loss", "train/lr"} <= set(run.data.metrics)

    steps = sorted(Path(job.folder).glob("step_*"))
    for newer in steps[3:]:
        shutil.rmtree(newer)
    run_job(job, here=True)  # goes on in the midst of it, and comes to the same end
    assert sorted(Path(job.folder).glob("step_*")) == steps
    assert evaluate(job, splits).assessment.predictions == found.predictions
