"""The validation split, scored by all workers in the midst of a training."""

from collections.abc import Sequence
from math import ceil

import pyarrow as pa
import torch
from torch import nn

from umbrella.conversations.conversation import Conversation
from umbrella.data.collator import Collator
from umbrella.data.pipeline import Rows, batches, evaluation_rows, from_table
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
        self.size, self.name = job.settings.train.evaluation_batch_size, f"{job.name}, evaluation, worker {rank}"
        self.rows = evaluation_rows(job.validation_lengths, rank, workers, self.size)  # the same at each evaluation
        self.dtype = getattr(torch, job.settings.model.dtype)
        self.scored: list[Prediction] = []
        """The whole split as the last evaluation scored it."""

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics of the whole split, the same on every worker."""
        model.eval()
        scored: list[Prediction] = []
        passes = 0
        for conversations in batches(self.rows, self.size, 1, self._conversations, self.name):
            scored += self._score(model, conversations)
            passes += 1
        # With sharded weights a pass takes all workers, and the first one may have a batch more than others.
        for _ in range(passes, ceil(ceil(self.table.num_rows / self.workers) / self.size)):
            self._score(model, [from_table(self.table, 0)])
        release(model)
        model.train()
        self.scored = [one for part in gathered(scored) for one in part]
        return summarise(self.scored)

    def _score(self, model: nn.Module, conversations: Sequence[Conversation]) -> list[Prediction]:
        with autocast(model, self.device, self.dtype):
            return score(model, conversations, self.collate.renderer, self.collate, self.job.candidates, self.device)

    def _conversations(self, rows: Rows) -> list[Conversation]:
        return [from_table(self.table, int(i)) for i in rows["sample"]]
