"""The names of the package ``umbrella``, and the examples of docs/python.md."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import umbrella

PAGE = Path(__file__).parent.parent.parent / "docs" / "python.md"


def test_each_public_name_is_importable_typed_and_documented() -> None:
    body = ast.parse(inspect.getsource(umbrella)).body
    (typed,) = [node.body for node in body if isinstance(node, ast.If)]
    found = {
        node.names[0].name: str(node.module).removeprefix("umbrella.")
        for node in typed
        if isinstance(node, ast.ImportFrom)
    }
    assert found == umbrella.MODULES
    assert (Path(umbrella.__file__).parent / "py.typed").is_file()
    page = PAGE.read_text("utf-8")
    for name, module in umbrella.MODULES.items():
        assert getattr(umbrella, name).__module__ == f"umbrella.{module}"
        assert name in dir(umbrella)
        assert f"`{name}" in page or f" {name}" in page
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        umbrella.nothing  # noqa: B018


def test_the_package_is_imported_without_torch_and_ray() -> None:
    code = "import sys, umbrella; umbrella.load_settings(); print({'torch', 'ray', 'mlflow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_ray_listens_on_localhost_only_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    assert callable(umbrella.run_sweep)
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_a_batch_is_printed_as_shapes(batch_of: Callable[..., Any]) -> None:
    assert repr(batch_of("two", "none")).splitlines()[:2] == ["Batch of 2", "  input_ids: (2, 40), torch.int64"]
    assert "  pixel_values['fMRI'].voxels: (1, 4, 4, 4, 6), torch.float16" in repr(batch_of("two", "none"))
    assert "tensor" not in repr(batch_of("three"))


def test_the_training_step_of_the_page_runs_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0]
    exec(code.replace('"cohort.subjects": 24', '"cohort.subjects": 12, "cohort.spacing": 8.0'), {})
    lines = capsys.readouterr().out.splitlines()
    assert "Batch of 4" in lines
    assert any(re.fullmatch(r"assistant text '.+' 1\.0", line) for line in lines)
    first, last = map(float, lines[-1].split())
    assert last < first
