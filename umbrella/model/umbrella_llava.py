"""The model: transformers' LLaVA, reading volumes through a 3D/4D embedder in place of the tower's 2D one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from umbrella.modality import Modality
from umbrella.model.embedder import VolumeEmbedder


class UmbrellaConfig(LlavaConfig):
    """A LLaVA configuration and ``umbrella_modalities``: name to grid and patch."""

    model_type = "umbrella_llava"

    umbrella_modalities: dict[str, Any] | None = None

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities as their own type."""
        return {name: Modality.model_validate(raw) for name, raw in (self.umbrella_modalities or {}).items()}


# Published LLaVA checkpoints name their weights in an older way; transformers keeps the translation by model type.
AutoConfig.register(UmbrellaConfig.model_type, UmbrellaConfig)
register_checkpoint_conversion_mapping(UmbrellaConfig.model_type, get_checkpoint_conversion_mapping("llava"))


@dataclass
class UmbrellaOutput(ModelOutput):
    """token_nll (B, L), float32: the negative log likelihood of each token that has a loss weight, 0 elsewhere."""

    token_nll: torch.Tensor | None = None


class UmbrellaForConditionalGeneration(LlavaForConditionalGeneration):
    """Reads volumes and text, and says how likely each supervised token is.

    1. input_ids (B, L)                                → word vectors (B, L, d)
    2. each modality's voxels (n, *grid)               → embedder (n, num_tokens, w) → tower → projector (…, d)
    3. features of all modalities, in the order of the placeholder runs they stand at, are put there
    4. language model                                  → hidden states (B, L, d)
    5. hidden states before supervised tokens (S, d)   → logits (S, words), float32 → token_nll (B, L)

    Without loss weights, step 5 is transformers' own: logits for ``generate``.
    """

    config_class = UmbrellaConfig

    def __init__(self, config: UmbrellaConfig) -> None:
        super().__init__(config)
        self.model.vision_tower.embeddings = VolumeEmbedder(config.modalities, config.vision_config.hidden_size)

    @property
    def embedder(self) -> VolumeEmbedder:
        """The part that is new: patches to vectors."""
        return self.model.vision_tower.embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: dict[str, Any] | None = None,
        loss_weights: torch.Tensor | None = None,
        **generation: Any,
    ) -> Any:
        """See the class. ``pixel_values``: modality to its ``VolumeGroup``.

        Raises:
            ValueError: a run of placeholders and the volume that stands there disagree in number of tokens.
        """
        features = None
        if pixel_values and input_ids is not None:
            features = {"image": BaseModelOutputWithPooling(pooler_output=[self.features(input_ids, pixel_values)])}
        if loss_weights is None:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, mm_encoder_outputs=features, **generation
            )
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, mm_encoder_outputs=features)[0]
        if self.training:
            hidden = hidden + self._anchor(pixel_values or {})
        return UmbrellaOutput(token_nll=self._token_nll(hidden, input_ids, loss_weights))

    def features(self, input_ids: torch.Tensor, pixel_values: dict[str, Any]) -> torch.Tensor:
        """Projected features of all volumes (tokens, d), in the order of the placeholders of ``input_ids``."""
        parts, runs, sizes = [], [], []
        for name, group in pixel_values.items():
            part = self.model.get_image_features((name, group.voxels)).pooler_output
            parts += part
            runs.append(group.run)
            sizes += [len(tokens) for tokens in part]
        run = torch.cat(runs)
        size = torch.tensor(sizes, device=run.device)
        order = torch.argsort(run)
        self._check_runs(input_ids, size[order])
        # Where each volume's tokens start in `parts`, gathered in the order of the runs, then counted on from there.
        start = (torch.cumsum(size, 0) - size)[order]
        placed = torch.cumsum(size[order], 0) - size[order]
        index = torch.repeat_interleave(start - placed, size[order])
        return torch.cat(parts)[index + torch.arange(len(index), device=run.device)]

    def _check_runs(self, input_ids: torch.Tensor, sizes: torch.Tensor) -> None:
        mask = functional.pad(input_ids == self.config.image_token_id, (1, 1))
        edges = mask[:, 1:].int() - mask[:, :-1].int()
        starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
        lengths = stops[:, 1] - starts[:, 1]
        if len(lengths) != len(sizes):
            raise ValueError(f"{len(sizes)} volumes for {len(lengths)} runs of placeholders in the batch")
        if (lengths != sizes).any():
            wrong = int((lengths != sizes).nonzero()[0])
            raise ValueError(
                f"row {int(starts[wrong, 0])}, run {wrong} of the batch: {int(lengths[wrong])} placeholders for a"
                f" volume of {int(sizes[wrong])} tokens"
            )

    def _anchor(self, pixel_values: dict[str, Any]) -> torch.Tensor | float:
        """Zero, made of the weights that this batch leaves out: data-parallel workers see the same weights."""
        absent = [m for name, m in self.embedder.by_modality.items() if name not in pixel_values]
        if not pixel_values:
            absent += [self.model.vision_tower.encoder, self.model.multi_modal_projector]
        weights = [p for module in absent for p in module.parameters() if p.requires_grad]
        return 0.0 * sum(p.sum() for p in weights) if weights else 0.0

    def _token_nll(self, hidden: torch.Tensor, input_ids: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
        assert input_ids is not None
        row, column = (weights[:, 1:] != 0).nonzero(as_tuple=True)
        logits = self.lm_head(hidden[row, column]).float()
        nll = functional.cross_entropy(logits, input_ids[row, column + 1], reduction="none")
        return nll.new_zeros(weights.shape).index_put((row, column + 1), nll)
