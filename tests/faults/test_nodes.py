"""Trainings and sweeps on clusters whose nodes are lost, drained and added."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_injection import (
    COHORT,
    LONGER,
    TRAIN,
    TWO,
    assert_each_once_per_epoch,
    at_step,
    count_batches,
    find_run,
    folder_of,
    learned_samples,
    losses_and_samples,
    sample_log,
    start_positions,
    train_to_end,
    wait_until,
    write_settings,
)  # fmt: skip
from tests.faults.nodes import Nodes, nodes, wait_for_exit
from tests.faults.sweep_kills import find_faults, sweep_settings
from umbrella.conversations.schema import SPLITS
from umbrella.data.splits import phantom_folder_of, read_splits
from umbrella.training.checkpoint_files import latest_checkpoint, read_training_state
from umbrella.tuning.sweep_files import load_outcome

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

TUNE = TRAIN.with_name("tune.py")
CPUS = 1.9
"""CPUs of a worker: a node of three CPUs fits one worker and Ray's helpers. Below 2, torch uses one thread."""
APART = TWO | {"resources.cpus_per_worker": CPUS, "train.batch_size": 2}
"""Two workers, each on a node of its own."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Nodes]:
    """A cluster of two nodes, for tests that do not change it."""
    with nodes(3, 3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_node(small_settings: Callable[..., Any], ray_session: Any) -> tuple[list, list]:
    """Losses and samples of a training with two workers on one node."""
    settings = small_settings({**LONGER, **TWO, "train.batch_size": 2, "name": "one_node"})
    return losses_and_samples(settings, train_to_end(settings))


def test_training_on_two_nodes_equals_one_node_bit_for_bit(
    pair: Nodes, small_settings: Callable[..., Any], one_node: tuple[list, list]
) -> None:
    settings = small_settings({**LONGER, **APART, "name": "apart"})
    used = at_step(folder_of(settings), 2, lambda: found.append(pair.node_of_worker()))
    found: list[Any] = []
    wait_for_exit(pair.run(TRAIN, str(write_settings(settings))))
    used.join(1)
    assert found == [pair.nodes[1]], "one of the two workers was on the other node"
    assert losses_and_samples(settings, folder_of(settings)) == one_node


def test_sweep_uses_both_nodes(pair: Nodes, small_settings: Callable[..., Any]) -> None:
    space = {"optim.lr": {"grid": [1e-3, 3e-3, 1e-2, 3e-2]}, "mask.supervise": {"grid": ["last_assistant"]}}
    small = {"tune.space": space, "resources.cpus_per_worker": CPUS, "name": "both", "tune.scheduler": "none"}
    settings = small_settings({**small, "experiment": "nodes"})
    assert "waiting for" not in wait_for_exit(pair.run(TUNE, str(write_settings(settings))))
    folder = Path(settings.resources.storage) / "sweeps" / "both"
    told = [line for file in folder.rglob("result.json") for line in file.read_text(encoding="utf-8").splitlines()]
    assert {json.loads(line)["node_ip"] for line in told} == {"127.0.0.2", "127.0.0.3"}
    assert len((folder / "ranking.csv").read_text(encoding="utf-8").splitlines()) == 5


def test_worker_that_fits_on_no_node_is_refused_before_the_start(
    pair: Nodes, small_settings: Callable[..., Any]
) -> None:
    settings = small_settings({"resources.cpus_per_worker": 4, "name": "large", "experiment": "nodes"})
    errors = wait_for_exit(pair.run(TRAIN, str(write_settings(settings))), status=2)
    assert errors.splitlines()[-1] == (
        "error: resources: 1 workers of 4 CPUs and 0 GPUs, each on one node, and the nodes have room for 0; lower"
        " resources.cpus_per_worker, .gpus_per_worker or resources.workers"
    )
    assert latest_checkpoint(folder_of(settings)) is None


def test_node_with_other_storage_is_reported_by_every_script_before_decoding(
    pair: Nodes, small_settings: Callable[..., Any], learnt: Path, tmp_path: Path
) -> None:
    settings = small_settings({"resources.storage": str(tmp_path), "name": "blind"})
    read_splits(settings, lambda things, what: things, SPLITS)  # creates the cohort
    cohort, file, checkpoint = phantom_folder_of(settings), str(write_settings(settings)), f"checkpoint={learnt}"
    commands = {
        "train.py": [file],
        "baseline.py": [file],
        "prepare.py": [file],
        "evaluate.py": [file, checkpoint],
        "predict.py": [file, checkpoint, f"data.root={cohort}", f"data.input={cohort}/conversations/test.jsonl"],
    }
    node = pair.add(1, blind=tmp_path)
    scripts = {name: pair.run(TRAIN.with_name(name), *words) for name, words in commands.items()}
    errors = {name: wait_for_exit(script, status=2).splitlines() for name, script in scripts.items()}
    pair.kill(node)
    for lines in errors.values():
        named = [re.sub(r"127.0.0.\d+ \(.*\)", "(the blind one)", line) for line in lines if "127.0.0." in line]
        assert named == [
            f"error: node (the blind one): resources.storage={tmp_path} is another folder here; mount the same one at"
            " this path on every node"
        ]
    left = {path.name for path in tmp_path.iterdir() if path != cohort}
    assert left == {Path(file).name, "volumes", "evaluations", "trainings"}
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"RAY_AUTH_TOKEN": "another" * 5},
            "the cluster answers but refuses this process; set RAY_AUTH_MODE=token",
        ),
        (
            {"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"},
            "the cluster requires a token, and there is none here; set RAY_AUTH_MODE=token",
        ),
    ],
)
def test_missing_cluster_token_is_one_line(
    pair: Nodes, small_settings: Callable[..., Any], environment: dict[str, str], words: str
) -> None:
    script = pair.run(TRAIN, str(write_settings(small_settings({"name": "stranger"}))), **environment)
    assert f"error: RAY_ADDRESS={pair.address}: {words}" in wait_for_exit(script, status=2).splitlines()[-1]


def test_training_waits_for_a_new_node_after_its_node_is_killed(
    small_settings: Callable[..., Any], one_node: tuple[list, list]
) -> None:
    settings = small_settings({**LONGER, **APART, "name": "replaced"})
    folder = folder_of(settings)

    with nodes(3, 3) as cluster:

        def replace() -> None:
            while (newest := latest_checkpoint(folder)) is None or read_training_state(newest).step < 10:
                time.sleep(0.01)  # it is written while steps go on
            cluster.kill(cluster.node_of_worker())
            cluster.add(3)

        at_step(folder, 10, replace)
        wait_for_exit(cluster.run(TRAIN, str(write_settings(settings))))
    assert start_positions(folder) in [[0, 0, at, at] for at in range(40, 140, 20)]
    assert losses_and_samples(settings, folder) == one_node


def test_lost_node_changes_no_loss_and_drained_node_is_left_with_a_checkpoint(
    small_settings: Callable[..., Any],
) -> None:
    long = {**LONGER, "train.epochs": 150, "train.evaluate_every": 10_000}  # a checkpoint before its end is the drain's
    undisturbed = small_settings({**long, "name": "unmoved"})
    expected = losses_and_samples(undisturbed, train_to_end(undisturbed))
    settings = small_settings({**long, "resources.cpus_per_worker": CPUS, "name": "moved"})
    folder = folder_of(settings)
    saved: list[int] = []

    with nodes(0, 3, 3, 3) as cluster:

        def lose() -> None:
            cluster.kill(cluster.node_of_worker())
            while len(start_positions(folder)) < 2:
                time.sleep(0.01)
            drain_and_lose()

        def drain_and_lose() -> None:
            node = cluster.node_of_worker()
            cluster.drain(node)
            while not (newest := latest_checkpoint(folder)):
                time.sleep(0.01)
            saved.append(read_training_state(newest).step)
            cluster.kill(node)

        at_step(folder, 8, lose)
        wait_for_exit(cluster.run(TRAIN, str(write_settings(settings))))
    assert start_positions(folder) == [0, 0, 4 * saved[0]], "resumed from the checkpoint of the drain"
    assert losses_and_samples(settings, folder) == expected


def test_training_grows_onto_an_added_node_and_sees_each_sample_once_per_epoch(
    small_settings: Callable[..., Any],
) -> None:
    long = {"train.epochs": 1000, "train.evaluate_every": 20, "name": "grows"}
    settings = small_settings({**LONGER, **APART, **long, "resources.min_workers": 1, "resources.grow_every": 1})
    folder = folder_of(settings)

    def workers() -> list[int]:
        return [entry["workers"] for entry in sample_log(folder) if "start" in entry]

    with nodes(3) as cluster:
        script = cluster.run(TRAIN, str(write_settings(settings)))
        wait_until(lambda: count_batches(folder) > 30, script)
        cluster.add(3)
        wait_until(lambda: workers() == [1, 2, 2], script)
        before = count_batches(folder)
        wait_until(lambda: count_batches(folder) > before + 30, script)
        script.terminate()
        wait_for_exit(script, status=143)
    assert start_positions(folder)[1] == start_positions(folder)[2] >= 2 * 20, "resumed from a checkpoint"
    assert_each_once_per_epoch(folder, len(learned_samples(folder)) // COHORT)


def test_training_that_lost_its_node_stops_at_the_first_sigterm(small_settings: Callable[..., Any]) -> None:
    settings = small_settings({**LONGER, "resources.cpus_per_worker": CPUS, "name": "alone"})
    with nodes(1, 3) as cluster:
        script = cluster.run(TRAIN, str(write_settings(settings)))
        wait_until(lambda: count_batches(folder_of(settings)) > 8, script)
        cluster.kill(cluster.node_of_worker())
        script.terminate()
        errors = wait_for_exit(script, status=143)
    line = "SIGTERM: the training stopped without a new checkpoint; umbrella train --resume alone continues"
    said = [said for said in errors.splitlines() if "pid=" not in said]  # without what came from the nodes
    assert said[-1] == line
    _, stopped = find_run(settings, "alone")
    assert (stopped.info.status, stopped.data.tags["umbrella.outcome"]) == ("KILLED", "asked to stop")


def test_sweep_that_loses_nodes_and_its_script_ends_with_one_complete_run_per_trial(tmp_path: Path) -> None:
    slow = {"train.evaluate_every": 1}  # so that a trial is not over before a node has started
    settings = sweep_settings(tmp_path, trials=3).with_values(
        {**slow, "resources.cpus_per_worker": CPUS, "name": "lost"}
    )

    def trials() -> list[Path]:
        return [point.parent for point in tmp_path.glob("sweeps/lost/trials/*/point.json")]

    with nodes(0, 3, 3) as cluster:
        script = cluster.run(TUNE, str(write_settings(settings)))
        wait_until(lambda: any(map(count_batches, trials())), script)
        moved = max(trials(), key=count_batches)
        node = cluster.node_of_trial(moved)
        wait_until(lambda: count_batches(moved) > 11, script)
        cluster.kill(node)
        cluster.add(3)
        wait_until(lambda: len(start_positions(moved)) == 2, script)
        node, before = cluster.node_of_trial(moved), count_batches(moved)
        wait_until(lambda: count_batches(moved) > before + 3 and any(map(load_outcome, trials())), script)
        script.kill()
        cluster.kill(node)
        done = {trial: count_batches(trial) for trial in trials() if load_outcome(trial)}
        wait_for_exit(cluster.run(TUNE, "--resume", "lost", f"resources.storage={tmp_path}"))
    first, second, third = start_positions(moved)
    assert first < second < third, "resumed from its checkpoints"
    assert done == {trial: count_batches(trial) for trial in done}, "finished trials did not run again"
    assert find_faults(settings) == []


def test_fewer_workers_after_a_lost_node_see_each_sample_once_per_epoch(
    small_settings: Callable[..., Any],
) -> None:
    elastic = {"resources.min_workers": 1, "name": "fewer"}
    settings = small_settings({**LONGER, **APART, **elastic})
    folder = folder_of(settings)
    with nodes(3, 3) as cluster:
        at_step(folder, 8, lambda: cluster.kill(cluster.node_of_worker()))
        wait_for_exit(cluster.run(TRAIN, str(write_settings(settings))))
    assert [entry["workers"] for entry in sample_log(folder) if "start" in entry] == [2, 2, 1]
    assert_each_once_per_epoch(folder, LONGER["train.epochs"])
