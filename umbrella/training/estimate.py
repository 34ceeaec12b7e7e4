"""Estimate the time of a training from steps and an evaluation with blank volumes on this machine."""

import time
from collections.abc import Sequence
from math import ceil, inf

import numpy as np
import torch

from umbrella.config import Settings
from umbrella.conversations.schema import questions_of
from umbrella.data.batching import Batch, Collator
from umbrella.data.pipeline import Plan
from umbrella.data.rendering import load_renderer
from umbrella.data.splits import Splits
from umbrella.evaluation.candidates import find_candidates
from umbrella.evaluation.controls import blank
from umbrella.evaluation.scoring import score
from umbrella.models.build import component_parameters
from umbrella.training.distributed import autocast
from umbrella.training.language_model import make_model
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.progress_log import format_duration
from umbrella.training.step import train_step
from umbrella.volumes.store import DecodedVolumes

STEPS = 5
"""Largest number of timed steps."""
BUDGET = 5.0
"""Seconds after which no further step is timed."""


def time_step_and_evaluation(settings: Settings, splits: Splits) -> tuple[float, float]:
    """Time a training step of one worker, and an evaluation of the validation split.

    Weights and optimizer are real, volumes are blank and are not read. The first step is not timed.

    Returns:
        Seconds of a step and of an evaluation.

    Raises:
        UserError: the model cannot be built.
    """
    device = torch.device("cuda" if settings.resources.gpus_per_worker else "cpu")
    torch.set_num_threads(settings.resources.threads)
    dtype, train, renderer = getattr(torch, settings.model.dtype), settings.train, load_renderer(settings)
    model = make_model(settings, renderer, device).to(device).train()
    collate = Collator(renderer, DecodedVolumes(settings.modalities, settings.data.max_voxels))
    optimizer, parts = build_optimizer(model, settings.optim), component_parameters(model)
    schedule = build_schedule(optimizer, settings.optim, STEPS + 1)
    rng = np.random.default_rng(settings.seed)

    def micro_batch() -> Batch:
        chosen = rng.integers(len(splits.train), size=train.batch_size)
        examples = [renderer.render(c) for c in blank([splits.train[i] for i in chosen])]
        return collate(examples, settings.mask, pack=settings.data.pack).to(device)

    seconds: list[float] = []
    while len(seconds) <= STEPS and sum(seconds[1:]) < BUDGET:
        begun = time.perf_counter()
        batches = [micro_batch() for _ in range(train.accumulate)]
        train_step(model, batches, optimizer, schedule, settings.optim.clip, parts, dtype, inf)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)

    questions = blank(questions_of(splits.validation))
    batch = questions[: train.evaluation_batch_size]
    candidates = find_candidates(splits.train, settings.evaluate.number_grids)
    model.eval()
    model.set_attn_implementation({"text_config": "sdpa"})
    begun = time.perf_counter()
    with autocast(model, device, dtype):
        score(model, batch, renderer, collate, candidates, device)
    evaluation = (time.perf_counter() - begun) * len(questions) / len(batch)
    return float(np.median(seconds[1:])), evaluation / settings.resources.workers


def count_steps(settings: Settings, splits: Splits) -> tuple[int, int]:
    """Count the steps and the evaluations of a training."""
    train, workers = settings.train, settings.resources.workers
    plan = Plan(len(splits.train), settings.seed, train.epochs, workers, train.batch_size, train.accumulate)
    return plan.steps, ceil(plan.steps / (train.evaluate_every or plan.steps_per_epoch))


def estimate_time(trainings: Sequence[Settings], splits: Splits, concurrent: int) -> str:
    """Describe how long trainings take.

    Args:
        trainings: settings of each; all are assumed to need as much time for a step as the first.
        concurrent: trainings that run at the same time.
    """
    step, evaluation = time_step_and_evaluation(trainings[0], splits)
    counts = [count_steps(settings, splits) for settings in trainings]
    seconds = [steps * step + evaluations * evaluation for steps, evaluations in counts]
    total = max(sum(seconds) / concurrent, max(seconds))
    return (
        f"{format_duration(total)} without early stopping; {counts[0][0]} steps of {step:.3g} s and {counts[0][1]}"
        f" evaluations of {evaluation:.3g} s per training, measured here with blank volumes; preprocessing, starts and"
        " the final evaluation come on top"
    )
