"""The tutorial, executed."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.acceptance
NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"
RESULTS = """
import json

sex = {c: next(g for g in groups if (g.target, g.by) == ("sex", "all")) for c, groups in result.groups.items()}
print(json.dumps({
    "untrained": loss.item(), "first step": after.item(), "last step": losses[-1],
    "expected": log(len(renderer.tokenizer)),
    "validation": sweep.trials[0].metric, "trials": len(sweep.trials), "page": page.is_file(),
    "own": sex["as_asked"].metrics[names["sex"]][0], "others": sex["shuffled"].metrics[names["sex"]][0],
    "answer": answer, "scores": scores,
}))
"""


def test_the_notebook_runs_and_its_model_reads_the_volumes(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(-1, nbformat.v4.new_code_cell(RESULTS))  # before Ray is stopped
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    found = json.loads(
        "".join(output["text"] for output in notebook.cells[-2].outputs if output.get("name") == "stdout")
    )
    assert found["untrained"] == pytest.approx(found["expected"], rel=0.05)
    assert found["last step"] < 0.5 * found["first step"] < 0.5 * found["untrained"]
    assert found["trials"] == 2
    assert found["validation"] > 0.7
    assert found["page"]
    assert found["own"] > 0.7 > found["others"]
    assert found["answer"] in ("male.", "female.")
    assert sum(found["scores"].values()) == pytest.approx(1)
    assert (tmp_path / "tutorial-runs" / "mlflow.db").is_file()
