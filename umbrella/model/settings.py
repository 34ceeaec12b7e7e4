"""Settings of the model."""

from typing import Literal

from pydantic import Field

from umbrella.base import Section


class ModelSettings(Section):
    """A tiny LLaVA made from scratch, or a checkpoint with the volume embedder in place of the 2D one."""

    checkpoint: str = ""
    """A LLaVA checkpoint: a folder, or a Hugging Face name (llava-hf/llava-interleave-qwen-0.5b-hf). Empty: tiny."""
    train: Literal["embedder", "embedder+projector", "all"] = "all"
    """Which weights move: the volume embedder, also the projector, or all."""
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
