"""What a training that finds no place on its cluster says it waits for."""

import pytest

from umbrella.training.settings import ResourceSettings
from umbrella.training.waiting import WORKERS, missing

CONTROLLER = {"ActorClassName": "TrainController", "State": "ALIVE"}
WORKER = {"ActorClassName": "RayTrainWorker", "State": "ALIVE"}
HELPER = {"ActorClassName": "_AutoscalingCoordinatorActor", "State": "PENDING_CREATION"}
TWO = {"a": {"CPU": 8.0, "GPU": 1.0}, "b": {"CPU": 8.0}}


def said(actors: list[dict[str, str]], free: dict[str, dict[str, float]], **resources: float) -> str:
    asked = ResourceSettings(**{"cpus_per_worker": 1, **resources})
    return missing(asked, WORKERS[:1], actors, free, TWO)


def test_a_missing_gpu_is_named_with_what_is_free_and_what_the_cluster_has() -> None:
    words = said([CONTROLLER], {"a": {"CPU": 7.5}, "b": {"CPU": 8.0}}, workers=2, gpus_per_worker=1)
    assert words == (
        "resources: 2 workers of 1 CPU and 1 GPU, each on one node, and 1 CPU for Ray's helpers; 15.5 CPUs and 0 GPUs"
        " free of 16 CPUs and 1 GPU on 2 nodes, room for 0 (resources.workers, .cpus_per_worker, .gpus_per_worker)"
    )


def test_cpus_that_are_free_on_different_nodes_are_no_room_for_one_worker() -> None:
    words = said([], {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}}, cpus_per_worker=4)
    assert "1 worker of 4 CPUs" in words
    assert "room for 0" in words


def test_with_min_workers_both_numbers_are_said() -> None:
    assert "3 to 4 workers of 8 CPUs" in said([], TWO, workers=4, min_workers=3, cpus_per_worker=8)


@pytest.mark.parametrize("state", ["ALIVE", "PENDING_CREATION"])
def test_workers_that_run_or_are_being_made_wait_for_nothing(state: str) -> None:
    assert said([WORKER | {"State": state}], {"a": {}, "b": {}}) == ""


def test_a_slow_start_with_room_enough_is_no_wait_for_resources() -> None:
    assert said([CONTROLLER], TWO, workers=2) == ""


def test_a_helper_of_rays_that_finds_no_whole_cpu_is_named() -> None:
    words = said([WORKER, HELPER], {"a": {"CPU": 0.5}, "b": {"CPU": 0.9}})
    assert words.startswith("resources: 1 CPU on one node for Ray's helpers (_AutoscalingCoordinatorActor); 1.4 CPUs")
    assert said([WORKER, HELPER], {"a": {"CPU": 0.5}, "b": {"CPU": 1.0}}) == ""
