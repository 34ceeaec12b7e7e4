"""A sweep whose script, trials and workers are killed ends with the runs of one that was left alone."""

import random
from pathlib import Path

import pytest
from sweep_kills import faults_in, question, sweep_with_kills

pytestmark = pytest.mark.slow


def test_a_killed_sweep_goes_on_to_one_true_run_per_trial(tmp_path: Path) -> None:
    settings = question(tmp_path, trials=4)
    assert sweep_with_kills(settings, random.Random(3), kills=3, say=print) == 3
    assert faults_in(settings) == []
