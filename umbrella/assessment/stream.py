"""Many conversations, answered by several processes: Ray Data deals batches of references, predictions come back."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.conversations.conversation import Conversation, TextItem
from umbrella.data.intake import open_store
from umbrella.data.loading import Progress
from umbrella.evaluation.prediction import Prediction
from umbrella.modality import Modality
from umbrella.training.capacity import check_fits
from umbrella.training.cluster import start_ray

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
    progress: Progress = lambda things, what: things,
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
    # Where Ray Data was imported before Ray was started, it has not heard that it should say less.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources, workers = settings.resources, settings.evaluate.workers
    check_fits(resources, workers, "evaluate.workers", ray.cluster_resources(), ray.nodes())
    batches = compose(conversations, settings.modalities, settings.evaluate.batch_size)
    workers = min(workers, len(batches))
    told = {
        "checkpoint": str(checkpoint),
        "settings": settings,
        "candidates": candidates,
        "numbers": frozenset(numbers),
        "truth": truth,
        "starts": ray.remote(num_cpus=0)(Starts).remote(workers + resources.max_failures),
    }
    rows = [{"asked": [conversations[sample].model_dump_json() for sample in batch]} for batch in batches]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Answerer,
        fn_constructor_kwargs=told,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    answers.set_name(what.replace(" ", "_"))
    answers.context.execution_options.preserve_order = True
    answers.context.enable_progress_bars = False  # there is one already
    bar = iter(progress(conversations, what))
    part: dict[int, Prediction] = {}
    for number, (batch, row) in enumerate(zip(batches, answers.iter_rows(), strict=True), start=1):
        if row["fault"]:
            raise UserError(row["fault"])
        part |= dict(zip(batch, map(Prediction.from_json, row["predictions"]), strict=True))
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


class Starts:
    """Counts how often processes were started: Ray Data itself would start one that dies again and again, for ever."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed

    def one_more(self) -> bool:
        """Whether there may be one more."""
        self.left -= 1
        return self.left >= 0


class Answerer:
    """A process that holds the model and answers one batch after the other.

    What is wrong goes into what it answers: raised here, it would be an error of Ray's, pages long.
    """

    def __init__(
        self,
        checkpoint: str,
        settings: Settings,
        candidates: "Candidates",
        numbers: Collection[str],
        truth: bool,
        starts: Any,
    ) -> None:
        evaluate, resources = settings.evaluate, settings.resources
        self.options: dict[str, Any] = {
            "candidates": candidates,
            "numbers": numbers,
            "truth": truth,
            "max_new_tokens": evaluate.max_new_tokens if evaluate.generate else 0,
        }
        self.fault = ""
        if not ray.get(starts.one_more.remote()):
            self.fault = (
                f"processes that answer conversations died more than {resources.max_failures} times"
                " (resources.max_failures); if memory ran out, lower evaluate.batch_size or evaluate.workers"
            )
            return
        try:
            self.model = load(checkpoint, settings)
        except UserError as error:
            self.fault = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A batch to its predictions as JSON, or to what is wrong."""
        predictions: list[str] = []
        fault = self.fault
        if not fault:
            asked = [Conversation.model_validate_json(one) for one in row["asked"]]
            try:
                predictions = [one.to_json() for one in self.model.predict(asked, **self.options)]
            except UserError as error:
                fault = str(error)
        return {"predictions": predictions, "fault": fault}
