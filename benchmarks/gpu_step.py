"""Training step on one GPU without a data pipeline: speed, share of the GPU's peak, memory, time per kernel, idle time.

    python benchmarks/gpu_step.py [shape=0.5b|3b|7b] [batch=64] [kernels=false] [name=value]

Random weights, two 96^3 volumes and 94 tokens of text a sample, bfloat16, compiled layers; other settings by name, such
as model.train=projector+lora, train.compile=false or model.frozen_dtype=float8. A single batch stays on the GPU, so the
result is an upper bound for gpu_training.py. The first step is counted from the model on, with compilation. The memory
that a dry run computes stands beside the measured peak.
"""

import sys
import time
from typing import Any

import torch
from gpu_training import GRID, LAYER, PATCH, PEAK, SHAPES, operations
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from umbrella.config import Settings, load_settings
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.modality import Modality
from umbrella.models.build import add_lora, cast_frozen, component_parameters, from_llava, select_trainable
from umbrella.models.float8 import apply_frozen_dtype
from umbrella.models.settings import ModelSettings
from umbrella.training.estimate import count_memory
from umbrella.training.language_model import apply_options
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.step import train_step

TEXT, SUPERVISED, WORDS, IMAGE = 94, 24, 152_000, 151_646
VOLUME = (GRID // PATCH) ** 3
MODALITIES = {"sMRI": Modality(grid=(GRID,) * 3, patch=(PATCH,) * 3)}


def make_model(shape: str = "0.5b", train: str = "embedder", device: str = "cuda") -> Any:
    """Create a model with random weights on a device; ``train`` are its trained parts."""
    torch.manual_seed(0)
    text = Qwen2Config(**SHAPES[shape], vocab_size=WORDS)
    vision = SiglipVisionConfig(**LAYER, image_size=384, patch_size=14, vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava = llava.to_empty(device=device)
    for name, weight in llava.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
        else:
            torch.nn.init.constant_(weight, float("norm" in name and name.endswith("weight")))
    model = from_llava(llava, MODALITIES)
    # The frequencies are a buffer, which is not initialised above.
    model.model.language_model.rotary_emb = Qwen2RotaryEmbedding(text)
    model.to(device)
    if "lora" in train:
        add_lora(model, ModelSettings())
    select_trainable(model, train)
    cast_frozen(model, torch.bfloat16)
    return model.train()


def make_batch(size: int, device: str = "cuda") -> Batch:
    """Create a batch of samples with two volumes and random tokens."""
    ids = torch.randint(0, 150_000, (size, 2 * VOLUME + TEXT))
    ids[:, 5 : 5 + VOLUME] = ids[:, 20 + VOLUME : 20 + 2 * VOLUME] = IMAGE
    weights = torch.zeros(ids.shape)
    weights[:, -SUPERVISED:] = 1
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        loss_weights=weights,
        image_mask=ids == IMAGE,
        pixel_values={"sMRI": VolumeGroup(torch.randn(2 * size, *(GRID,) * 3).half(), torch.arange(2 * size))},
        num_images_per_sample=torch.full((size,), 2),
        task_ids=tuple(map(str, range(size))),
        task_types=("T3",) * size,
        sample_indices=torch.arange(size),
        metadata=({},) * size,
    ).to(device)


def main(shape: str, size: int, kernels: bool, settings: Settings, steps: int = 12) -> None:
    """Measure and print."""
    batch, train = make_batch(size, "cpu"), settings.model.train
    with torch.device("meta"):
        counted = sum(count_memory(make_model(shape, train, "meta"), batch, settings)) / 2**30
    model, batch = make_model(shape, train), batch.to("cuda")
    apply_frozen_dtype(model, settings.model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def run(times: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            train_step(model, [batch], optimizer, schedule, 1.0, parts, torch.bfloat16)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    begun = time.perf_counter()
    apply_options(model, settings.train)
    optimizer, parts = build_optimizer(model, settings.optim), component_parameters(model)
    schedule = build_schedule(optimizer, settings.optim, 1000)
    run(1)
    first = time.perf_counter() - begun
    run(3)
    each = run(steps)
    rate, peak = size / each, torch.cuda.max_memory_allocated() / 2**30
    done = rate * operations(SHAPES[shape], VOLUME, 2, 2 * VOLUME + TEXT, SUPERVISED, WORDS, train)
    print(
        f"{shape} {train}, batch {size}: {1e3 * each:.1f} ms a step, {rate:.1f} samples/s, {2 * rate:.1f} volumes/s,"
        f" {done / 1e12:.0f} TFLOP/s, {done / PEAK:.1%} of peak, {peak:.1f} GiB (counted {counted:.1f}),"
        f" first step {first:.1f} s; {torch.cuda.get_device_name()}, torch {torch.__version__}",
        flush=True,
    )
    if not kernels:
        return
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(2)
    events = [event for event in seen.key_averages() if event.self_device_time_total]
    print(f"kernels: {sum(event.self_device_time_total for event in events) / 2e3:.1f} ms a step")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:40]:
        print(f"{event.self_device_time_total / 2e3:8.2f} ms {event.count // 2:5d} times  {event.key[:90]}")
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name) for e in seen.events() if e.device_type.name == "CUDA"
    )
    gaps, until, last = [], spans[0][1], spans[0][2]
    for start, end, name in spans:
        gaps.append((start - until, last, name))
        until, last = max((until, last), (end, name))
    idle = sum(max(0.0, gap) for gap, *_ in gaps)
    print(f"idle: {idle / 2e3:.1f} ms a step, most of it between")
    for gap, before, after in sorted(gaps, reverse=True)[:20]:
        print(f"{gap / 1e3:8.2f} ms  {before[:60]}  and  {after[:60]}")


if __name__ == "__main__":
    given: dict[str, Any] = dict(word.split("=") for word in sys.argv[1:])
    shape, size, kernels = given.pop("shape", "0.5b"), int(given.pop("batch", 64)), given.pop("kernels", "false")
    defaults = {"model.dtype": "bfloat16", "model.train": "embedder", "train.compile": "true"}
    main(shape, size, kernels == "true", load_settings(overrides=defaults | given))
