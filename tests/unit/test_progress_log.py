"""The progress of a training: throughput, memory, and lines on the console for new states and for metrics."""

from types import SimpleNamespace

import pytest
import torch

from umbrella.training import progress_log
from umbrella.training.progress_log import (
    BUILDING,
    RECENT,
    STOPPED_EARLY,
    ProgressLog,
    Throughput,
    format_duration,
    format_figures,
    memory,
)

SAMPLES, TOKENS, WAITING = "train/samples_per_second", "train/supervised_tokens_per_second", "train/waiting_for_data"
METRICS = {
    "train/loss": 1.23456,
    "train/lr": 1e-3,
    SAMPLES: 312.4,
    TOKENS: 4100.4,
    WAITING: 0.018,
    "train/memory_host_mib": 1500.2,
    "train/memory_device_mib": 12345.6,
}
POSITION = {"step": 123, "steps": 400, "epoch": 2.5, "left": 3725.0}
LINE = (
    "step 123/400  epoch 2.50  loss 1.235  rate 0.001  312 samples/s  4100 supervised tokens/s  waiting for data 2%"
    "  GPU peak 12346 MiB  host 1500 MiB  1:02:05 left"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time on all clocks."""
    now = [1000.0]
    clocks = dict.fromkeys(("monotonic", "perf_counter", "time"), lambda: now[0])
    monkeypatch.setattr(progress_log, "time", SimpleNamespace(**clocks))
    return now


def test_a_new_state_is_a_line_and_metrics_are_a_line_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    log = ProgressLog("a run", "a trial", start_time=990.0)
    log.print_state(BUILDING)
    for seconds in (0, 29, 1, 0, 29):
        clock[0] += seconds
        log.update(METRICS, POSITION)
    log.update_evaluation({"eval/loss": 1.0})
    clock[0] += 29
    log.update(METRICS, POSITION)
    assert not log.due
    clock[0] += 1
    assert log.due
    log.print_state(STOPPED_EARLY, "it got no better")
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "00:10  building the model",
        f"00:40  {LINE}",
        "01:39  stopped early: it got no better",
    ]


def test_unknown_metrics_are_left_out() -> None:
    line = format_figures({"train/loss": float("nan")}, POSITION | {"left": None})
    assert line == "step 123/400  epoch 2.50  loss nan"
    assert (format_duration(59.9), format_duration(60), format_duration(3600)) == ("00:59", "01:00", "1:00:00")


def step(throughput: Throughput, clock: list[float], waits: float, works: float) -> None:
    with throughput.waiting():
        clock[0] += waits
    clock[0] += works
    throughput.step(8, 100)


def test_throughput_covers_the_time_since_it_was_last_taken(clock: list[float]) -> None:
    throughput = Throughput()
    for _ in range(4):
        step(throughput, clock, waits=0.5, works=1.5)
    assert throughput.take() == {SAMPLES: 4, TOKENS: 50, WAITING: 0.25}
    clock[0] += 100  # an evaluation
    assert throughput.take()[SAMPLES] == 0
    step(throughput, clock, waits=0, works=1)
    assert throughput.take() == {SAMPLES: 8, TOKENS: 100, WAITING: 0}


def test_recent_throughput_covers_the_last_steps_and_resets_nothing(clock: list[float]) -> None:
    throughput = Throughput()
    assert throughput.recent() == {}
    step(throughput, clock, waits=99, works=1)
    assert throughput.recent() == {SAMPLES: 0.08, TOKENS: 1, WAITING: 0.99}
    for _ in range(RECENT):
        step(throughput, clock, waits=1, works=1)
    assert throughput.recent() == throughput.recent() == {SAMPLES: 4, TOKENS: 50, WAITING: 0.5}
    assert throughput.take()[SAMPLES] == 8 * (RECENT + 1) / (2 * RECENT + 100)


def test_memory_is_that_of_this_process() -> None:
    before = memory(torch.device("cpu"))
    assert before.keys() == {"train/memory_host_mib"}
    held = torch.ones(64 * 2**20)  # 256 MiB
    assert memory(torch.device("cpu"))["train/memory_host_mib"] - before["train/memory_host_mib"] > 200
    del held
