"""Many conversations, answered by several processes: batches of references go there, predictions come back."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from umbrella.base import ProgressBar, UserError
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation, TextItem
from umbrella.data.ingest import open_store
from umbrella.evaluation.predictions import Prediction
from umbrella.modality import Modality
from umbrella.training.cluster import start_ray
from umbrella.training.launch import describe_failure
from umbrella.training.resource_check import check_resources

if TYPE_CHECKING:
    from umbrella.evaluation.answering import Umbrella
    from umbrella.evaluation.scoring import Candidates

WINDOW = 8
"""Batches whose conversations are sorted by length among themselves, and that come back together."""


def stream(
    conversations: Sequence[Conversation],
    checkpoint: str | Path,
    settings: Settings,
    candidates: "Candidates",
    numbers: Collection[str] = (),
    *,
    truth: bool = True,
    progress: ProgressBar = lambda things, what: things,
    what: str = "answering conversations",
) -> Iterator[list[Prediction]]:
    """Let a checkpoint answer conversations, in their order, part by part as they are answered.

    Which conversations share a batch follows from the conversations and ``evaluate.batch_size`` alone, so the numbers
    are the same on any number of workers. A worker that dies starts again, up to ``resources.max_failures`` times,
    and what it had not answered is asked again.

    Args:
        settings: ``evaluate`` says how to ask, ``resources`` on what; Ray is started if it does not run yet.
        candidates, numbers, truth: see ``Umbrella.predict``.
        progress: draws a bar over the conversations.

    Raises:
        UserError: a volume or checkpoint that cannot be used; not enough CPUs or GPUs; workers died too often.
    """
    if not conversations:
        return
    start_ray(settings.resources, log_to_driver=False, name=settings.name)
    resources, workers = settings.resources, settings.evaluate.workers
    check_resources(resources, workers, "evaluate.workers", ray.cluster_resources(), ray.nodes())
    batches = compose(conversations, settings.modalities, settings.evaluate.batch_size)
    workers = min(workers, len(batches))
    actor = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(Answerer)

    def start() -> ActorHandle:
        return actor.remote(str(checkpoint), settings, candidates, frozenset(numbers), truth)

    def asked(batch: Sequence[int]) -> list[str]:
        return [conversations[sample].model_dump_json() for sample in batch]

    answers = deal(batches, asked, start, workers, resources.max_failures)
    bar = iter(progress(conversations, what))
    part: dict[int, Prediction] = {}
    for number, (batch, answered) in enumerate(zip(batches, answers, strict=True), start=1):
        part |= dict(zip(batch, map(Prediction.from_json, answered), strict=True))
        list(islice(bar, len(batch)))
        if number % WINDOW == 0 or number == len(batches):
            yield [part[sample] for sample in sorted(part)]
            part = {}
    list(bar)


def compose(conversations: Sequence[Conversation], modalities: Mapping[str, Modality], size: int) -> list[list[int]]:
    """Which conversations, by their index, make up each batch: in a window of them, those of similar length."""
    lengths = [_length(conversation, modalities) for conversation in conversations]
    batches = []
    for start in range(0, len(lengths), WINDOW * size):
        window = sorted(range(start, min(start + WINDOW * size, len(lengths))), key=lengths.__getitem__)
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    return batches


def _length(conversation: Conversation, modalities: Mapping[str, Modality]) -> int:
    """Roughly its tokens, without a tokenizer: it only tells the long from the short."""
    return sum(
        len(item.text.encode()) if isinstance(item, TextItem) else modalities[item.modality].num_tokens
        for turn in conversation.conversations
        for item in turn.content
    )


def load(checkpoint: str, settings: Settings) -> "Umbrella":
    """The model in a process that has the resources of a worker, with the volume store of the storage folder.

    Raises:
        UserError: as ``Umbrella.from_checkpoint``.
    """
    import torch
    from transformers.utils import logging

    from umbrella.evaluation.answering import Umbrella

    logging.disable_progress_bar()
    torch.set_num_threads(settings.resources.threads)  # sums depend on how many share them
    device = "cuda" if settings.resources.gpus_per_worker else "cpu"
    return Umbrella.from_checkpoint(checkpoint, device=device, dtype=settings.model.dtype, store=open_store(settings))


def deal(
    batches: Sequence[Any],
    asked: Callable[[Any], Any],
    start: Callable[[], ActorHandle],
    workers: int,
    max_failures: int,
) -> Iterator[Any]:
    """Let actors answer batches, each as soon as one is free; answers come in the order of the batches.

    An actor that dies is replaced, and its batch is asked again. Ray's own restarts of actors are not used: Ray prints
    a warning about their arguments.

    Args:
        asked: a batch to what ``answer`` of an actor is given.
        start: starts an actor whose ``answer`` gives (answer, fault).
        workers: how many actors there are at a time.
        max_failures: how many of them may die.

    Raises:
        UserError: a fault that is not empty; actors died too often.
    """
    waiting, died = deque(range(len(batches))), 0
    idle = [start() for _ in range(workers)]
    running: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
    answers: dict[int, Any] = {}
    for number in range(len(batches)):
        while True:
            while idle and waiting:
                actor, batch = idle.pop(), waiting.popleft()
                running[actor.answer.remote(asked(batches[batch]))] = actor, batch
            if number in answers:
                break
            (ready, *_), _ = ray.wait(list(running))
            actor, batch = running.pop(ready)
            try:
                answers[batch], fault = ray.get(ready)
            except RayTaskError:  # a mistake of ours, which would come again
                raise
            except RayError as error:
                died += 1
                if died > max_failures:
                    raise UserError(
                        f"processes that answer conversations died more than {max_failures} times"
                        f" (resources.max_failures), the last one of: {describe_failure(error)}; if memory ran out,"
                        " lower evaluate.batch_size or evaluate.workers"
                    ) from None
                waiting.appendleft(batch)
                actor, fault = start(), ""
            if fault:
                raise UserError(fault)
            idle.append(actor)
        yield answers.pop(number)


class Answerer:
    """A process that holds the model and answers one batch after the other.

    What is wrong goes into what it answers: raised here, it would be an error of Ray's, pages long.
    """

    def __init__(
        self, checkpoint: str, settings: Settings, candidates: "Candidates", numbers: Collection[str], truth: bool
    ) -> None:
        evaluate = settings.evaluate
        self.options: dict[str, Any] = {
            "candidates": candidates,
            "numbers": numbers,
            "truth": truth,
            "max_new_tokens": evaluate.max_new_tokens if evaluate.generate else 0,
        }
        self.fault = ""
        try:
            self.model = load(checkpoint, settings)
        except UserError as error:
            self.fault = str(error)

    def answer(self, asked: Sequence[str]) -> tuple[list[str], str]:
        """Conversations as JSON to their predictions as JSON, and what is wrong, if anything is."""
        if self.fault:
            return [], self.fault
        conversations = [Conversation.model_validate_json(one) for one in asked]
        try:
            return [one.to_json() for one in self.model.predict(conversations, **self.options)], ""
        except UserError as error:
            return [], str(error)
