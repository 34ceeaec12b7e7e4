"""What a person sees of a training: a bar in a terminal, lines elsewhere; and that telling it can do no harm."""

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from umbrella.training import watch
from umbrella.training.live import EVALUATING, FIRST, Live, live_file, read_live
from umbrella.training.watch import Watch, clock, figures

METRICS = {
    "train/loss": 1.23456,
    "train/lr": 1e-3,
    "train/samples_per_second": 312.4,
    "train/supervised_tokens_per_second": 4100.4,
    "train/waiting_for_data": 0.018,
    "train/memory_host_mib": 1500.2,
    "train/memory_device_mib": 12345.6,
}
WORDS = (
    "loss 1.235  rate 0.001  312 samples/s  4100 supervised tokens/s  waiting for data 2%  GPU peak 12346 MiB"
    "  host 1500 MiB"
)
PLACE = {"step": 123, "steps": 400, "epoch": 2.5, "left": 3725.0}


@pytest.fixture
def live(tmp_path: Path) -> Live:
    return Live(tmp_path, "a run", "a trial", every=0)


def until(there: Callable[[], bool]) -> None:
    """Wait until something is to be seen, ten seconds at most."""
    end = time.monotonic() + 10
    while not there() and time.monotonic() < end:
        time.sleep(0.01)
    assert there()


def tell(live: Live, seen: Callable[[], str]) -> None:
    """A training's words, each told when the one before is seen."""
    live.say(FIRST)
    until(lambda: "first step" in seen())
    live.figures(METRICS, PLACE)
    until(lambda: "123/400" in seen())
    live.say(EVALUATING, PLACE)
    live.say("stopped early", PLACE | {"left": None}, "it got no better")


def test_without_a_terminal_there_is_a_line_for_a_new_state_and_now_and_then_one_of_figures(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK", 0.01)
    monkeypatch.setattr(watch, "LINE", 0.0)
    seen = [""]

    def so_far() -> str:
        seen[0] += capsys.readouterr().out
        return seen[0]

    with Watch(tmp_path, Console(file=io.StringIO())):
        tell(live, so_far)
    assert [line.split("  ", 1)[1] for line in so_far().splitlines()] == [
        "starting workers",
        "first step",
        f"step 123/400  epoch 2.50  {WORDS}  1:02:05 left",
        "stopped early: it got no better",
    ]


def test_figures_are_not_printed_at_each_step(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK", 0.01)
    with Watch(tmp_path, Console(file=io.StringIO())):
        for step in range(20):
            live.figures(METRICS, PLACE | {"step": step})
            time.sleep(0.02)
    assert "step" not in capsys.readouterr().out


def test_in_a_terminal_there_is_a_bar_with_the_figures_and_lines_go_above_it(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK", 0.01)
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=140, record=True)
    with Watch(tmp_path, screen):
        assert "starting workers" in screen.file.getvalue()
        print("a worker says something")
        tell(live, screen.file.getvalue)
    drawn = screen.file.getvalue()
    assert "1:02:05 left" in drawn
    assert WORDS in drawn
    assert "a worker says something\n" in drawn
    assert "stopped early: it got no better\n" in drawn
    end = drawn[drawn.rindex("stopped early") :]
    assert "123/400" in end
    assert "left" not in end


def test_a_folder_that_cannot_be_written_stops_nothing(live: Live, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    live.say(FIRST)
    live.figures(METRICS, PLACE)
    assert read_live(tmp_path) == {}


def test_what_an_earlier_attempt_told_is_forgotten_and_half_a_file_is_no_word(live: Live, tmp_path: Path) -> None:
    live.say("finished")
    with Watch(tmp_path, Console(file=io.StringIO())):
        assert read_live(tmp_path) == {}
        live_file(tmp_path).write_text('{"state": "trai', encoding="utf-8")
        assert read_live(tmp_path) == {}


def test_figures_wait_for_their_time_and_states_do_not(tmp_path: Path) -> None:
    live = Live(tmp_path, "a run", "a trial", every=0.2)
    assert live.due
    live.figures(METRICS, PLACE)
    assert not live.due
    live.say(EVALUATING)
    assert read_live(tmp_path)["state"] == EVALUATING
    assert read_live(tmp_path)["step"] == 123
    until(lambda: live.due)


def test_what_is_not_there_is_not_shown() -> None:
    assert figures({"state": FIRST}) == ""
    assert figures({"metrics": {"train/loss": float("nan")}}) == "loss nan"
    assert (clock(59.9), clock(60), clock(3600)) == ("00:59", "01:00", "1:00:00")
