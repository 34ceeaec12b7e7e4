"""Training on GPUs from end to end, from .nii.gz files to Ray Train, with the shape of a published model.

    python benchmarks/gpu_training.py [shape=0.5b|3b|7b] [subjects=128] [references=0] [steps=300] [folder=..]
        [name=value] [-- name=value ...] [-- name=value ...]

Weights are random. A sample is two 96^3 volumes and about 90 tokens of text; the volume embedder is trained (with 7b,
adapters too), in bfloat16. Printed are samples a second between evaluations, once layers are compiled, the share of the
time that a step waited for its batch, the operations that a sample takes, as a share of the GPU's dense bfloat16 peak,
peak memory, and the seconds from ``fit()`` to the first step. With references, each subject is compared with five of
them; without, with any other subject. Each ``--`` begins the settings of another training of the same cohort.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

PEAK = 990e12
"""Dense bfloat16 operations a second of an H100 or H200, by its datasheet."""
SIZE, GRID, PATCH = 256, 96, 16
LAYER = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 26}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 24,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
    },
}
"""Language models of llava-interleave-qwen-0.5b and -7b, and Qwen2.5-3B; their tower is SigLIP's so400m."""


def operations(
    language: dict[str, Any], volume: int, volumes: int, length: int, supervised: int, words: int, train: str
) -> float:
    """Floating point operations of a sample; a multiplication with its addition is two.

    The backward pass has a product for the gradient of the weights of each trained part, and one for the gradient of
    what enters a part, above the lowest trained one and within it. Attention has two products forward and four
    backward. What is computed a second time (attention's scores in the backward pass) is not counted, nor are adapters,
    norms and activations.

    Args:
        volume: tokens of a volume. length: tokens of the sample, with its volumes'. train: see ``model.train``.
    """
    width, wide = LAYER["hidden_size"], LAYER["intermediate_size"]
    d, hidden = language["hidden_size"], language["intermediate_size"]
    grouped = language["num_key_value_heads"] / language["num_attention_heads"]
    tower, text, seen = LAYER["num_hidden_layers"], language["num_hidden_layers"], volumes * volume
    looks = text * length * (length + 1) / 2 * 4 * d  # each token looks at those before it
    parts = {  # products with weights, and of attention, in the forward pass
        "embedder": (seen * 2 * PATCH**3 * width, 0.0),
        "tower": (tower * seen * 2 * (4 * width**2 + 2 * width * wide), tower * seen * volume * 4 * width),
        "projector": (seen * 2 * (width * d + d * d), 0.0),
        "lora": (text * length * 2 * ((2 + 2 * grouped) * d**2 + 3 * d * hidden) + supervised * 2 * d * words, looks),
    }
    trained = parts.keys() if train == "all" else train.split("+")
    total, flows = 0.0, False
    for part, (products, attention) in parts.items():
        has_gradient = part in trained and (part != "lora" or train == "all")  # the model's own weights, not adapters'
        flows = flows or (part in trained and part != "embedder")
        total += products * (1 + flows + has_gradient) + attention * (1 + 2 * flows)
        flows = flows or part in trained
    return total


def make_scan(path: Path) -> None:
    """A conformed scan of a stripped brain: 256^3 at 1 mm, uint8, noise in an ellipsoid, zeros outside."""
    if path.exists():
        return
    axes = np.meshgrid(*(np.linspace(-1, 1, SIZE),) * 3, indexing="ij", sparse=True)
    inside = (axes[0] / 0.55) ** 2 + (axes[1] / 0.6) ** 2 + (axes[2] / 0.68) ** 2 < 1
    draw = np.random.default_rng(int(path.name.split(".")[0]))
    scan = np.where(inside, draw.normal(110, 12, inside.shape), 0)
    nib.save(nib.Nifti1Image(np.clip(scan, 0, 255).astype(np.uint8), np.eye(4)), path)


def conversation(number: int, subjects: int, rng: np.random.Generator, references: int = 0) -> dict[str, Any]:
    """A conversation that compares the scans of two subjects; the first ``references`` subjects are references."""
    other = int(rng.integers(references or subjects))
    label = ("female", "male")[number % 2]
    own = references + number // 5 % (subjects - references) if references else number % subjects
    paths = [f"scans/{i}.nii.gz" for i in (other, own)]
    images = [{"type": "image", "modality": "sMRI", "image_path": path} for path in paths]
    turns = [
        ("user", [images[0], {"type": "text", "text": "A reference."}]),
        ("assistant", [{"type": "text", "text": "Seen."}]),
        ("user", [images[1], {"type": "text", "text": "And this one's sex?"}]),
        ("assistant", [{"type": "text", "text": f"{label}."}]),
    ]
    return {
        "task_id": str(number),
        "task_type": "T3",
        "images": [{"path": path, "modality": "sMRI"} for path in paths],
        "conversations": [{"role": role, "content": content} for role, content in turns],
        "metadata": {"subject_id": f"s{own}", "subject_label": label},
    }


def make_cohort(folder: Path, subjects: int, samples: int, references: int = 0) -> dict[str, Any]:
    """Write scans and conversations of both splits. Returns their settings."""
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    held_out = max(2, subjects // 16)
    with ProcessPoolExecutor() as pool:
        list(pool.map(make_scan, [folder / "scans" / f"{i}.nii.gz" for i in range(subjects + held_out)]))
    rng = np.random.default_rng(0)
    rows = {"train": [conversation(i, subjects, rng, references) for i in range(samples)]}
    rows["validation"] = [conversation(subjects + i, subjects + held_out, rng) for i in range(held_out)]
    for row in rows["validation"]:  # of held-out subjects alone
        path = row["images"][1]["path"]
        row["images"][0]["path"] = row["conversations"][0]["content"][0]["image_path"] = path
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    files = {f"data.{name}": str(folder / f"{name}.jsonl") for name in rows}
    return files | {"data.root": str(folder)}


def make_checkpoint(folder: Path, shape: str) -> str:
    """Save a LLaVA of this shape with random weights as a Hugging Face checkpoint."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    from umbrella.data.tokenizer import tiny_tokenizer

    path = folder / shape
    if not (path / "config.json").exists():
        tokenizer = tiny_tokenizer()
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(**LAYER, image_size=384, patch_size=14, vision_use_head=False),
            text_config=Qwen2Config(**SHAPES[shape], vocab_size=152_000),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        del model
        torch.cuda.empty_cache()
    return str(path)


def measure(shape: str, subjects: int, references: int, steps: int, folder: Path, overrides: dict[str, Any]) -> None:
    """Run one training and print its measurements, and then those of the bare step."""
    from mlflow import MlflowClient

    from umbrella.config import load_settings
    from umbrella.tracking.store import tracking_uri
    from umbrella.training import run

    settings: dict[str, Any] = {
        "modalities.sMRI": {"grid": [GRID] * 3, "patch": [PATCH] * 3},
        "model.dtype": "bfloat16",
        "model.train": "embedder" if shape == "0.5b" else "embedder+lora",
        "train.batch_size": 128,
        "train.accumulate": 1,
        "train.compile": True,
        "train.epochs": 1,
        "train.evaluate_every": steps // 3,
        "train.evaluation_batch_size": 8,
        "resources.gpus_per_worker": 1,
        "resources.cpus_per_worker": 4,
        "resources.storage": str(folder / "runs"),
        "tracking.model": False,
    } | overrides
    if "model.checkpoint" not in settings:
        settings["model.checkpoint"] = make_checkpoint(folder, shape)
    per_step = settings["train.batch_size"] * settings["train.accumulate"] * settings.get("resources.workers", 1)
    settings |= make_cohort(folder, subjects, per_step * steps, references)
    chosen = load_settings(overrides=settings)
    began: list[float] = []
    run_job = run.run_job

    jobs: list[Any] = []

    def timed(job: Any) -> None:
        began.append(time.time())
        jobs.append(job)
        run_job(job)

    run.run_job = timed  # type: ignore[assignment]
    start = time.time()
    training = run.run_training(chosen, lambda things, what: things)
    run.run_job = run_job
    client = MlflowClient(tracking_uri(chosen.resources.storage))
    experiment = client.get_experiment_by_name(chosen.experiment)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`ray.trial_id` = '{training.name}'")
    history = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    pace = [m.value for m in history["train/samples_per_second"]]
    samples_per_second = statistics.median(pace[1:])  # layers are compiled in the first
    text = load_rendered(chosen)
    tokens = (GRID // PATCH) ** 3
    each = operations(SHAPES[shape], tokens, 2, text["length"], text["supervised"], 152_000, chosen.model.train)
    workers = chosen.resources.workers
    measured = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpus": workers,
        "shape": shape,
        "trained": chosen.model.train,
        "batch of a GPU": chosen.train.batch_size * chosen.train.accumulate,
        "tokens of a sample": text["length"],
        "samples/s": round(samples_per_second, 1),
        "samples/s, each evaluation's": [round(value, 1) for value in pace],
        "TFLOP of a sample": round(each / 1e12, 3),
        "share of peak": round(samples_per_second * each / PEAK / workers, 3),
        "waiting for data": round(max(m.value for m in history["train/waiting_for_data"][1:]), 4),
        "seconds from fit() to the first step": round(history["train/loss"][0].timestamp / 1e3 - began[0], 1),
        "seconds before fit(), scans to store among them": round(began[0] - start, 1),
        "memory": {name: round(m[-1].value) for name, m in history.items() if name.startswith("train/memory")},
        "loss, first and last": [round(history["train/loss"][i].value, 3) for i in (0, -1)],
    }
    print(json.dumps(measured, indent=1), flush=True)
    if torch.cuda.is_available():
        for name, shares in (("the bare step", True), ("the same with each volume for itself", False)):
            bare = bare_step(jobs[0], shares)
            ratio = samples_per_second / workers / bare
            print(f"{name}: {bare:.1f} samples/s of a GPU; the training has {ratio:.3f} of it", flush=True)
            torch.cuda.empty_cache()


def bare_step(job: Any, shares_volumes: bool, batches: int = 4, steps: int = 24) -> float:
    """Samples a second of the same steps on the first batches of the training, which stay on the GPU.

    Args:
        shares_volumes: whether a volume that several samples of a batch have is computed once.
    """
    from umbrella.paths import COMPILED
    from umbrella.training.language_model import LanguageModelTask
    from umbrella.training.optimizer import build_schedule

    device, storage = torch.device("cuda"), job.settings.resources.storage
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(storage, COMPILED))  # as the training did
    torch.compiler.reset()
    torch.set_num_threads(job.settings.resources.threads)
    task = LanguageModelTask(job, 0, 1, device)
    plan, schedule = job.plan(1), build_schedule(task.optimizer, job.settings.optim, 1000)
    bounds = [next(plan.micro_batches(0, i * plan.per_step)) for i in range(batches)]
    ready = [task.augment(task.load(job.maker(plan, False)(*of)).to(device)) for of in bounds]
    if not shares_volumes:
        apart = [{name: group.separate() for name, group in batch.pixel_values.items()} for batch in ready]
        ready = [replace(batch, pixel_values=groups) for batch, groups in zip(ready, apart, strict=True)]
    for step in range(-batches, steps):
        if step == 0:
            torch.cuda.synchronize()
            start = time.perf_counter()
        task.step([ready[step % batches]], schedule)
    torch.cuda.synchronize()
    return steps * plan.per_step / (time.perf_counter() - start)


def load_rendered(settings: Any) -> dict[str, int]:
    """Mean tokens of a training conversation, and how many of them are supervised."""
    from umbrella.data.ingest import load_splits
    from umbrella.data.masking import loss_weights
    from umbrella.data.rendering import load_renderer

    renderer = load_renderer(settings)
    conversations = load_splits(settings, lambda things, what: things).train[:200]
    examples = [renderer.render(one) for one in conversations]
    weights = [np.count_nonzero(loss_weights(example, settings.mask)) for example in examples]
    return {
        "length": round(statistics.mean(len(e.input_ids) for e in examples)),
        "supervised": round(statistics.mean(map(int, weights))),
    }


def main(words: list[str]) -> None:
    """Measure one training, or several."""
    import yaml

    trainings: list[dict[str, Any]] = [{}]
    for word in words:
        key, _, value = word.partition("=")
        if word == "--":
            trainings.append({})
        else:
            trainings[-1][key] = yaml.safe_load(value) if value else ""
    given, *changes = trainings
    shape = str(given.pop("shape", "0.5b"))
    folder = Path(given.pop("folder", Path(tempfile.gettempdir(), "gpu_training")))
    subjects, references, steps = (
        int(given.pop(n, d)) for n, d in (("subjects", 128), ("references", 0), ("steps", 300))
    )
    for number, own in enumerate(changes or [{}]):
        print(json.dumps(own), flush=True)
        length = int(own.pop("steps", steps))
        measure(shape, subjects, references, length, folder, {"experiment": f"training {number}"} | given | own)


if __name__ == "__main__":
    main(sys.argv[1:])
