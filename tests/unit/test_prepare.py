"""The scripts prepare, inspect_data and store, on a small data set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Done
from tests.unit.samples import BRAIN, nii, sample, write_data, write_lines
from umbrella.modality import Modality
from umbrella.volumes.store import VolumeStore
from umbrella.volumes.store_files import stored_recipes

Run = Callable[..., Done]
GRIDS = [
    "modalities.sMRI={grid: [8, 8, 8], patch: [4, 4, 4]}",
    "modalities.fMRI={grid: [4, 4, 4, 6], patch: [4, 4, 4, 2]}",
]


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> Path:
    """Subjects a and b in train, c and d in validation, e in test."""
    folder = tmp_path / "data"
    write_data(folder)
    (folder / "e.nii").write_bytes(nii(BRAIN**2))
    write_lines(folder / "test.jsonl", sample("e", "e.nii"))
    return folder


@pytest.fixture
def run(run: Run, tmp_path: Path) -> Run:
    """Runs a script on this data, with the storage folder ``runs`` and more words."""
    given = [f"data.{name}={tmp_path}/data/{name}.jsonl" for name in ("train", "validation", "test")]
    given += [f"resources.storage={tmp_path}/runs", "data.processes=1", "tune.metric=eval/loss", "tune.mode=min"]
    return lambda script, *words: run(script, *given, *GRIDS, *words)


def arrays(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "runs/volumes").glob("*/*.npy"))


def test_prepare_fills_the_store_and_writes_the_report(run: Run, tmp_path: Path) -> None:
    done = run("prepare.py")
    assert done.status == 0, done.stderr
    assert "samples:        train 2, validation 2, test 1" in done.stdout
    assert "volumes:        5" in done.stdout
    assert "in 5 arrays" in done.stdout
    assert f"report:         {tmp_path}/runs/report/index.html" in done.stdout
    assert len(arrays(tmp_path)) == 5
    assert len(list((tmp_path / "runs/report/thumbnails").iterdir())) == 5
    assert "None: all conversations and volumes can be used." in (tmp_path / "runs/report/index.html").read_text()
    assert not list((tmp_path / "runs").glob("quarantine*"))


def test_a_grid_that_is_much_coarser_than_the_volumes_gets_a_note(run: Run, data: Path) -> None:
    line = "note: sMRI: volumes of 40×40×40 voxels are resized to 8×8×8; add grid_96.yaml to the command"
    assert line not in run("prepare.py", "--dry-run").stderr
    (data / "a.nii").write_bytes(nii(np.random.default_rng(0).random((40, 40, 40), np.float32)))
    assert line in run("prepare.py", "--dry-run").stderr
    assert line not in run("prepare.py", "--dry-run", "modalities.sMRI.grid=[12, 12, 12]").stderr


def test_problems_are_in_the_report_and_give_status_2(run: Run, data: Path, tmp_path: Path) -> None:
    (data / "b.nii").write_bytes(b"no image")
    write_lines(data / "test.jsonl", sample("e", "e.nii"), sample("f", "e.nii", task_type=3))
    done = run("prepare.py")
    assert done.status == 2
    page = (tmp_path / "runs/report/index.html").read_text()
    for text in (f"{data}/train.jsonl:2", f"{data}/b.nii: cannot be read as an image", "test.jsonl:2", "task_type"):
        assert text in page
        assert text in done.stderr
    assert "report:" in done.stdout
    assert "more than data.max_tokens=16" in run("prepare.py", "data.max_tokens=16").stderr
    assert not list((tmp_path / "runs").glob("quarantine*"))


def test_a_dry_run_counts_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    done = run("prepare.py", "--dry-run")
    assert (done.status, done.stdout.splitlines()[-1]) == (0, "samples:        train 2, validation 2, test 1")
    phantom = run("prepare.py", "--dry-run", "data.train=", "data.validation=", "data.test=")
    assert "samples:        train 2" in phantom.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("prepare.py", []),
        ("prepare.py", ["--dry-run"]),
        ("train.py", ["--dry-run"]),
        ("tune.py", ["--dry-run"]),
        ("baseline.py", ["--dry-run"]),
    ],
)
def test_every_script_makes_the_checks_of_a_training(
    run: Run, data: Path, tmp_path: Path, script: str, words: list[str]
) -> None:
    assert (fine := run(script, *words)).status == 0, fine.stderr
    leaked, spelt = sample("b", "b.nii"), sample("b", "b.nii")
    leaked["metadata"]["subject_id"] = "c"
    spelt["metadata"]["subject_label"] = "Female"
    for second, line in ((leaked, "subject_id: c is also in data.train"), (spelt, "'Female', 'female' differ by case")):
        write_lines(data / "train.jsonl", sample("a", "a.nii"), second)
        done = run(script, *words)
        assert done.status == 2
        assert line in done.stderr


def test_inspect_decodes_only_the_volume_that_it_draws(run: Run, tmp_path: Path) -> None:
    done = run("inspect_data.py", "--task-id", "b/sex")
    assert done.status == 0, done.stderr
    assert "⟦male.<|im_end|>↵⟧" in done.stdout
    assert "<image: 8 tokens, sMRI, b.nii>" in done.stdout
    assert (tmp_path / "runs/inspect/b_sex.png").stat().st_size > 5000
    assert len(arrays(tmp_path)) == 1


def test_inspect_has_options_for_split_index_and_picture(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "here.png"
    words = "--split", "test", "--sample", "0", "--picture", str(picture), "mask.end_of_turn=false"
    done = run("inspect_data.py", *words)
    assert "e/sex (T1), test" in done.stdout
    assert "⟦female.⟧<|im_end|>↵" in done.stdout
    assert picture.exists()
    assert run("inspect_data.py", "--dry-run").stdout.startswith("a/sex (T1), train")
    assert not (tmp_path / "runs/inspect").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--task-id", "b_sex"], "error: --task-id b_sex: not among the 2 conversations of train; did you mean b/sex"),
        (["--task-id", "b/sex", "--sample", "1"], "error: --task-id and --sample both name a conversation"),
        (["--split", "test", "data.test="], "error: data.test"),
    ],
)
def test_what_inspect_cannot_find_is_one_line_and_status_2(run: Run, words: list[str], line: str) -> None:
    done = run("inspect_data.py", *words)
    assert (done.status, done.stderr[: len(line)]) == (2, line)
    assert len(done.stderr.splitlines()) == 1


def test_store_lists_recipes_and_prunes_only_what_is_unused(run: Run, data: Path, tmp_path: Path) -> None:
    run("prepare.py")
    run("inspect_data.py", "modalities.sMRI.intensity=percentiles")  # another recipe, of one volume
    (data / "a.nii").unlink()
    table = run("store.py").stdout
    assert "8×8×8, resized, zscore, background 0" in table
    assert "8×8×8, resized, percentiles 1 to 99, background 0" in table
    assert "nothing in these settings" in table
    before = arrays(tmp_path)
    assert len(before) == 6

    listed = run("store.py", "--prune", "--dry-run").stdout
    assert arrays(tmp_path) == before
    pruned = run("store.py", "--prune").stdout
    assert listed.replace("would be deleted", "deleted") == pruned
    # Array and properties of a.nii and of the other recipe, that recipe, and the record of a.nii.
    assert pruned.startswith("6 files of ")
    modalities = {"sMRI": Modality(grid=(8, 8, 8), patch=(4, 4, 4))}
    store = VolumeStore(tmp_path / "runs/volumes", modalities, 10_000)
    assert all(store.contains(data / f"{subject}.nii", "sMRI") for subject in "bce")
    assert sorted(recipe.arrays for recipe in stored_recipes(store.folder, modalities)) == [1, 3]
    assert run("store.py", "--prune").stdout.startswith("0 files of ")
