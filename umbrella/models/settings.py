"""Settings of the model."""

import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from umbrella.base import PathOrAddress, Section

COMPONENTS = ("embedder", "projector", "tower", "lora")
"""Values of ``model.train`` beside "all"."""


class ModelSettings(Section):
    """A tiny LLaVA with random weights, or a checkpoint with the volume embedder instead of its 2D embedder."""

    checkpoint: PathOrAddress = ""
    """A LLaVA checkpoint: a folder or a Hugging Face name (llava-hf/llava-interleave-qwen-0.5b-hf). Empty: a tiny model."""  # noqa: E501
    chat_template: PathOrAddress = ""
    """Chat template: chatml, vicuna or a Jinja file. Empty: that of the tokenizer, or ChatML if it has none."""
    train: str = "all"
    """Trainable parameters: all, or some of embedder, projector, tower, lora (adapters of the language model): embedder+lora."""  # noqa: E501
    embedder_init: Literal["random", "inflated"] = "random"
    """Initialisation of the volume embedder of a checkpoint that has none: random, or its 2D patch and position weights inflated to depth and time."""  # noqa: E501
    lora_rank: int = Field(16, ge=1)
    """Rank of the LoRA adapters, which are on every linear layer of the language model's blocks."""
    lora_alpha: float = Field(32, gt=0)
    """Scale of the LoRA adapters: their output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the input of the LoRA adapters, in training."""
    attention: Literal["sdpa", "varlen", "eager"] = "sdpa"
    """Attention implementation of the language model in training. varlen, for data.pack and data.pack_prefixes, treats each sample of a row as a sequence and needs no mask; it needs a GPU and dtype=bfloat16."""  # noqa: E501
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward pass. Trainable weights are float32."""
    frozen_dtype: Literal["same", "float8"] = "same"
    """Data type of products with frozen weights in training: same as dtype, or float8 (e4m3), faster and less exact, on GPUs of compute capability 8.9 and higher."""  # noqa: E501
    width: int = Field(64, ge=8)
    """Hidden size of the tiny model's vision tower and language model."""
    tower_layers: int = Field(1, ge=1)
    """Layers of the tiny model's vision tower."""
    language_layers: int = Field(2, ge=1)
    """Layers of the tiny model's language model."""
    heads: int = Field(4, ge=1)
    """Attention heads per layer of the tiny model."""

    @field_validator("checkpoint", "chat_template")
    @classmethod
    def _absolute(cls, name: str) -> str:
        # Workers have another working directory, in which a relative path is wrong.
        is_a_path = name not in ("", "chatml", "vicuna") and os.path.exists(name)
        return os.path.abspath(name) if is_a_path else name

    @field_validator("train")
    @classmethod
    def _known_parts(cls, train: str) -> str:
        names = train.split("+")
        if train != "all" and (len(set(names)) < len(names) or not set(names) <= set(COMPONENTS)):
            raise ValueError(f"is not all, and not some of {', '.join(COMPONENTS)} joined by +")
        return train

    @model_validator(mode="after")
    def _inflated_from_something(self) -> "ModelSettings":
        if self.embedder_init == "inflated" and not self.checkpoint:
            raise ValueError("embedder_init=inflated needs a model.checkpoint: the tiny model has no 2D weights")
        return self

    @model_validator(mode="after")
    def _varlen_in_bfloat16(self) -> "ModelSettings":
        if self.attention == "varlen" and self.dtype != "bfloat16":
            raise ValueError("attention=varlen needs dtype=bfloat16")
        return self

    @model_validator(mode="after")
    def _float8_beside_bfloat16(self) -> "ModelSettings":
        if self.frozen_dtype == "float8" and (self.train == "all" or self.dtype != "bfloat16"):
            raise ValueError("frozen_dtype=float8 needs dtype=bfloat16 and frozen weights: a train other than all")
        return self
