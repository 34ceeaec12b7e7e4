"""The scripts that look: prepare, inspect_data and store, as a person starts them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import Done
from umbrella.modality import Modality
from umbrella.volumes.store import VolumeStore
from umbrella.volumes.store_files import stored_recipes

Run = Callable[..., Done]
GRID = "modalities.sMRI={grid: [8, 8, 8], patch: [4, 4, 4]}"


@pytest.fixture
def run(run: Run, tmp_path: Path) -> Run:
    """Runs a script on the cohort of ``data``, with the storage folder ``runs`` and more words."""
    data = [f"data.{name}={tmp_path}/data/{name}.jsonl" for name in ("train", "validation", "test")]
    loss = ["tune.metric=eval/loss", "tune.mode=min"]  # a split of one subject has one class
    return lambda script, *words: run(script, f"resources.storage={tmp_path}/runs", GRID, *loss, *data, *words)


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> Path:
    """Four subjects in train, one each in validation and test, with a volume and a question each."""
    folder = tmp_path / "data"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split, subjects in {"train": "abcd", "validation": "e", "test": "f"}.items():
        lines = []
        for subject in subjects:
            nib.save(
                nib.Nifti1Image(draw.normal(size=(9, 10, 8)).astype(np.float32), np.eye(4)), folder / f"{subject}.nii"
            )
            lines.append(json.dumps(sample(subject)))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def sample(subject: str) -> dict[str, Any]:
    image = {"path": f"{subject}.nii", "modality": "sMRI"}
    shown = {"type": "image", "modality": "sMRI", "image_path": f"{subject}.nii"}
    sex = "male" if subject in "acef" else "female"
    return {
        "task_id": f"{subject}/sex",
        "task_type": "T1",
        "images": [image],
        "conversations": [
            {"role": "user", "content": [shown, {"type": "text", "text": "Sex?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"{sex}."}]},
        ],
        "metadata": {"subject_id": subject, "subject_label": sex, "target": "sex"},
    }


def test_prepare_fills_the_store_and_writes_the_report(run: Run, tmp_path: Path) -> None:
    done = run("prepare.py")
    assert done.status == 0, done.stderr
    assert "samples:        train 4, validation 1, test 1" in done.stdout
    assert "volumes:        6" in done.stdout
    assert "in 6 arrays" in done.stdout
    assert f"report:         {tmp_path}/runs/report/index.html" in done.stdout
    assert len(list((tmp_path / "runs/volumes").glob("*/*.npy"))) == 6
    assert len(list((tmp_path / "runs/report/thumbnails").iterdir())) == 6
    assert "None: all conversations and volumes can be used." in (tmp_path / "runs/report/index.html").read_text()
    assert not list((tmp_path / "runs").glob("quarantine*"))


def test_with_problems_there_is_a_report_that_says_them_and_status_2(run: Run, data: Path, tmp_path: Path) -> None:
    (data / "b.nii").write_bytes(b"no image")
    broken = sample("a") | {"task_id": "x", "task_type": 3}
    with (data / "test.jsonl").open("a") as file:
        file.write("\n" + json.dumps(broken))
    done = run("prepare.py")
    assert done.status == 2
    page = (tmp_path / "runs/report/index.html").read_text()
    for words in (f"{data}/train.jsonl:2", f"{data}/b.nii: cannot be read as an image", "test.jsonl:2", "task_type"):
        assert words in page
        assert words in done.stderr
    assert "report:" in done.stdout
    assert len(list((tmp_path / "runs/report/thumbnails").iterdir())) == 5
    assert not list((tmp_path / "runs").glob("quarantine*"))


def test_quarantined_samples_go_to_the_report_and_a_file_and_the_run_goes_on(
    run: Run, data: Path, tmp_path: Path
) -> None:
    (data / "b.nii").write_bytes(b"no image")
    done = run("prepare.py", "data.on_bad=quarantine", "data.max_bad_fraction=0.5")
    assert done.status == 0, done.stderr
    [quarantine] = (tmp_path / "runs").glob("quarantine-*.jsonl")
    assert f"1 samples, see {quarantine}" in done.stdout
    assert "train 3, validation 1, test 1" in done.stdout
    assert "b.nii: cannot be read as an image" in (tmp_path / "runs/report/index.html").read_text()


def test_a_sample_too_long_for_the_model_is_a_problem(run: Run, tmp_path: Path) -> None:
    done = run("prepare.py", "data.max_tokens=16")
    assert done.status == 2
    assert "more than data.max_tokens=16" in (tmp_path / "runs/report/index.html").read_text()


def test_a_dry_run_counts_and_makes_nothing(run: Run, tmp_path: Path) -> None:
    done = run("prepare.py", "--dry-run")
    assert (done.status, done.stdout.splitlines()[-1]) == (0, "samples:        train 4, validation 1, test 1")
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
def test_what_would_end_a_training_at_its_start_ends_whatever_checks_it(
    run: Run, data: Path, tmp_path: Path, script: str, words: list[str]
) -> None:
    file = data / "train.jsonl"
    good = file.read_text()
    female = good.replace('"male."', '"female."', 1)
    assert (fine := run(script, *words)).status == 0, fine.stderr
    faults = {
        good.replace('"subject_id": "a"', '"subject_id": "e"'): "subject_id: e is also in data.train",
        female.replace('"subject_label": "male"', '"subject_label": "Female"', 1): "'Female', 'female' differ by case",
    }
    for content, line in faults.items():
        file.write_text(content)
        done = run(script, *words)
        assert done.status == 2
        assert line in done.stderr


def test_inspect_decodes_the_one_volume_that_it_draws(run: Run, tmp_path: Path) -> None:
    done = run("inspect_data.py", "--task-id", "c/sex")
    assert done.status == 0, done.stderr
    assert "⟦male.<|im_end|>↵⟧" in done.stdout
    assert "<image: 8 tokens, sMRI, c.nii>" in done.stdout
    assert (tmp_path / "runs/inspect/c_sex.png").stat().st_size > 5000
    assert len(list((tmp_path / "runs/volumes").glob("*/*.npy"))) == 1


def test_inspect_takes_split_number_policy_and_place_of_the_picture(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "here.png"
    words = "--split", "test", "--sample", "0", "--picture", str(picture), "mask.end_of_turn=false"
    done = run("inspect_data.py", *words)
    assert "f/sex (T1), test" in done.stdout
    assert "⟦male.⟧<|im_end|>↵" in done.stdout
    assert picture.exists()
    assert run("inspect_data.py", "--dry-run").stdout.startswith("a/sex (T1), train")
    assert not (tmp_path / "runs/inspect").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--task-id", "b_sex"], "error: --task-id b_sex: not among the 4 conversations of train; did you mean b/sex"),
        (["--task-id", "b/sex", "--sample", "1"], "error: --task-id and --sample both name a conversation"),
        (["--split", "test", "data.test="], "error: data.test"),
    ],
)
def test_what_inspect_cannot_find_is_one_line_and_status_2(run: Run, words: list[str], line: str) -> None:
    done = run("inspect_data.py", *words)
    assert (done.status, done.stderr[: len(line)]) == (2, line)
    assert len(done.stderr.splitlines()) == 1


def test_store_tells_recipes_apart_and_prunes_only_what_is_unused(run: Run, data: Path, tmp_path: Path) -> None:
    run("prepare.py")
    run("inspect_data.py", "modalities.sMRI.intensity=percentiles")  # another recipe, of one volume
    (data / "a.nii").unlink()
    folder = tmp_path / "runs/volumes"
    table = run("store.py").stdout
    assert "8×8×8, resized, zscore, background 0" in table
    assert "8×8×8, resized, percentiles 1 to 99, background 0" in table
    assert "nothing in these settings" in table
    arrays = set(folder.glob("*/*.npy"))
    assert len(arrays) == 7

    looked = run("store.py", "--prune", "--dry-run").stdout
    assert set(folder.glob("*/*.npy")) == arrays
    pruned = run("store.py", "--prune").stdout
    assert looked.replace("would be deleted", "deleted") == pruned
    # Array and facts of a.nii and of the other recipe, that recipe, and the record of a.nii.
    assert pruned.startswith("6 files of ")

    modalities = {"sMRI": Modality(grid=(8, 8, 8), patch=(4, 4, 4))}
    store = VolumeStore(folder, modalities, 10_000)
    assert all(store.contains(data / f"{subject}.nii", "sMRI") for subject in "bcdef")
    [held] = stored_recipes(folder, modalities)
    assert held.arrays == 5
    assert run("store.py", "--prune").stdout.startswith("0 files of ")
