"""What a person sees of a training: a line for each new state, and now and then one of figures."""

from types import SimpleNamespace

import pytest

from umbrella.training import progress_log
from umbrella.training.progress_log import BUILDING, STOPPED_EARLY, ProgressLog, format_duration, format_figures

METRICS = {
    "train/loss": 1.23456,
    "train/lr": 1e-3,
    "train/samples_per_second": 312.4,
    "train/supervised_tokens_per_second": 4100.4,
    "train/waiting_for_data": 0.018,
    "train/memory_host_mib": 1500.2,
    "train/memory_device_mib": 12345.6,
}
PLACE = {"step": 123, "steps": 400, "epoch": 2.5, "left": 3725.0}
LINE = (
    "step 123/400  epoch 2.50  loss 1.235  rate 0.001  312 samples/s  4100 supervised tokens/s  waiting for data 2%"
    "  GPU peak 12346 MiB  host 1500 MiB  1:02:05 left"
)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that it is, on both clocks."""
    at = [1000.0]
    clocks = SimpleNamespace(monotonic=lambda: at[0], time=lambda: at[0])
    monkeypatch.setattr(progress_log, "time", clocks)  # not in the module `time`, which others read too
    return at


def test_a_new_state_is_a_line_and_figures_are_one_every_half_minute(
    now: list[float], capsys: pytest.CaptureFixture
) -> None:
    log = ProgressLog("a run", "a trial", start_time=990.0)
    log.print_state(BUILDING)
    log.update(METRICS, PLACE)
    now[0] += 29
    log.update(METRICS, PLACE)
    now[0] += 1
    log.update(METRICS, PLACE)
    log.update(METRICS, PLACE)
    now[0] += 29
    log.update_evaluation({"eval/loss": 1.0})
    now[0] += 29
    log.update(METRICS, PLACE)
    log.print_state(STOPPED_EARLY, "it got no better")
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "00:10  building the model",
        f"00:40  {LINE}",
        "01:38  stopped early: it got no better",
    ]


def test_figures_are_due_again_after_their_time(now: list[float]) -> None:
    log = ProgressLog("a run", "a trial", start_time=990.0, every=0.5)
    assert log.due
    log.update(METRICS, PLACE)
    assert not log.due
    now[0] += 0.5
    assert log.due


def test_what_is_not_known_is_left_out() -> None:
    assert format_figures({"train/loss": float("nan")}, PLACE | {"left": None}) == "step 123/400  epoch 2.50  loss nan"
    assert (format_duration(59.9), format_duration(60), format_duration(3600)) == ("00:59", "01:00", "1:00:00")
