"""Settings of the model."""

import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from umbrella.base import PathOrAddress, Section

MOVABLE = ("embedder", "projector", "tower", "lora")
"""What ``model.train`` can name beside "all"."""


class ModelSettings(Section):
    """A tiny LLaVA made from scratch, or a checkpoint with the volume embedder in place of the 2D one."""

    checkpoint: PathOrAddress = ""
    """A LLaVA checkpoint: a folder, or a Hugging Face name (llava-hf/llava-interleave-qwen-0.5b-hf). Empty: tiny."""
    chat_template: PathOrAddress = ""
    """How turns are written. Empty: the tokenizer's own, else ChatML. Or: chatml, vicuna, or a Jinja file."""
    train: str = "all"
    """Which weights move: all, or some of embedder, projector, tower, lora (of the language model): embedder+lora."""
    embedder_init: Literal["random", "inflated"] = "random"
    """Where a checkpoint has no volume embedder yet: random weights, or its 2D patches and positions spread over depth and time."""  # noqa: E501
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters of train: lora, on every matrix of the language model's layers."""
    lora_alpha: float = Field(32, gt=0)
    """Scale of the adapters: their product is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters, in training."""
    attention: Literal["sdpa", "flex_attention", "eager"] = "sdpa"
    """How the language model attends. flex_attention needs a GPU, and skips what data.pack keeps apart."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; what is trained stays in float32."""
    width: int = Field(64, ge=8)
    """Hidden size of the tiny model's tower and language model."""
    tower_layers: int = Field(1, ge=1)
    """Layers of the tiny model's vision tower."""
    language_layers: int = Field(2, ge=1)
    """Layers of the tiny model's language model."""
    heads: int = Field(4, ge=1)
    """Attention heads of the tiny model's layers."""

    @field_validator("checkpoint", "chat_template")
    @classmethod
    def _absolute(cls, name: str) -> str:
        # Workers run in another folder, where a relative path would mean something else.
        is_a_path = name not in ("", "chatml", "vicuna") and os.path.exists(name)
        return os.path.abspath(name) if is_a_path else name

    @field_validator("train")
    @classmethod
    def _known_parts(cls, train: str) -> str:
        names = train.split("+")
        if train != "all" and (len(set(names)) < len(names) or not set(names) <= set(MOVABLE)):
            raise ValueError(f"is not all, and not some of {', '.join(MOVABLE)} joined by +")
        return train

    @model_validator(mode="after")
    def _inflated_from_something(self) -> "ModelSettings":
        if self.embedder_init == "inflated" and not self.checkpoint:
            raise ValueError("embedder_init=inflated needs a model.checkpoint: the tiny model has no 2D weights")
        return self
