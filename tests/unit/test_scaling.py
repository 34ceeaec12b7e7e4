"""docs/scaling.md says what benchmarks/scaling.py computes."""

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scaling() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "benchmarks" / "scaling.py"))


def test_the_doc_has_the_tables_that_the_script_prints(scaling: dict[str, Any]) -> None:
    doc = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    parts = list(scaling["tables"](scaling["Constants"]()))
    assert len(parts) == 6
    assert [part for part in parts if part not in doc] == []


def test_the_measured_constants_are_those_of_the_benchmarks(scaling: dict[str, Any]) -> None:
    numbers = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = (REPOSITORY / "benchmarks/results/gpu_training_h200.txt").read_text(encoding="utf-8")
    constants = scaling["Constants"]()
    assert f"| {constants.samples} on one host" in numbers
    assert f": {constants.decoded} to 3.8: 4.3 times" in numbers.replace("7.0 MB |", "7.0 MB:")
    assert f"| {constants.doubled} (506 to 258 samples/s)" in numbers
    assert f'"seconds from fit() to the first step": {constants.start}' in results
    assert f'"batch of a GPU": {constants.batch}' in results


def written_in(file: Path) -> dict[str, Any]:
    """The constants of a module that takes seconds to import."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Dict):
            found[target.id] = ast.literal_eval(node.value)
    return found


def test_the_weights_of_the_model_are_those_of_the_benchmarks_shape(scaling: dict[str, Any]) -> None:
    shapes = written_in(REPOSITORY / "benchmarks" / "gpu_training.py")
    tower, language = shapes["LAYER"], shapes["SHAPES"]["0.5b"]

    def layers(layer: dict[str, int], matrices: int) -> int:
        width = layer["hidden_size"]
        return layer["num_hidden_layers"] * width * (4 * width + matrices * layer["intermediate_size"])

    weights = layers(tower, 2) + layers(language, 3) + 152_000 * language["hidden_size"]
    assert scaling["Constants"]().model == pytest.approx(weights, rel=0.01)
    assert scaling["Constants"]().embedder == pytest.approx(16**3 * tower["hidden_size"], rel=0.01)
