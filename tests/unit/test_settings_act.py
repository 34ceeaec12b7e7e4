"""Every setting that a sweep can vary changes what a trainer holds or does, at the place where the setting acts.

Each case makes a trainer under two values of one setting, as a trial does. Ray is not started: batches are made when
they are used, and nobody asks the training to stop.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import ray
import ray.train
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from tests.unit.steps import Make
from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.data.pipeline import to_table
from umbrella.data.rendering import load_renderer
from umbrella.evaluation.candidates import find_candidates
from umbrella.models.build import component_parameters
from umbrella.models.float8 import Float8Layers, quantise_frozen_linears
from umbrella.settings_help import list_settings
from umbrella.training.language_model import LanguageModelTask
from umbrella.training.launch import LANGUAGE_MODEL
from umbrella.training.settings import AugmentSettings
from umbrella.training.task import LanguageModelJob
from umbrella.training.trainer import Trainer
from umbrella.tuning.search_space import NOT_SWEEPABLE, SWEEPABLE_DATA, section_of

BASE = {
    "modalities": {
        "sMRI": {"grid": [4, 4, 4], "patch": [4, 4, 4]},
        "fMRI": {"grid": [4, 4, 4, 4], "patch": [4, 4, 4, 2]},
    },
    "model.width": 16,
    "model.heads": 2,
    "model.language_layers": 1,
    "optim.lr": 2**-10,
    "optim.warmup": 0,
    "optim.schedule": "constant",
    "train.epochs": 1,
    "train.batch_size": 4,
    "train.accumulate": 1,
    "data.log_samples": True,
    "tune.metric": "eval/loss",
    "tune.mode": "min",
}
STILL = {"optim.lr": 1e-30}
"""No weight moves, so that no evaluation is better than the first."""
FOUR_STEPS = {"train.batch_size": 2}
LLAVA = "a LLaVA"
"""Stands for the folder of a checkpoint."""


class Training:
    """A trainer, and from the first time that ``ran`` is read what it has done.

    events: a letter for each forward pass in training (T), optimizer step (S) and forward pass in evaluation (E).
    given: inputs of the model, by letter. rates: of the optimizer's groups, at each step.
    attention: what that of the first layers returned, states and weights, by place (tower or language) and letter.
    prefetch: batches made in advance, of each call of ``batches``.
    """

    def __init__(self, trainer: Trainer, prefetch: list[int]) -> None:
        self.trainer, self.prefetch, self.settings = trainer, prefetch, trainer.settings
        self.task: Any = trainer.task
        self.model, self.optimizer = self.task.model, self.task.optimizer
        self.tower, self.language = self.model.model.vision_tower.encoder.layers, self.model.model.language_model.layers
        self.embedder = self.model.embedder.by_modality["sMRI"]
        self.adapters = [module for module in self.model.modules() if hasattr(module, "lora_A")]
        self.events = ""
        self.given: dict[str, list[dict[str, Any]]] = {"T": [], "E": []}
        self.rates: list[dict[str, float]] = []
        self.attention: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)

    @cached_property
    def ran(self) -> "Training":
        """Itself, after the trainer has trained to its end."""

        def passes(module: Any, args: Any, given: dict[str, Any]) -> None:
            if "targets" in given:  # the second pass of an evaluation continues the first one
                return
            letter = "T" if module.training else "E"
            self.events += letter
            self.given[letter].append(given)

        def steps(*unused: Any) -> None:
            self.events += "S"
            self.rates.append({group["name"]: group["lr"] for group in self.optimizer.param_groups})

        def attends(place: str) -> Any:
            return lambda module, _, out: self.attention[place, "T" if module.training else "E"].append(out)

        self.task.parallel.register_forward_pre_hook(passes, with_kwargs=True)
        self.optimizer.register_step_post_hook(steps)
        for place, layers in (("tower", self.tower), ("language", self.language)):
            layers[0].self_attn.register_forward_hook(attends(place))
        with suppress(FloatingPointError):
            self.trainer.run()
        return self

    def inputs(self, name: str, letter: str = "T") -> list[Any]:
        return [given[name].tolist() for given in self.ran.given[letter]]

    def voxels(self, modality: str, letter: str) -> list[Any]:
        groups = [given["pixel_values"].get(modality) for given in self.ran.given[letter]]
        return [group.voxels.tolist() for group in groups if group]


# What is seen of a setting: a value, or values by the place where they are seen.


def rates(part: str) -> Callable[[Training], list[float]]:
    return lambda training: [step[f"{part}.kept"] for step in training.ran.rates]


def loss_weights(training: Training) -> list[Any]:
    return training.inputs("loss_weights")


def volumes(training: Training) -> dict[str, Any]:
    return {letter: training.voxels("sMRI", letter) for letter in "TE"}


def frames(training: Training) -> list[int]:
    """Those of a series that the evaluation sees: each frame of the file is about its number, before the z-score."""
    (window, *_), *_ = training.voxels("fMRI", "E")
    return (np.mean(window, (0, 1, 2)) * np.std(range(16)) + 7.5).round().tolist()


def clipped(training: Training) -> float:
    """The norm of the first step's gradient; Adam's first moment is a tenth of it."""
    moments = [state["exp_avg"] for state in training.ran.optimizer.state.values()]
    return round(10 * float(torch.nn.utils.get_total_norm(moments)), 5)


def order(training: Training) -> list[str]:
    log = Path(training.ran.trainer.job.folder) / "samples_0.jsonl"
    return re.findall(r"sample-\d+", log.read_text(encoding="utf-8"))


def not_a_number(training: Training) -> str:
    """What becomes of a volume that has such a voxel."""
    into = np.zeros(training.settings.modalities["sMRI"].grid, np.float16)
    try:
        training.task.collate.store.read(Path(training.settings.resources.storage) / "nan.nii", "sMRI", into)
    except UserError:
        return "refused"
    return "read" if np.isfinite(into).all() and into.any() else "spoilt"


def trained(training: Training) -> set[str]:
    """The parts of the model that are trained."""
    parts = component_parameters(training.model)
    return {part for part, weights in parts.items() if any(weight.requires_grad for weight in weights)}


def dtypes(training: Training) -> set[torch.dtype]:
    """Of the attention's results and the frozen matrices."""
    return {out[0][0].dtype for out in training.ran.attention.values()} | {training.model.lm_head.weight.dtype}


def heads(training: Training) -> set[int]:
    attention = training.language[0].self_attn
    return {training.tower[0].self_attn.num_heads, attention.q_proj.out_features // attention.head_dim}


def seeds(training: Training) -> dict[str, Any]:
    plan, initial = training.trainer.plan, [weight.sum().item() for weight in training.model.parameters()]
    _, drawn = plan.rows(0, 1)
    return {"weights": initial, "dropout": torch.initial_seed(), "draws": drawn[0][0], "order": order(training)}


ITSELF = object()


class Case(NamedTuple):
    """Two values of a setting, and what is seen under each of them.

    expected: at every place; ITSELF: the value. None: at every place another thing than under the other value.
    given: other settings. also: others that go with the second value.
    """

    one: Any
    other: Any
    see: Callable[[Training], Any]
    expected: Any = None
    given: Mapping[str, Any] = {}
    also: Mapping[str, Any] = {}


SERIES, VOLUME = "modalities.fMRI", "modalities.sMRI"
LR = BASE["optim.lr"]
LORA = {"model.train": "lora", "model.lora_rank": 2}
CASES = {
    "seed": Case(0, 1, seeds),
    f"{VOLUME}.grid": Case((4, 4, 4), (8, 4, 4), lambda t: np.shape(t.voxels("sMRI", "T")[0])[1:], ITSELF),
    f"{VOLUME}.patch": Case((4, 4, 4), (2, 4, 4), lambda t: t.embedder.patch, ITSELF),
    f"{VOLUME}.fit": Case("resize", "spacing", volumes, also={f"{VOLUME}.spacing": 2.0}),
    f"{VOLUME}.spacing": Case(2.0, 3.0, volumes, given={f"{VOLUME}.fit": "spacing", f"{VOLUME}.spacing": 1.0}),
    f"{VOLUME}.intensity": Case("zscore", "zscore_foreground", volumes),
    f"{VOLUME}.percentiles": Case((1, 99), (10, 90), volumes, given={f"{VOLUME}.intensity": "percentiles"}),
    f"{VOLUME}.background": Case(0.0, 50.0, volumes, given={f"{VOLUME}.intensity": "zscore_foreground"}),
    f"{VOLUME}.nan": Case("refuse", "background", not_a_number, ("refused", "read")),
    f"{SERIES}.frame_stride": Case(1, 2, frames, ([6, 7, 8, 9], [4, 6, 8, 10])),
    f"{SERIES}.window_stride": Case(1, 4, frames, ([6, 7, 8, 9], [4, 5, 6, 7])),
    "data.bucket_batches": Case(1, 3, order, given={"train.batch_size": 1}),
    "data.pack": Case(0, 4096, lambda t: len(loss_weights(t)[0]), (4, 1)),
    "data.pack_prefixes": Case(
        False,
        True,
        lambda t: {"prefix" in given for given in t.ran.given["T"]},
        ({False}, {True}),
        {"train.batch_size": 8},
    ),
    "data.prefetch": Case(0, 3, lambda t: t.ran.prefetch[0], ITSELF),
    "loss.numbers": Case("cross_entropy", "regression_aware", lambda t: t.model.number_loss is None, (True, False)),
    "mask.preset": Case("", "upstream", loss_weights),
    "mask.supervise": Case("assistant", "last_assistant", loss_weights),
    "mask.end_of_turn": Case(True, False, loss_weights),
    "mask.turn_header": Case(True, False, loss_weights),
    "mask.task_weights": Case({}, {"T1": 2.0}, loss_weights),
    "mask.normalize": Case("token", "turn", loss_weights),
    "model.checkpoint": Case("", LLAVA, lambda t: t.language[0].mlp.up_proj.weight.tolist()),
    "model.chat_template": Case("chatml", "vicuna", lambda t: {x: t.inputs("input_ids", x) for x in "TE"}),
    "model.train": Case("projector", "embedder+tower", trained, ({"projector"}, {"embedder", "tower"})),
    "model.embedder_init": Case(
        "random", "inflated", lambda t: t.embedder.projection.weight.tolist(), given={"model.checkpoint": LLAVA}
    ),
    "model.lora_rank": Case(2, 4, lambda t: len(t.adapters[0].lora_A["default"].weight), ITSELF, LORA),
    "model.lora_alpha": Case(8, 16, lambda t: t.adapters[0].scaling["default"] * 2, ITSELF, LORA),
    "model.lora_dropout": Case(0.1, 0.2, lambda t: t.adapters[0].lora_dropout["default"].p, ITSELF, LORA),
    "model.attention": Case(  # in each step, also those after an evaluation
        "sdpa", "eager", lambda t: {out[1] is None for out in t.ran.attention["language", "T"]}, ({True}, {False})
    ),
    "model.dtype": Case(
        "float32", "bfloat16", dtypes, ({torch.float32}, {torch.bfloat16}), {"model.train": "embedder"}
    ),
    "model.frozen_dtype": Case(
        "same",
        "float8",
        lambda t: isinstance(t.tower[0].mlp, Float8Layers),
        (False, True),
        {"model.train": "embedder", "model.dtype": "bfloat16"},
    ),
    "model.width": Case(16, 32, lambda t: {t.tower[0].mlp.fc2.out_features, t.model.lm_head.in_features}, ({16}, {32})),
    "model.tower_layers": Case(1, 2, lambda t: len(t.tower), ITSELF),
    "model.language_layers": Case(1, 2, lambda t: len(t.language), ITSELF),
    "model.heads": Case(2, 4, heads, ({2}, {4})),
    "optim.lr": Case(1e-3, 2e-3, rates("rest"), ([1e-3] * 2, [2e-3] * 2), {"optim.embedder_lr": 1e-4}),
    "optim.embedder_lr": Case(1e-3, 2e-3, rates("embedder"), ([1e-3] * 2, [2e-3] * 2)),
    "optim.weight_decay": Case(
        0.1, 0.2, lambda t: {group["weight_decay"] for group in t.optimizer.param_groups}, ({0, 0.1}, {0, 0.2})
    ),
    "optim.warmup": Case(0, 2, rates("rest"), ([LR] * 4, [LR / 2, LR, LR, LR]), FOUR_STEPS),
    "optim.schedule": Case(
        "constant", "linear", rates("rest"), ([LR] * 4, [LR, LR * 0.75, LR / 2, LR / 4]), FOUR_STEPS
    ),
    "optim.clip": Case(0.01, 0.02, clipped, ITSELF, {"train.batch_size": 8}),
    **{
        f"train.augment.{name}": Case(0, 30 if name == "rotate" else 0.9, lambda t: t.voxels("sMRI", "T"))
        for name in AugmentSettings.model_fields
    },
    "train.epochs": Case(1, 2, lambda t: t.ran.events, ("TSTSE", "TSTSETSTSE")),
    "train.batch_size": Case(4, 2, lambda t: t.ran.events, ("TSTSE", "TSTSTSTSE")),
    "train.tokens_per_batch": Case(0, 120, lambda t: t.ran.events, ("TSTSE", "TSTSTSTSE")),
    "train.accumulate": Case(1, 2, lambda t: t.ran.events, ("TSTSE", "TTSE")),
    "train.checkpoint_activations": Case(
        False, True, lambda t: {x: len(t.ran.attention[x, "T"]) for x in ("tower", "language")}
    ),
    "train.shard": Case(
        False, True, lambda t: isinstance(t.model.lm_head.weight, DTensor), ITSELF, {"resources.workers": 2}
    ),
    "train.compile": Case(
        False, True, lambda t: {bool(layer._compiled_call_impl) for layer in (*t.tower, *t.language)}, ({False}, {True})
    ),
    "train.max_loss_ratio": Case(
        0,
        0.1,
        lambda t: t.ran.events.count("S"),
        (12, 10),
        STILL | {"train.batch_size": 8, "train.epochs": 12, "train.evaluate_every": 12},
    ),
    "train.evaluate_every": Case(0, 1, lambda t: t.ran.events, ("TSTSE", "TSETSE")),
    "train.evaluation_batch_size": Case(32, 1, lambda t: [len(of) for of in t.inputs("input_ids", "E")], ([2], [1, 1])),
    "train.patience": Case(
        1, 2, lambda t: t.ran.events, ("TSETSE", "TSETSETSE"), STILL | {"train.evaluate_every": 1, "train.epochs": 2}
    ),
}
"""By name. A modality's settings stand for those of all modalities."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with volumes in which background, foreground and frames differ, and one with a voxel that is NaN."""
    folder, draw = tmp_path_factory.mktemp("storage"), np.random.default_rng(0)
    brain = np.zeros((8, 6, 4), np.float32)
    brain[1:7, 1:5, 1:3] = draw.normal(10, 3, (6, 4, 2))
    brain[3:5, 2:4, 1:3] = 50
    broken = brain.copy()
    broken[3, 3, 1] = np.nan
    series = (np.arange(16) + draw.normal(0, 0.1, (4, 5, 4, 16))).astype(np.float32)
    for name, voxels in {"brain": brain, "nan": broken, "series": series}.items():
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 2, 3, 1])), folder / f"{name}.nii")
    return folder


@pytest.fixture(scope="module")
def splits(storage: Path, talk: Make) -> tuple[list[Any], list[Any]]:
    """Eight conversations to train on, all of other lengths, and two to evaluate."""
    brain, series = ("sMRI", storage / "brain.nii"), ("fMRI", storage / "series.nii")
    asked: list[Any] = [[brain, "Sex?"], [series, "Sex, please?"], "Hi.", *("Hi! " * n for n in (3, 5, 7, 9))]
    asked += [[brain, "Sex?"], [brain, series], [series, brain]]
    labels = ["male", "female"] * 5
    told = [
        talk(
            ("user", content),
            *([("assistant", "Hello."), ("user", "Sex?")] if i in (2, 7) else []),
            ("assistant", f"{label}."),
            task_id=f"sample-{i}",
            metadata={"subject_id": f"subject-{i}", "subject_label": label},
        )
        for i, (content, label) in enumerate(zip(asked, labels, strict=True))
    ]
    return told[:8], told[8:]


@pytest.fixture(scope="module")
def llava(save_llava: Make, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def start(
    storage: Path,
    splits: tuple[list[Any], list[Any]],
    llava: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Mapping[str, Any]], Training]]:
    """Makes the trainer of a training with these settings, as a process of Ray Train does."""
    prefetched: list[int] = []

    def batches(
        bounds: Any, make: Any, load: Any = lambda made: made, prefetch: int = 1, name: str = ""
    ) -> Iterator[Any]:
        prefetched.append(prefetch)
        for start, stop in bounds:
            yield load(make(start, stop))

    def quantise(model: Any, settings: Any) -> None:  # without the check for a GPU
        if settings.frozen_dtype == "float8":
            quantise_frozen_linears(model)

    for module in ("trainer", "language_model"):
        monkeypatch.setattr(f"umbrella.training.{module}.batches", batches)
    monkeypatch.setattr("umbrella.training.language_model.apply_frozen_dtype", quantise)
    monkeypatch.setattr(ray, "get", lambda tables: tables)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    torch.set_num_threads(1)
    base = load_settings(overrides=BASE | {"resources.storage": str(storage)})

    def start(values: Mapping[str, Any]) -> Training:
        prefetched.clear()
        settings = base.with_values({name: llava if value is LLAVA else value for name, value in values.items()})
        renderer = load_renderer(settings)
        lengths = [np.array([renderer.render(c).bucket_length for c in split]) for split in splits]
        job = LanguageModelJob(
            task=LANGUAGE_MODEL,
            settings=settings,
            data={},
            tracking={"name": "test"},
            folder=str(tmp_path_factory.mktemp("training")),
            train=to_table(splits[0]),
            validation=to_table(splits[1]),
            train_lengths=lengths[0],
            train_tokens=np.array([len(renderer.render(c).input_ids) for c in splits[0]]),
            validation_lengths=lengths[1],
            candidates=find_candidates(splits[0]),
            modalities=["fMRI", "sMRI"],
            longest_answer=10,
        )
        workers = settings.resources.workers
        if workers > 1 and not distributed.is_initialized():  # the others are not needed to make one
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        device = torch.device("cpu")
        return Training(Trainer(job, LanguageModelTask, 0, workers, device, None, lambda metrics: None), prefetched)

    yield start
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_every_setting_that_can_be_swept_has_a_case() -> None:
    names = [
        e.name for e in list_settings(Settings()) if section_of(e.name) not in NOT_SWEEPABLE or e.name in SWEEPABLE_DATA
    ]
    assert sorted(re.sub(r"^modalities\.\w+", "modalities.NAME", name) for name in CASES) == sorted(names)


@pytest.mark.parametrize("name", CASES)
def test_a_setting_acts(name: str, start: Callable[[Mapping[str, Any]], Training]) -> None:
    case = CASES[name]
    one = places(case.see(start({**case.given, name: case.one})))
    other = places(case.see(start({**case.given, **case.also, name: case.other})))
    assert one.keys() == other.keys() != set()
    if case.expected is None:
        assert [place for place in one if one[place] == other[place]] == []
        return
    first, second = (case.one, case.other) if case.expected is ITSELF else case.expected
    assert one == dict.fromkeys(one, first)
    assert other == dict.fromkeys(other, second)


def places(seen: Any) -> dict[str, Any]:
    return seen if isinstance(seen, dict) else {"": seen}


@pytest.mark.parametrize(("mode", "best"), [("min", [nan, 3.0, 1.0, 1.0]), ("max", [nan, 3.0, 3.0, 3.0])])
def test_every_report_has_the_running_best_of_the_metric(mode: str, best: list[float], start: Any) -> None:
    training = start({"train.evaluate_every": 1, "train.epochs": 2, "tune.mode": mode})
    losses, reports = iter([nan, 3.0, 1.0, 2.0]), []
    training.task.evaluate = lambda: {"eval/loss": next(losses)}
    training.trainer.report = reports.append
    training.trainer.run()
    assert [report["best/eval/loss"] for report in reports] == pytest.approx(best, nan_ok=True)
