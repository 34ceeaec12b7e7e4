"""The Ray Train worker loop of the baseline: a step on the volumes of a batch, an evaluation after each epoch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean

import numpy as np
import ray
import torch
from ray.train.torch import get_device, prepare_model
from torch import distributed
from torch.nn import functional

from umbrella.base import UserError
from umbrella.baseline.cnn import Sfcn
from umbrella.baseline.job import PREDICTIONS, BaselineJob, Question, paths_of
from umbrella.baseline.labels import Bins
from umbrella.baseline.report import Reporter
from umbrella.config import SETTINGS
from umbrella.data.intake import open_store
from umbrella.data.pipeline import Plan, Rows, batches, evaluation_rows
from umbrella.evaluation.metrics import summarise
from umbrella.evaluation.prediction import Prediction, write_predictions
from umbrella.evaluation.subjects import Answer, mean_number
from umbrella.tracking.environment import code_version
from umbrella.training.augmentation import augment_alone
from umbrella.training.checkpoint import CODE, STATE, code_of, rng_state, set_rng_state
from umbrella.training.heeding import Request, Requests
from umbrella.training.optimizer import build_schedule, main_rate
from umbrella.training.pace import Pace
from umbrella.training.parallel import autocast, gathered, rank_and_world_size, seed_worker, together
from umbrella.training.progress import Progress, best_checkpoint, latest_checkpoint, read_progress
from umbrella.training.writer import remove_rests, save_state, write_checkpoint

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Volumes:
    """voxels: (n, frames, X, Y, Z), float16. soft: (n, outputs), what is to be said. draws: see ``Batch.draws``."""

    voxels: torch.Tensor
    soft: torch.Tensor
    draws: Sequence[tuple[int, ...]] = ()


class Worker:
    """One process of a training. Rank 0 also tracks the run and writes checkpoints."""

    def __init__(self, job: BaselineJob) -> None:
        self.job, self.settings, self.folder = job, job.settings, Path(job.folder)
        if not self.folder.is_dir():
            raise UserError(f"{job.folder} is not on this node: resources.storage is one folder for all of them")
        own, train = self.settings.baseline, self.settings.train
        self.rank, self.workers = rank_and_world_size()
        self.device = get_device()
        torch.set_num_threads(self.settings.resources.threads)
        torch.backends.cudnn.deterministic = True
        self.dtype = getattr(torch, own.dtype)
        self.store = open_store(self.settings)
        self.samples, self.validation, self.asked = ray.get([job.samples, job.validation, job.asked])
        modality = self.store.modalities[own.modality]
        self.series = modality.is_series
        self.shape = (modality.grid[3] if self.series else 1, *modality.grid[:3])
        torch.manual_seed(self.settings.seed)
        self.net = Sfcn(self.shape[1:], own.channels, job.head.size, own.dropout, self.shape[0])
        self.parallel = prepare_model(self.net)
        seed_worker(self.settings.seed, self.rank)
        optim = self.settings.optim
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=optim.lr, momentum=own.momentum, weight_decay=optim.weight_decay
        )
        latest = latest_checkpoint(self.folder)
        self.progress = read_progress(latest) if latest else Progress()
        self.plan = Plan(len(self.samples), self.settings.seed, train.epochs, self.workers, train.batch_size, 1)
        self.steps = self.progress.step + self.plan.steps_from(self.progress.position)
        self.schedule = build_schedule(self.optimizer, optim, self.steps)
        if latest:
            self._restore(latest)
        self.reporter = None
        if self.rank == 0:
            remove_rests(self.folder)
            self.reporter = Reporter(job, self.device, self.net, self.plan)

    def run(self) -> int | None:
        """Train, and let the best checkpoint answer what is asked at the end. Returns as ``training.worker``'s."""
        try:
            return self._train()
        finally:
            if self.reporter:
                self.reporter.log.forget()

    def _train(self) -> int | None:
        every = self.settings.train.evaluate_every or self.plan.steps_per_epoch
        stream, pace = self._training_batches(), Pace()
        requests = Requests(self.folder, self.rank, self.device)
        patience, size = self.settings.train.patience, self.plan.per_step
        while self.progress.step < self.steps and not self.progress.out_of_patience(patience):
            with pace.waiting():
                batch = next(stream)
            values = self._step(batch)
            pace.step(size, 0)
            step, position = self.progress.step + 1, self.progress.position + size
            self.progress = replace(self.progress, step=step, position=position, epoch=position / self.plan.size)
            if self.reporter:
                self.reporter.step(values, self._place())
            asked = requests.look()
            if step % every == 0 or step == self.steps:
                measured = {**self._evaluate(), "train/samples_per_second": pace.take()["train/samples_per_second"]}
                tune = self.settings.tune
                self.progress = self.progress.evaluated(measured[tune.metric], tune.mode)
                with together():
                    if self.reporter:
                        self.reporter.evaluation(values | measured, measured, self._place())
                self._save(measured)
            elif asked:
                self._save({})
            if asked is Request.STOP and step < self.steps:
                return step
        best = best_checkpoint(self.folder, self.settings.tune.metric, self.settings.tune.mode)
        if best:
            self.net.load_state_dict(torch.load(best / WEIGHTS, weights_only=True, map_location=self.device))
        predictions = self._answer(self.asked)
        with together():
            if self.reporter:
                write_predictions(self.folder / PREDICTIONS, predictions)
                self.reporter.end(self._place())
        return None

    def _step(self, batch: Volumes) -> dict[str, float]:
        """One optimizer step on this worker's batch; the loss is that of all workers."""
        self.parallel.train()
        frames = augment_alone(batch.voxels.float(), batch.draws, self.settings.train.augment)
        loss = functional.kl_div(self._forward(self.parallel, frames), batch.soft, reduction="batchmean")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.optim.clip)
        total = loss.detach() / self.workers
        if self.workers > 1:
            distributed.all_reduce(total)
        values = {"train/loss": float(total), "train/lr": main_rate(self.optimizer), "train/grad_norm": float(norm)}
        if not (isfinite(values["train/loss"]) and isfinite(values["train/grad_norm"])):  # on every worker alike
            what = (
                f"the loss is {values['train/loss']:.4g} and the norm of its gradient {values['train/grad_norm']:.4g}"
            )
            raise FloatingPointError(f"at step {self.progress.step + 1} {what}; lower baseline.lr")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return values

    def _forward(self, model: torch.nn.Module, frames: torch.Tensor) -> torch.Tensor:
        with autocast(model, self.device, self.dtype):
            return model(frames)

    def _evaluate(self) -> dict[str, float]:
        """The metrics of the validation split, as ``summarise`` has them, and ``eval/<target>/mae`` over subjects."""
        answered = self._answer(self.validation)
        measured = summarise(answered)
        if isinstance(self.job.head, Bins):
            subjects = mean_number(Answer(a.subject_id, float(a.label or 0), a.said) for a in answered)
            errors = [abs(float(subject.said or 0) - float(subject.truth)) for subject in subjects]
            measured[f"eval/{self.job.target}/mae"] = fmean(errors)
        return measured

    @torch.no_grad()
    def _answer(self, questions: Sequence[Question]) -> list[Prediction]:
        """The questions answered, on every worker: each looks at its share of the volumes, and at each of them once."""
        if self.workers > 1:  # each has its own running means of the last step
            for buffer in self.net.buffers():
                distributed.broadcast(buffer, 0)
        self.net.eval()
        paths = paths_of(questions)
        own: dict[str, np.ndarray] = {}
        size = self.settings.train.evaluation_batch_size
        rows = evaluation_rows(np.zeros(len(paths)), self.rank, self.workers, size)

        def make(rows: Rows) -> tuple[list[str], Volumes]:
            here = [paths[int(i)] for i in rows["sample"]]
            return here, Volumes(self._read(here, None), torch.empty(0))

        for here, volumes in batches(rows, size, 1, make):
            logs = self._forward(self.net, volumes.voxels.to(self.device).float())
            own |= dict(zip(here, logs.double().exp().cpu().numpy(), strict=True))
        everyones = {path: said for part in gathered(own) for path, said in part.items()}
        return [self._filled(row, everyones[path]) for row, path in questions]

    def _filled(self, row: Prediction, probabilities: np.ndarray) -> Prediction:
        head = self.job.head
        assert row.label is not None
        soft = head.soft(row.label)
        divergence = float(np.sum(soft[soft > 0] * np.log(soft[soft > 0] / probabilities[soft > 0].clip(1e-30))))
        row = replace(row, answer_nll=divergence, answer_tokens=1)
        said = head.read(probabilities.tolist())
        return replace(row, probabilities=said) if isinstance(said, dict) else replace(row, said=said)

    def _training_batches(self) -> Iterator[Volumes]:
        def make(rows: Rows) -> Volumes:
            samples = [self.samples[int(i)] for i in rows["sample"]]
            draws = self.plan.draws(rows)
            soft = torch.tensor(np.stack([self.job.head.soft(sample.label) for sample in samples]))
            return Volumes(self._read([sample.path for sample in samples], draws), soft.float(), draws)

        rows, name = self.plan.rows(self.rank, self.progress.position), f"{self.job.name}, training, worker {self.rank}"
        for batch in batches(rows, self.settings.train.batch_size, self.settings.data.prefetch, make, name):
            voxels = batch.voxels.to(self.device, non_blocking=True)
            yield replace(batch, voxels=voxels, soft=batch.soft.to(self.device))

    def _read(self, paths: Sequence[str], draws: Sequence[tuple[int, ...]] | None) -> torch.Tensor:
        pin = self.device.type == "cuda"
        stack = torch.empty((len(paths), *self.shape), dtype=torch.float16, pin_memory=pin)
        for i, (path, into) in enumerate(zip(paths, stack.numpy(), strict=True)):
            draw = (*draws[i], 0) if draws else None
            self.store.read(path, self.settings.baseline.modality, into if self.series else into[0], draw)
        return stack

    def _place(self) -> dict[str, float]:
        return {"step": self.progress.step, "steps": self.steps, "epoch": self.progress.epoch}

    def _save(self, measured: Mapping[str, float]) -> None:
        rng = gathered(rng_state())

        def fill(folder: Path) -> None:
            torch.save({name: tensor.cpu() for name, tensor in self.net.state_dict().items()}, folder / WEIGHTS)
            save_state(
                {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "rng": rng}, folder
            )
            (folder / SETTINGS).write_text(self.settings.to_yaml(), encoding="utf-8")
            (folder / CODE).write_text(json.dumps(code_of(code_version()), indent=1), encoding="utf-8")

        with together():
            if self.rank == 0:
                write_checkpoint(self.folder, fill, self.progress, measured, self.settings)

    def _restore(self, folder: Path) -> None:
        self.net.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True, map_location=self.device))
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.rank])
