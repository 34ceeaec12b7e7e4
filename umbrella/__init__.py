"""UMBRELLA: train LLaVA-style models that read brain MRI, and find out which training choices work.

The names below are the public interface; docs/python.md shows them. Each is imported at its first use, because torch
and ray take seconds.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from umbrella.version import __version__ as __version__

if TYPE_CHECKING:
    from umbrella.base import UserError as UserError
    from umbrella.config import Settings as Settings
    from umbrella.config import load_settings as load_settings
    from umbrella.conversations.schema import Conversation as Conversation
    from umbrella.data.batching import Batch as Batch
    from umbrella.data.batching import Collator as Collator
    from umbrella.data.ingest import load_splits as load_splits
    from umbrella.data.masking import split_by_weight as split_by_weight
    from umbrella.data.rendering import Example as Example
    from umbrella.data.rendering import load_renderer as load_renderer
    from umbrella.evaluation_run.evaluate import evaluate as evaluate
    from umbrella.evaluation_run.evaluate import load_evaluation_settings as load_evaluation_settings
    from umbrella.inference.model import Umbrella as Umbrella
    from umbrella.models.build import build_model as build_model
    from umbrella.training.optimizer import build_optimizer as build_optimizer
    from umbrella.training.optimizer import build_schedule as build_schedule
    from umbrella.training.step import train_step as train_step
    from umbrella.tuning.sweep import run_sweep as run_sweep
    from umbrella.volumes.store import open_store as open_store

MODULES = {
    "Settings": "config",
    "load_settings": "config",
    "load_splits": "data.ingest",
    "Conversation": "conversations.schema",
    "Example": "data.rendering",
    "load_renderer": "data.rendering",
    "split_by_weight": "data.masking",
    "open_store": "volumes.store",
    "Batch": "data.batching",
    "Collator": "data.batching",
    "build_model": "models.build",
    "build_optimizer": "training.optimizer",
    "build_schedule": "training.optimizer",
    "train_step": "training.step",
    "run_sweep": "tuning.sweep",
    "evaluate": "evaluation_run.evaluate",
    "load_evaluation_settings": "evaluation_run.evaluate",
    "Umbrella": "inference.model",
    "UserError": "base",
}
"""Public name to the module that has it."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from umbrella.cluster import prepare_environment

    prepare_environment(os.environ.get("RAY_ADDRESS") or "local")  # before a module imports ray
    return getattr(import_module(f"umbrella.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *MODULES]
