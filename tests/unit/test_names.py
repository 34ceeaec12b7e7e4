"""What Ray calls a training: a name that a person knows, and that can be part of a file's name."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from umbrella.training.task import Job


@pytest.mark.parametrize(
    ("name", "shown"), [("lr=1e-05", "lr=1e-05"), ("checkpoint=a/b", "checkpoint=a_b"), ("x" * 300, "x" * 100)]
)
def test_a_trainings_name_in_ray_can_be_part_of_a_file_name(name: str, shown: str, tmp_path: Path) -> None:
    assert Job.name.fget(SimpleNamespace(tracking={"name": name})) == shown  # type: ignore[attr-defined]
    (tmp_path / f"ray-data-{shown}, evaluation, worker 0_01ABC_0.log").touch()
