"""How fast a training goes: figures over all steps since they were last taken, and over the last ones."""

import time

import pytest
import torch

from umbrella.training import throughput as module
from umbrella.training.throughput import Throughput, memory

SAMPLES, TOKENS, WAITING = "train/samples_per_second", "train/supervised_tokens_per_second", "train/waiting_for_data"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that it is."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def step(throughput: Throughput, clock: list[float], waits: float, works: float) -> None:
    with throughput.waiting():
        clock[0] += waits
    clock[0] += works
    throughput.step(8, 100)


def test_figures_are_of_the_time_since_they_were_last_taken(clock: list[float]) -> None:
    throughput = Throughput()
    for _ in range(4):
        step(throughput, clock, waits=0.5, works=1.5)
    assert throughput.take() == {SAMPLES: 4, TOKENS: 50, WAITING: 0.25}
    clock[0] += 100  # an evaluation
    assert throughput.take()[SAMPLES] == 0
    step(throughput, clock, waits=0, works=1)
    assert throughput.take() == {SAMPLES: 8, TOKENS: 100, WAITING: 0}


def test_recent_figures_forget_the_steps_before_and_take_nothing(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECENT", 3)
    throughput = Throughput()
    assert throughput.recent() == {}
    step(throughput, clock, waits=99, works=1)
    assert throughput.recent() == {SAMPLES: 0.08, TOKENS: 1, WAITING: 0.99}
    for _ in range(3):
        step(throughput, clock, waits=1, works=1)
    assert throughput.recent() == throughput.recent() == {SAMPLES: 4, TOKENS: 50, WAITING: 0.5}
    assert throughput.take()[SAMPLES] == 32 / 106


def test_memory_is_of_this_process_and_of_a_gpu_only_where_there_is_one() -> None:
    before = memory(torch.device("cpu"))
    assert before.keys() == {"train/memory_host_mib"}
    held = torch.ones(64 * 2**20)  # 256 MiB
    assert memory(torch.device("cpu"))["train/memory_host_mib"] - before["train/memory_host_mib"] > 200
    del held
