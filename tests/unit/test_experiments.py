"""The scripts, as far as they run without starting Ray."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Done


def test_a_dry_run_of_the_default_sweep_prints_the_plan_and_writes_nothing(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    done = run("tune.py", "--dry-run", f"resources.storage={tmp_path}/runs")
    assert done.status == 0, done.stderr
    trial = "lr=7e-4 supervise=last_assistant"
    for text in ("trials: 4", trial, "CPUs and 0 GPUs per training", "samples: train 2", "1190 steps of "):
        assert text in done.stdout
    assert re.search(r"parameters: embedder [\d,]+ trained; tower [\d,]+ trained, 128 frozen; .*; in all ", done.stdout)
    total, *parts = map(float, re.findall(r"[\d.]+", re.findall(r"GPU memory: about (.*)", done.stdout)[0]))
    assert total == pytest.approx(sum(parts[1:]), rel=0.01), "parts[0] is the batch size"
    assert "optim: " not in done.stdout, "no value differs from the default"
    assert not (tmp_path / "runs").exists()


def test_a_setting_given_on_the_command_line_is_not_swept(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("tune.py", "--dry-run", "--learning-rate", "3e-4", f"resources.storage={tmp_path}/runs")
    assert "trials: 2\n  supervise=last_assistant\n  supervise=all\n" in done.stdout
    assert "set on the command line, so not swept: optim.lr" in done.stdout
    assert "optim: {lr: 0.0003}" in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("tune.py", ["tune.metric=eval/f1", "data.train={t}", "data.validation={t}"], "error: {t}: no such file"),
        ("tune.py", ["tune.space.optim.lrr={{grid: [1]}}"], "error: tune.space.optim.lrr: optim.lrr: there is no such"),
        ("train.py", ["data.train={t}"], "error: data.validation is not set"),
    ],
)
def test_a_user_error_is_one_line_and_status_2(
    run: Callable[..., Done], tmp_path: Path, script: str, words: list, line: str
) -> None:
    missing = tmp_path / "missing.jsonl"
    done = run(script, f"resources.storage={tmp_path}", *(word.format(t=missing) for word in words))
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(line.format(t=missing)), done.stderr
