"""What a baseline's training says of itself, in MLflow and in its log. Rank 0 alone does."""

from collections.abc import Mapping

import torch

from umbrella.baseline.cnn import Sfcn
from umbrella.baseline.job import BaselineJob
from umbrella.data.pipeline import Plan
from umbrella.training.job import progress_line
from umbrella.training.progress import Best
from umbrella.training.progress_log import BUILDING, EARLY, FINISHED, FIRST, ProgressLog
from umbrella.training.reporting import open_run


class Reporter:
    """One training's run in MLflow, and its progress."""

    def __init__(self, job: BaselineJob, device: torch.device, net: Sfcn, plan: Plan) -> None:
        self.log = ProgressLog(str(job.tracking["name"]), str(job.tracking["trial"]), job.begun)
        self.log.say(BUILDING)
        size = sum(weight.numel() for weight in net.parameters())
        self.tracker = open_run(job, device, {"baseline": "SFCN", "baseline.parameters": str(size)})
        self.tracker.watch_system()
        print(f"SFCN, {size} parameters, {net.blocks} blocks, for {job.target}\n{plan.in_words}", flush=True)
        self.log.say(FIRST)
        self._best = Best.of(job.folder, job.settings.tune.metric, job.settings.tune.mode)

    def step(self, values: Mapping[str, float], place: Mapping[str, float]) -> None:
        """Note what a step did. ``place``: step, steps and epoch."""
        self.tracker.metrics(values, int(place["step"]))
        left = self.log.seconds_left(place)
        if self.log.due:
            self.log.figures(values, {**place, "left": left})

    def evaluation(self, shown: Mapping[str, float], measured: Mapping[str, float], place: Mapping[str, float]) -> None:
        """Write down an evaluation, and with it all steps before. ``shown``: with the values of the step."""
        self.tracker.metrics({**measured, **self._best.news(measured)}, int(place["step"]))
        self.tracker.flush()
        self.log.evaluation({name: value for name, value in measured.items() if name.startswith("eval/")})
        print(progress_line({**place, **shown}), flush=True)

    def end(self, place: Mapping[str, float]) -> None:
        """The training ended by itself."""
        outcome = EARLY if place["step"] < place["steps"] else FINISHED
        self.tracker.end(outcome=outcome)
        self.log.say(outcome)
