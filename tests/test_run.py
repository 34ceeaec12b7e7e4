"""What is found out before a training starts: whether it fits the cluster, and whether the data give what decides."""

import pytest

from umbrella.base import UserError
from umbrella.training.run import trainings_that_fit
from umbrella.training.settings import ResourceSettings


@pytest.mark.parametrize(
    ("asked", "cluster", "at_once"),
    [
        ({}, {"CPU": 2}, 2),
        ({"cpus_per_worker": 0.75}, {"CPU": 2}, 1),
        ({"workers": 2}, {"CPU": 2}, 1),
        ({}, {"CPU": 16}, 16),
        ({"gpus_per_worker": 0.5}, {"CPU": 16, "GPU": 1}, 2),
        ({"workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 4}, {"CPU": 64, "GPU": 4}, 2),
    ],
)
def test_as_many_trainings_at_once_as_leave_a_cpu_for_rays_helpers(asked: dict, cluster: dict, at_once: int) -> None:
    assert trainings_that_fit(ResourceSettings(**asked), cluster) == at_once


def test_a_training_that_cannot_start_says_what_is_short_instead_of_waiting_for_ever() -> None:
    with pytest.raises(UserError, match=r"need 3 CPUs, and Ray has 2; lower resources\.cpus_per_worker or \.workers"):
        trainings_that_fit(ResourceSettings(workers=2, cpus_per_worker=1), {"CPU": 2})
    with pytest.raises(UserError, match=r"1 workers of 1 GPUs need 1 GPUs, and Ray has 0"):
        trainings_that_fit(ResourceSettings(gpus_per_worker=1), {"CPU": 8})
