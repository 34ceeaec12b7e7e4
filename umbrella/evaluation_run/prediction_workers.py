"""Predictions for many conversations by worker processes of Ray, each of which holds the model."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from umbrella.base import ProgressBar, UserError, no_progress
from umbrella.cluster import check_resources, start_ray
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation, TextItem
from umbrella.evaluation.candidates import Candidates
from umbrella.evaluation.predictions import Prediction
from umbrella.inference.model import Umbrella
from umbrella.modality import Modality
from umbrella.training.launch import describe_failure
from umbrella.volumes.store import open_store

WINDOW = 8
"""Batches whose conversations are sorted by length among themselves, and whose predictions are returned together."""


def predict_on_workers(
    conversations: Sequence[Conversation],
    checkpoint: str | Path,
    settings: Settings,
    candidates: Candidates,
    numbers: Collection[str] = (),
    *,
    truth: bool = True,
    progress: ProgressBar = no_progress,
) -> Iterator[list[Prediction]]:
    """Predict conversations with ``evaluate.workers`` processes; yields predictions in the order of the conversations.

    The batches depend on the conversations and ``evaluate.batch_size`` only, so results do not depend on the number of
    workers. A worker that dies is replaced, up to ``resources.max_failures`` times, and its batch is predicted again.

    Args:
        settings: ``evaluate`` and ``resources`` are used; Ray is started if it does not run.
        candidates, numbers, truth: see ``Umbrella.predict``.
        progress: draws a bar over the conversations.

    Raises:
        UserError: a volume or checkpoint that cannot be used; not enough CPUs or GPUs; workers died too often.
    """
    if not conversations:
        return
    start_ray(settings.resources, log_to_driver=False, name=settings.name)
    resources, workers = settings.resources, settings.evaluate.workers
    check_resources(resources, workers, "evaluate.workers")
    batches = make_batches(conversations, settings.modalities, settings.evaluate.batch_size)
    actor = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(PredictionWorker)

    def start_worker() -> ActorHandle:
        return actor.remote(str(checkpoint), settings, candidates, frozenset(numbers), truth)

    inputs = [[conversations[i] for i in batch] for batch in batches]
    results = map_on_actors(inputs, start_worker, min(workers, len(batches)), resources.max_failures)
    bar = iter(progress(conversations, "answering conversations"))
    for start in range(0, len(batches), WINDOW):
        window: dict[int, Prediction] = {}
        for batch in batches[start : start + WINDOW]:
            window |= dict(zip(batch, next(results), strict=True))
            list(islice(bar, len(batch)))
        yield [window[i] for i in sorted(window)]
    list(bar)


def make_batches(
    conversations: Sequence[Conversation], modalities: Mapping[str, Modality], size: int
) -> list[list[int]]:
    """Indices of the conversations of each batch: conversations are sorted by length within a window of batches."""
    lengths = [  # an estimate of the number of tokens that needs no tokenizer
        sum(
            len(item.text.encode()) if isinstance(item, TextItem) else modalities[item.modality].num_tokens
            for turn in conversation.conversations
            for item in turn.content
        )
        for conversation in conversations
    ]
    batches = []
    for start in range(0, len(lengths), WINDOW * size):
        window = sorted(range(start, min(start + WINDOW * size, len(lengths))), key=lengths.__getitem__)
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    return batches


def load_model(checkpoint: str, settings: Settings) -> Umbrella:
    """Load the model in a worker process, with the volume store of the storage folder.

    Raises:
        UserError: as ``Umbrella.from_checkpoint``.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(settings.resources.threads)  # the rounding of sums depends on the number of threads
    device = "cuda" if settings.resources.gpus_per_worker else "cpu"
    return Umbrella.from_checkpoint(checkpoint, device=device, dtype=settings.model.dtype, store=open_store(settings))


def map_on_actors(
    batches: Sequence[Any],
    start_actor: Callable[[], ActorHandle],
    workers: int,
    max_failures: int,
) -> Iterator[Any]:
    """Process batches on actors, each as soon as one is idle; yields results in the order of the batches.

    An actor that dies is replaced, and its batch is processed again. Ray's own restarts of actors are not used,
    because Ray prints a warning about their arguments.

    Args:
        start_actor: starts an actor whose ``predict`` takes a batch and returns (result, error message or "").
        workers: number of actors at a time.
        max_failures: number of actors that may die.

    Raises:
        UserError: an actor returned an error message; more than ``max_failures`` actors died.
    """
    waiting, failures = deque(range(len(batches))), 0
    idle = [start_actor() for _ in range(workers)]
    running: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
    results: dict[int, Any] = {}
    for number in range(len(batches)):
        while True:
            while idle and waiting:
                actor, batch = idle.pop(), waiting.popleft()
                running[actor.predict.remote(batches[batch])] = actor, batch
            if number in results:
                break
            (ready, *_), _ = ray.wait(list(running))
            actor, batch = running.pop(ready)
            try:
                results[batch], message = ray.get(ready)
            except RayTaskError:  # a bug, which would come again
                raise
            except RayError as error:
                failures += 1
                if failures > max_failures:
                    raise UserError(
                        f"processes that answer conversations died more than {max_failures} times"
                        f" (resources.max_failures), the last one of: {describe_failure(error)}; if memory ran out,"
                        " lower evaluate.batch_size or evaluate.workers"
                    ) from None
                waiting.appendleft(batch)
                actor, message = start_actor(), ""
            if message:
                raise UserError(message)
            idle.append(actor)
        yield results.pop(number)


class PredictionWorker:
    """An actor that holds the model and predicts batches.

    Errors of the user are returned as messages: an exception would reach the driver as an error of Ray, pages long.
    """

    def __init__(
        self, checkpoint: str, settings: Settings, candidates: Candidates, numbers: Collection[str], truth: bool
    ) -> None:
        limit = settings.evaluate.max_new_tokens if settings.evaluate.generate else 0
        self.options: dict[str, Any] = {"numbers": numbers, "truth": truth, "max_new_tokens": limit}
        self.candidates, self.message = candidates, ""
        try:
            self.model = load_model(checkpoint, settings)
        except UserError as error:
            self.message = str(error)

    def predict(self, batch: Sequence[Conversation]) -> tuple[list[Prediction], str]:
        """Predict a batch; returns (predictions, error message or "")."""
        if self.message:
            return [], self.message
        try:
            return self.model.predict(batch, self.candidates, **self.options), ""
        except UserError as error:
            return [], str(error)
