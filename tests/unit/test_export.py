"""Exported models: what is in the folder, and that it answers as the checkpoint does, also from the Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import Done
from tests.hub import TOKEN, running_hub
from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.evaluation_run.model_card import find_model_card
from umbrella.inference.export import LICENSE, USE
from umbrella.inference.model import Umbrella

LORA = {"train": "embedder+lora", "lora_rank": 2}
ON_HUB = """
import json, sys
from umbrella import Umbrella
from umbrella.commands import main
merged, referenced, scan = sys.argv[1:]
sys.argv[1:] = ["export", f"checkpoint={merged}", f"{merged}-again", "--push", "lab/brains"]
main()
sys.argv[1:] = ["ask", "lab/brains", scan, "Sex?", "--modality", "sMRI", "--candidates", "male.,female."]
main()
for name in ("lab/brains", referenced):
    print(json.dumps(Umbrella.from_pretrained(name, device="cpu").score(scan, "Sex?", ["male.", "female."], "sMRI")))
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """Runs a command in this process."""

    def call(name: str, *words: str) -> Done:
        capsys.readouterr()
        status = 0
        try:
            import_module(f"umbrella.commands.{name}").run(words)
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def adapted(
    build: Callable[..., Any], save_model: Callable[..., Path], save_llava: Any, tokenizer: Any, tmp_path: Path
) -> Path:
    """A checkpoint of adapters on a base in the cache of the Hub, which was trained on data in a secret folder."""
    base = tmp_path / "cache" / "models--lab--base" / "snapshots" / "1"
    save_llava(base)
    tokenizer.save_pretrained(base)
    options = {"checkpoint": str(base), **LORA}
    model = build(**options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    data = {"data.train": [f"{tmp_path}/secret/sub-17.jsonl"], "resources.storage": str(tmp_path)}
    settings = data | {f"model.{name}": value for name, value in options.items()}
    (tmp_path / "trainings").mkdir()
    checkpoint = save_model(tmp_path / "trainings" / "run", model, **settings)
    adapter = checkpoint / "adapter" / "adapter_config.json"  # as PEFT writes it for a model from a folder
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": str(base)}))
    return checkpoint


def texts(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("merge", [True, False])
def test_an_exported_folder_answers_as_its_checkpoint_and_has_no_paths(
    adapted: Path, said: list[Conversation], tmp_path: Path, merge: bool
) -> None:
    model = Umbrella.from_checkpoint(adapted, device="cpu")
    expected = model.score(said[2].volumes[0].image_path, "Sex?", ["male.", "female."], "sMRI")
    model.save_pretrained(tmp_path / "exported", merge=merge)
    found = texts(tmp_path / "exported")
    assert (
        "model.safetensors" in found if merge else {"trained.safetensors", "adapter/adapter_config.json"} <= set(found)
    )
    for content in found.values():
        for secret in (str(tmp_path), str(Path.home()), "sub-17", "secret"):
            assert secret.encode() not in content
    assert not any(file.endswith((".py", ".pt", ".bin", ".pickle")) for file in found)
    assert b"auto_map" not in found["config.json"]
    metadata = yaml.safe_load(found["README.md"].decode().split("---\n")[1])
    assert (metadata["pipeline_tag"], metadata["base_model"]) == ("image-text-to-text", "lab/base")
    settings = yaml.safe_load(found["settings.yaml"])
    assert settings["modalities"]["sMRI"]["grid"] == [4, 4, 4]
    assert settings["model"]["checkpoint"] == "lab/base"
    if merge:
        (tmp_path / "cache").rename(tmp_path / "gone")
        assert not any("lora" in name for name in load_file(tmp_path / "exported" / "model.safetensors"))
        again = Umbrella.from_pretrained(tmp_path / "exported", device="cpu")
        scores = again.score(said[2].volumes[0].image_path, "Sex?", ["male.", "female."], "sMRI")
        assert scores == pytest.approx(expected, abs=1e-5)
        again.save_pretrained(tmp_path / "twice")
        assert texts(tmp_path / "twice").keys() == found.keys()
        assert texts(tmp_path / "twice")["settings.yaml"] == found["settings.yaml"]


def test_a_model_is_pushed_to_the_hub_and_read_and_asked_from_there(
    adapted: Path, said: list[Conversation], tmp_path: Path
) -> None:
    model, scan = Umbrella.from_checkpoint(adapted, device="cpu"), said[2].volumes[0].image_path
    expected = model.score(scan, "Sex?", ["male.", "female."], "sMRI")
    model.save_pretrained(tmp_path / "referenced", merge=False)
    with running_hub() as hub:
        base = json.loads((adapted / "base.json").read_text())["checkpoint"]
        hub.models["lab/base"], hub.private["lab/base"] = texts(Path(base)), False
        hub.models["lab/brains"], hub.private["lab/brains"] = {"old.safetensors": b""}, True
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        command = [sys.executable, "-c", ON_HUB, str(adapted), str(tmp_path / "referenced"), scan]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert hub.private["lab/brains"]
        assert hub.models["lab/brains"] == texts(Path(f"{adapted}-again"))
    printed = done.stdout.splitlines()
    assert printed[1] == f"uploaded to {hub.address}/lab/brains"
    probabilities = {line.split()[1]: float(line.split()[0]) for line in printed if line.startswith(("0.", "1."))}
    assert probabilities == pytest.approx(expected, abs=1e-4)
    assert [json.loads(line) for line in printed[-2:]] == [pytest.approx(expected, abs=1e-5)] * 2


def test_ask_answers_as_predict_does(
    command: Callable[..., Done], ask: Callable[..., Done], learnt: Path, said: list[Conversation]
) -> None:
    s2, d, _ = (volume.image_path for volume in said[2].volumes)
    options = ("--modality", "sMRI,dMRI", "--candidates", "male.,Seen.")
    done = command("ask", str(learnt), s2, d, "", *options)
    assert done.stdout.splitlines()[0] == "Seen."
    assert done.stdout == ask(s2, d, "--ask", "", *options).stdout
    errors = {
        "error: name a model, volumes and a question, as in: ": ("x",),
        "error: /none.nii does not exist": (str(learnt), "/none.nii", "Sex?"),
        "error: lab/no/model: is no folder, and cannot be had from the Hub: ": ("lab/no/model", s2, "Sex?"),
    }
    for message, words in errors.items():
        done = command("ask", *words)
        assert (done.status, done.stderr[: len(message)]) == (2, message)


def test_export_takes_the_card_of_the_newest_evaluation_and_a_license(
    command: Callable[..., Done], adapted: Path, tmp_path: Path
) -> None:
    where = f"checkpoint={adapted}"
    assert "no evaluation of it was found" in command("export", where, f"{tmp_path}/new", "--dry-run").stdout
    for number, (evaluation, title) in enumerate({"a": "run-step_0000001", "b": "run-step_0000001", "c": "x"}.items()):
        card = tmp_path / "evaluations" / evaluation / "model_card.md"
        card.parent.mkdir(parents=True)
        card.write_text(f"---\n{LICENSE}\n---\n\n# Model card of {title}\n{evaluation}\n", encoding="utf-8")
        os.utime(card, (number, number))
    assert find_model_card(adapted) == tmp_path / "evaluations" / "b" / "model_card.md"
    done = command("export", where, f"{tmp_path}/new", "--license", "apache-2.0")
    assert done.status == 0
    readme = (tmp_path / "new" / "README.md").read_text("utf-8")
    assert readme == "---\nlicense: apache-2.0\n---\n\n# Model card of run-step_0000001\nb\n" + USE
    assert command("export", where, f"{tmp_path}/new").stderr.endswith(
        f"{tmp_path}/new: is not empty; name a new folder\n"
    )
    assert command("export", where).stderr.startswith("error: name one folder to write, as in: ")


def test_a_base_in_a_folder_cannot_be_referenced(learnt: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step_0000001: has no base on the Hub that could stand for weights;"):
        Umbrella.from_checkpoint(learnt, device="cpu").save_pretrained(tmp_path / "new", merge=False)
    assert not (tmp_path / "new").exists()
