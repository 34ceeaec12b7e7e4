"""The validation split, scored by all workers in the midst of a training."""

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from umbrella.conversations.conversation import Conversation
from umbrella.data.collator import Collator
from umbrella.data.pipeline import batches, evaluation_dataset, from_table
from umbrella.evaluation.metrics import summarise
from umbrella.evaluation.prediction import Prediction
from umbrella.evaluation.scoring import score
from umbrella.training.job import Job
from umbrella.training.parallel import autocast, gathered, release


class Evaluator:
    """Scores the validation conversations of a job, each worker its share.

    Args:
        table: the validation conversations, see ``data.pipeline.to_table``.
    """

    def __init__(
        self, job: Job, table: pa.Table, collate: Collator, rank: int, workers: int, device: torch.device
    ) -> None:
        self.job, self.table, self.collate, self.device = job, table, collate, device
        self.workers = workers
        self.dataset = evaluation_dataset(job.validation_lengths, rank, workers)  # the same at each evaluation
        self.dataset.set_name(f"{job.name}, evaluation, worker {rank}")
        self.dtype = getattr(torch, job.settings.model.dtype)
        self.scored: list[Prediction] = []
        """The whole split as the last evaluation scored it."""

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics of the whole split, the same on every worker."""
        model.eval()
        scored: list[Prediction] = []
        size = self.job.settings.train.evaluation_batch_size
        passes = 0
        for conversations in batches(self.dataset, size, 1, self._rows):
            scored += self._score(model, conversations)
            passes += 1
        # With sharded weights a pass takes all workers, and the first one may have a batch more than others.
        for _ in range(passes, ceil(ceil(self.table.num_rows / self.workers) / size)):
            self._score(model, [from_table(self.table, 0)])
        release(model)
        model.train()
        self.scored = [one for part in gathered(scored) for one in part]
        return summarise(self.scored)

    def _score(self, model: nn.Module, conversations: Sequence[Conversation]) -> list[Prediction]:
        with autocast(model, self.device, self.dtype):
            return score(model, conversations, self.collate.renderer, self.collate, self.job.candidates, self.device)

    def _rows(self, rows: Mapping[str, np.ndarray]) -> list[Conversation]:
        return [from_table(self.table, int(i)) for i in rows["sample"]]
