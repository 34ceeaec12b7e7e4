"""Shared fixtures: small real NIfTI files of awkward shapes, a few conversations about them, and the byte tokenizer.

Imports that cost seconds (torch, transformers) stay inside the fixtures, so that the tests without them start at once.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from uuid import uuid4

import nibabel as nib
import numpy as np
import pytest

from umbrella.cluster import prepare_environment
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.predictions import Prediction
from umbrella.modality import Modality

prepare_environment("local")  # as scripts do, before Ray is imported

MODALITIES = {
    "sMRI": Modality(grid=(4, 4, 4), patch=(2, 4, 4)),
    "dMRI": Modality(grid=(4, 4, 4), patch=(4, 4, 4)),
    "fMRI": Modality(grid=(4, 4, 4, 6), patch=(4, 4, 4, 2)),
}
SMALL = {
    "cohort.subjects": 12,
    "cohort.spacing": 8.0,
    "cohort.functional_subjects": 3,
    "cohort.diffusion_subjects": 3,
    "modalities.sMRI": {"grid": [8, 8, 8], "patch": [4, 4, 4]},
    "modalities.dMRI": {"grid": [8, 8, 8], "patch": [8, 8, 8]},
    "modalities.fMRI": {"grid": [4, 4, 4, 4], "patch": [4, 4, 4, 2]},
    "model.width": 16,
    "train.epochs": 2,
    "train.batch_size": 4,
    "train.accumulate": 1,
    "optim.warmup": 2,
    "tracking.model": False,  # 10 s
    "evaluate.at_end": False,
}
"""Settings of a training that takes seconds, on one small cohort."""
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
AFFINE = np.array([[1, 0, 0, -3], [0, 2, 0, -5], [0, 0, 3.5, 7], [0, 0, 0, 1]])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where processes share the tests (``pytest -n 2``), they take files; one has all tests of Ray, and so one Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.startswith(("tests/ray/", "tests/faults/")) else file

    config.option.loadscopereorder = False  # those of Ray first, as they are collected: they take longest
    return Scheduling(config, log)


def make_conversation(*turns: tuple[str, Any], **others: Any) -> Conversation:
    """A conversation of (role, content) turns; in the content a string is text and a pair is (modality, path)."""

    def item_of(content: Any) -> dict[str, str]:
        if isinstance(content, str):
            return {"type": "text", "text": content}
        return {"type": "image", "modality": content[0], "image_path": str(content[1])}

    items = [(role, [content] if isinstance(content, str) else content) for role, content in turns]
    written = [{"role": role, "content": [item_of(content) for content in contents]} for role, contents in items]
    sample = {"task_id": "t", "task_type": "T1", "conversations": written}
    return Conversation.model_validate(sample | others)


def make_prediction(subject: str = "a", label: Any = "male", **others: Any) -> Prediction:
    """A prediction of a subject's sex, or of another target."""
    fields = {"task_id": "t", "task_type": "T1", "target": "sex", "truth": f"{label}.", "answer_nll": 1.0}
    return Prediction(**fields | {"subject_id": subject, "label": label, "answer_tokens": 1} | others)


def write_questions(file: Path, conversations: Iterable[Conversation]) -> Path:
    """The conversations without their last answers, in a file."""
    samples = [conversation.model_dump(mode="json") for conversation in conversations]
    for sample in samples:
        sample["conversations"].pop()
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return file


def log_sweep(uri: str, experiment: str, folder: Path, metric: str, mode: str, values: list[float]) -> None:
    """Log a sweep and a trial for each value of its metric, which ended, to MLflow."""
    from umbrella.tracking.mlflow_logger import MlflowLogger

    parent = MlflowLogger.start(uri, experiment, folder.name, sweep=folder.name, folder=folder)
    parent.params({"tune.metric": metric, "tune.mode": mode})
    for value in values:
        names = {"sweep": folder.name, "parent": parent.run_id, "folder": folder / "trials" / str(value)}
        trial = MlflowLogger.start(uri, experiment, f"lr={value}", **names)
        trial.results({f"best/{metric}": value}, 0)
        trial.end()
    parent.end()


@pytest.fixture(scope="session")
def talk() -> Callable[..., Conversation]:
    return make_conversation


@pytest.fixture(scope="session")
def modalities() -> dict[str, Modality]:
    """2, 1 and 3 tokens per volume."""
    return MODALITIES


@pytest.fixture
def brain() -> np.ndarray:
    """A volume in which no two voxels are alike, as it lies in RAS+ axes."""
    return np.arange(7 * 5 * 4, dtype=np.float32).reshape(7, 5, 4)


@pytest.fixture
def stored(tmp_path: Path, brain: np.ndarray) -> dict[str, Path]:
    """The brain in files that all say the same: anisotropic voxels, flipped and permuted axes, big-endian, scaled."""
    flip = AFFINE @ np.array([[-1, 0, 0, 6], [0, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])
    images = {
        "plain": nib.Nifti1Image(brain, AFFINE),
        "flipped": nib.Nifti1Image(brain[::-1, :, ::-1], flip),
        "permuted": nib.Nifti1Image(brain.transpose(2, 0, 1), AFFINE[:, [2, 0, 1, 3]]),
        "big_endian": nib.Nifti1Image(brain, AFFINE, nib.Nifti1Header(endianness=">")),
        "scaled": nib.Nifti1Image((2 * brain + 8).astype(np.int16), AFFINE, dtype=np.int16),
        "mgh": nib.MGHImage(brain, AFFINE),
    }
    images["scaled"].header.set_slope_inter(0.5, -4)
    paths = {name: tmp_path / f"{name}.{'mgz' if name == 'mgh' else 'nii.gz'}" for name in images}
    paths["big_endian"] = tmp_path / "big_endian.nii"
    for name, image in images.items():
        nib.save(image, paths[name])
    return paths


def byte_tokenizer() -> Any:
    """A tokenizer of 260 tokens: the bytes of UTF-8 and the special tokens of ChatML. Each letter is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from umbrella.data.tokenizer import CHATML, IMAGE_TOKEN

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>"}
    extra = ["<|im_start|>", IMAGE_TOKEN]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra, **special)
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversation]:
    """Conversations with every mix of volumes, about real files that all differ: two modalities, none, three."""
    folder = tmp_path_factory.mktemp("cohort")
    draw = np.random.default_rng(0)
    shapes = {"s1": (5, 6, 4), "s2": (4, 4, 7), "d": (3, 4, 5), "f1": (4, 5, 4, 6), "f2": (4, 4, 4, 8)}
    for name, shape in shapes.items():
        nib.save(nib.Nifti1Image(draw.normal(size=shape).astype(np.float32), AFFINE), folder / f"{name}.nii")
    s1, s2, d, f1, f2 = (folder / f"{name}.nii" for name in shapes)
    return {
        "two": make_conversation(
            ("user", [("fMRI", f1), "and", ("sMRI", s1), "Sex?"]),
            ("assistant", "male."),
            task_id="two",
            task_type="T2",
            metadata={"subject_id": "a", "subject_label": "male"},
        ),
        "none": make_conversation(("user", "Hi"), ("assistant", "Hello, you."), task_id="none"),
        "three": make_conversation(
            ("user", [("sMRI", s2), ("dMRI", d)]),
            ("assistant", "Seen."),
            ("user", ["And this?", ("fMRI", f2)]),
            ("assistant", "63.5"),
            task_id="three",
            task_type="T3",
            metadata={"subject_id": "b", "subject_label": 63.5},
        ),
    }


@pytest.fixture(scope="session")
def examples(cohort: dict[str, Conversation], tokenizer: Any) -> dict[str, Any]:
    """The conversations of the cohort, rendered."""
    from umbrella.data.rendering import Renderer

    renderer = Renderer(tokenizer, MODALITIES)
    return {name: renderer.render(conversation) for name, conversation in cohort.items()}


@pytest.fixture(scope="session")
def batch_of(examples: dict[str, Any], store: Any, tokenizer: Any) -> Callable[..., Any]:
    """Names of the cohort's conversations to a batch of them."""
    from umbrella.data.batching import Collator
    from umbrella.data.rendering import Renderer
    from umbrella.data.settings import MaskPolicy

    collate = Collator(Renderer(tokenizer, MODALITIES), store)
    return lambda *names, supervise="assistant", **options: collate(
        [examples[name] for name in names], MaskPolicy(supervise=supervise), **options
    )


@pytest.fixture(scope="session")
def build(tokenizer: Any) -> Callable[..., Any]:
    """A tiny model in training mode, its weights drawn from a seed."""
    import torch

    from umbrella.models.build import build_model
    from umbrella.models.settings import ModelSettings

    torch.set_num_threads(1)  # on matrices this small, threads only wait for each other

    def build(seed: int = 0, modalities: dict[str, Modality] = MODALITIES, **others: Any) -> Any:
        torch.manual_seed(seed)
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        settings = ModelSettings(**{"width": 16, "heads": 2, **others})
        return build_model(settings, modalities, len(tokenizer), image_id).train()

    return build


def nll(model: Any, batch: Any) -> Any:
    """The model's token_nll in evaluation mode, with weights in memory of torch's own alignment.

    Loaded weights are in a mapped file, and on some processors matrix products round by alignment.
    """
    import torch

    for weight in model.parameters():
        weight.data = weight.data.clone()
    with torch.no_grad():
        return model.eval()(**batch.model_inputs()).token_nll


def untrained_model(build: Callable[..., Any], store: Any, tokenizer: Any) -> Any:
    """A model that answers questions, with weights so large that every prompt has another answer."""
    import torch

    from umbrella.config import load_settings
    from umbrella.data.batching import Collator
    from umbrella.data.rendering import Renderer
    from umbrella.inference.model import Umbrella

    network, renderer = build(seed=3), Renderer(tokenizer, store.modalities)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.4)
    return Umbrella(network, renderer, Collator(renderer, store), load_settings())


def make_writer(folder: Path, model: Any, tokenizer: Any, settings: Any, code: Any = MappingProxyType({})) -> Any:
    """The writer of a language model's checkpoints."""
    from umbrella.models.partial_checkpoint import saves_full_model, write_weights
    from umbrella.training.checkpoint_files import CheckpointWriter
    from umbrella.training.language_model import model_files

    save_weights = partial(write_weights, full=saves_full_model(settings.model))
    return CheckpointWriter(folder, model_files(model, tokenizer, settings), save_weights, settings, code)


@pytest.fixture(scope="session")
def save_step(tokenizer: Any) -> Callable[..., Path]:
    """Writes a checkpoint of a training (model, optimizer, schedule) into a folder, as rank 0 does."""
    from umbrella.config import load_settings
    from umbrella.models.partial_checkpoint import parameters_to_save
    from umbrella.training.checkpoint_files import TrainingState
    from umbrella.training.distributed import copy_to_host, copy_training_state
    from umbrella.version import __version__

    def save(folder: Path, training: Any, step: int, rng: Any = None, metrics: Any = None, **others: Any) -> Path:
        folder.mkdir(exist_ok=True)
        settings = load_settings(overrides=others)
        code = {"git.commit": "abc", "torch": "1", "umbrella": __version__}
        writer = make_writer(folder, training.model, tokenizer, settings, code)
        named = dict(training.model.named_parameters())
        weights = copy_to_host({name: named[name] for name in parameters_to_save(training.model, settings.model)})
        tensors = copy_training_state(training.optimizer, training.schedule)
        writer.write(TrainingState(step, 4 * step), metrics or {}, weights, tensors | ({"rng": rng} if rng else {}))
        writer.wait()
        return folder / f"step_{step:07d}"

    return save


@pytest.fixture(scope="session")
def save_model(save_step: Callable[..., Path]) -> Callable[..., Path]:
    """Writes the checkpoint of a model, as a training does; options are settings."""
    from umbrella.training.optimizer import build_optimizer, build_schedule
    from umbrella.training.settings import OptimSettings

    def write(folder: Path, model: Any, **options: Any) -> Path:
        optim = OptimSettings(lr=1e-2)
        optimizer = build_optimizer(model, optim)
        training = SimpleNamespace(model=model, optimizer=optimizer, schedule=build_schedule(optimizer, optim, 9))
        kinds = {f"modalities.{name}": modality.model_dump(mode="json") for name, modality in MODALITIES.items()}
        return save_step(folder, training, 1, **kinds, **options)

    return write


@pytest.fixture(scope="session")
def said(cohort: dict[str, Conversation]) -> list[Conversation]:
    """Conversations with prompts of very different lengths, and answers of their own."""
    three = cohort["three"].model_dump(mode="json")
    three["conversations"][-1]["content"][0]["text"] = "Seen. And 2 more, é."
    return [cohort["two"], cohort["none"], Conversation.model_validate(three)]


@pytest.fixture(scope="session")
def teach() -> Callable[..., None]:
    """Trains a model on one batch for some steps."""
    import torch

    def train(model: Any, batch: Any, steps: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            model(**batch.model_inputs()).token_nll.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.fixture(scope="session")
def learnt(
    build: Callable[..., Any],
    save_model: Callable[..., Path],
    said: list[Conversation],
    store: Any,
    teach: Callable[..., None],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The checkpoint of a model that has learnt by heart what was said."""
    from umbrella.data.batching import Collator
    from umbrella.data.rendering import Renderer
    from umbrella.data.settings import MaskPolicy

    model, renderer = build(width=32), Renderer(tokenizer, MODALITIES)
    batch = Collator(renderer, store)([renderer.render(c) for c in said], MaskPolicy())
    teach(model, batch, 150)
    return save_model(tmp_path_factory.mktemp("training") / "run", model)


@pytest.fixture(scope="session")
def save_llava() -> Callable[..., Any]:
    """Saves a small plain LLaVA of random weights, as a published one lies in its folder, and returns it."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    layer = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    flat = {**layer, "image_size": 8, "patch_size": 4}
    towers = {"siglip": SiglipVisionConfig(**flat, vision_use_head=False), "clip": CLIPVisionConfig(**flat)}
    words = {"num_key_value_heads": 1, "vocab_size": 264}  # a checkpoint may have more than its tokenizer
    languages = {"qwen2": Qwen2Config(**layer, **words), "llama": LlamaConfig(**layer, **words)}

    def save(folder: Path, tower: str = "siglip", language: str = "qwen2", **options: Any) -> Any:
        config = LlavaConfig(
            vision_config=towers[tower], text_config=languages[language], **{"vision_feature_layer": -1, **options}
        )
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for weight in model.parameters():  # no weight keeps a value that a fresh model would have too
                weight.normal_(std=0.1)
        model.save_pretrained(folder)
        return model

    return save


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a disk of so many bytes, or again with another size; skips where only root may, and this is not root."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        again = "remount," if folder.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "none", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs a small disk, and mounting one is not allowed here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Puts a new SQLite store into a folder and gives its address: a copy, since to make the tables takes seconds."""
    from umbrella.tracking.store import open_experiment, tracking_uri

    made = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_experiment(tracking_uri(made), "template", made)

    def put(folder: Path) -> str:
        shutil.copyfile(made / "mlflow.db", folder / "mlflow.db")
        return f"sqlite:///{folder / 'mlflow.db'}"

    return put


@pytest.fixture
def uri(mlflow_store: Callable[[Path], str], tmp_path: Path) -> str:
    """The address of this test's own store."""
    return mlflow_store(tmp_path)


@pytest.fixture
def experiment(uri: str, tmp_path: Path) -> str:
    """An experiment in it."""
    from umbrella.tracking.store import open_experiment

    return open_experiment(uri, "x", tmp_path)


@pytest.fixture
def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from umbrella.volumes.store import VolumeStore

    return VolumeStore(tmp_path_factory.mktemp("store"), MODALITIES, max_voxels=10_000)


@pytest.fixture(scope="session")
def ray_session() -> Any:
    """The one Ray of the whole test session, started as the scripts start theirs."""
    import ray

    from umbrella.cluster import start_ray
    from umbrella.training.settings import ResourceSettings

    os.environ["RAY_metrics_report_interval_ms"] = "200"  # noqa: SIM112  # 10 s: more than a training here takes
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # 15: a hundredth of the time beside a busy process
    start_ray(ResourceSettings(), log_to_driver=False, name="tests of umbrella")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def small_settings(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Callable[[Path], str]) -> Callable[..., Any]:
    """Settings of a training that takes seconds, on one small cohort; the argument adds dotted names."""
    from umbrella.config import load_settings

    storage = tmp_path_factory.mktemp("runs")
    mlflow_store(storage)
    small = SMALL | {"resources.storage": str(storage)}
    return lambda others: load_settings(overrides=small | others)


class Done(NamedTuple):
    """How a script ended."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """Runs a script with words of a command line, in this process: a new one would spend ten seconds on imports."""

    def call(script: str, *words: str) -> Done:
        monkeypatch.setattr(sys, "argv", [script, *words])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def ask(run: Callable[..., Done], learnt: Path, tmp_path: Path) -> Callable[..., Done]:
    """Runs predict.py with the checkpoint that has learnt ``said``."""
    return lambda *words: run("predict.py", f"checkpoint={learnt}", f"resources.storage={tmp_path}/runs", *words)


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that machines share, and that is empty."""
    return {"file": f"file://{tmp_path}/store", "memory": f"memory://{uuid4().hex}"}[request.param]
