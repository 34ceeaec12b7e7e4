"""The model: transformers' LLaVA, reading volumes through a 3D/4D embedder in place of the tower's 2D one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)
from transformers.utils import ModelOutput, cached_file

from umbrella.modality import Modality
from umbrella.model.embedder import VolumeEmbedder
from umbrella.model.token_nll import token_nll

ADAPTER = "adapter"
"""The folder beside a saved model's weights that holds its adapters, as PEFT saves them."""


BASE = "base.json"
"""Says, beside weights that are not all of a model, which checkpoint has the others: see ``partial``."""


class UmbrellaConfig(LlavaConfig):
    """A LLaVA configuration and ``umbrella_modalities``: name to grid and patch."""

    model_type = "umbrella_llava"

    umbrella_modalities: dict[str, Any] | None = None

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities as their own type."""
        return {name: Modality.model_validate(raw) for name, raw in (self.umbrella_modalities or {}).items()}


@dataclass
class UmbrellaOutput(ModelOutput):
    """token_nll (B, L), float32: the negative log likelihood of each token that has a loss weight, 0 elsewhere."""

    token_nll: torch.Tensor | None = None


class UmbrellaForConditionalGeneration(LlavaForConditionalGeneration):
    """Reads volumes and text, and says how likely each supervised token is.

    1. input_ids (B, L)                                → word vectors (B, L, d)
    2. each modality's voxels (n, *grid)               → embedder (n, tokens, w) → tower → projector (n, tokens, d)
    3. features of all modalities, in the order of the placeholder runs they stand at, are put there
    4. language model                                  → hidden states (B, L, d)
    5. hidden states before supervised tokens (S, d)   → logits, float32, a chunk of S at a time → token_nll (B, L)

    Without loss weights, step 5 is transformers' own: logits for ``generate``, which is greedy unless told otherwise.
    """

    config_class = UmbrellaConfig

    def __init__(self, config: UmbrellaConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.model.vision_tower.embeddings = VolumeEmbedder(
            config.modalities, vision.hidden_size, class_token=vision.model_type == "clip_vision_model"
        )

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
        """See the class.

        Args:
            attention_mask: (B, L), 0 at padding. Rows that several samples share have 1 at the first one's tokens, 2 at
                the second one's, and so on: each attends to itself only, and its positions start at 0.
            pixel_values: modality to its ``VolumeGroup``.

        Raises:
            ValueError: a run of placeholders and the volume that stands there disagree in number of tokens.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        cache = generation.get("past_key_values")
        if input_ids is not None and (cache is None or not cache.get_seq_length()):  # not the next word of an answer
            inputs |= self._with_volumes(input_ids, pixel_values or {})
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and (attention_mask > 1).any():
                # transformers tells the samples of a row apart by where positions start anew, if it gets no mask.
                inputs |= {"attention_mask": None, "position_ids": restarted(attention_mask), "use_cache": False}
        if loss_weights is None:
            return super().forward(**generation | inputs)
        assert input_ids is not None
        hidden = self.model(**inputs | {"use_cache": False})[0]
        if self.training:
            hidden = hidden + self._anchor(pixel_values or {})
        return UmbrellaOutput(token_nll=token_nll(hidden, self.lm_head.weight, input_ids, loss_weights))

    def _with_volumes(self, input_ids: torch.Tensor, pixel_values: dict[str, Any]) -> dict[str, Any]:
        if not pixel_values:
            self._check_runs(input_ids, input_ids.new_empty(0), input_ids.new_empty(0))
            return {}
        words = self.get_input_embeddings()(input_ids)
        here = (input_ids == self.config.image_token_id)[..., None]
        placed = words.masked_scatter(here, self.features(input_ids, pixel_values).to(words.dtype))
        return {"input_ids": None, "inputs_embeds": placed}

    def features(self, input_ids: torch.Tensor, pixel_values: dict[str, Any]) -> torch.Tensor:
        """Projected features of all volumes (tokens, d), in the order of the placeholders of ``input_ids``."""
        parts = {name: self.volume_features(name, group.voxels) for name, group in pixel_values.items()}
        run = torch.cat([group.run for group in pixel_values.values()])
        size = torch.cat([run.new_full(part.shape[:1], part.shape[1]) for part in parts.values()])
        order = torch.argsort(run)
        self._check_runs(input_ids, run[order], size[order])
        # Where each volume's tokens start in `parts`, gathered in the order of the runs, then counted on from there.
        start = (torch.cumsum(size, 0) - size)[order]
        placed = torch.cumsum(size[order], 0) - size[order]
        index = torch.repeat_interleave(start - placed, size[order])
        tokens = torch.cat([part.flatten(0, 1) for part in parts.values()])
        return tokens[index + torch.arange(len(index), device=run.device)]

    def volume_features(self, name: str, voxels: torch.Tensor) -> torch.Tensor:
        """One modality's volumes (n, *grid) through tower and projector: (n, tokens, d).

        Which layer of the tower is read, and whether its class token stays, is the configuration's
        ``vision_feature_layer`` and ``vision_feature_select_strategy``.
        """
        states = self.model.vision_tower(pixel_values=(name, voxels), output_hidden_states=True).hidden_states
        read = self.config.vision_feature_layer
        selected = torch.cat([states[layer] for layer in ([read] if isinstance(read, int) else read)], -1)
        if self.config.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        return self.model.multi_modal_projector(selected)

    def _check_runs(self, input_ids: torch.Tensor, runs: torch.Tensor, sizes: torch.Tensor) -> None:
        """``runs`` (V,), rising, and ``sizes`` (V,): where the volumes stand, and how many tokens they are."""
        mask = functional.pad(input_ids == self.config.image_token_id, (1, 1))
        edges = mask[:, 1:].int() - mask[:, :-1].int()
        starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
        lengths = stops[:, 1] - starts[:, 1]
        if len(lengths) != len(sizes) or (runs != torch.arange(len(lengths), device=runs.device)).any():
            alone = sorted(set(range(len(lengths))) - set(runs.tolist()))
            where = f"; row {int(starts[alone[0], 0])}, run {alone[0]} of the batch has none" if alone else ""
            raise ValueError(f"{len(sizes)} volumes for {len(lengths)} runs of placeholders in the batch{where}")
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
            absent = [self.model.vision_tower, self.model.multi_modal_projector]
        weights = [p for module in absent for p in module.parameters() if p.requires_grad]
        return 0.0 * sum(p.sum() for p in weights) if weights else 0.0

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> Any:
        if expand_size > 1:
            raise ValueError("num_beams and num_return_sequences stay at 1: repeat the rows for several answers")
        return super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write weights and configuration as safetensors and JSON; adapters apart, in ``adapter/``, as PEFT does."""
        options = {"save_original_format": False} | options  # weights by their names here, not by LLaVA's older ones
        adapter = Path(save_directory) / ADAPTER
        shutil.rmtree(adapter, ignore_errors=True)  # what another model has left there is not this one's
        if not getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, **options)
        super().save_pretrained(adapter, **options | {"max_shard_size": "1TB"})  # PEFT reads one file
        own = {k.replace(".base_layer.", "."): w for k, w in self.state_dict().items() if ".lora_" not in k}
        self._hf_peft_config_loaded = False  # with it, only adapters would be saved
        try:
            return super().save_pretrained(save_directory, **options | {"state_dict": own})
        finally:
            self._hf_peft_config_loaded = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """A model that ``save_pretrained`` wrote, with its adapters. With adapters, no weight moves until told to.

        Only safetensors are read: nothing is unpickled.

        Raises:
            ValueError: a plain LLaVA, which ``presets.build_model`` makes a model of; a checkpoint that holds only what
                was trained, which ``loading.load_trained`` does.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: options[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in options}
        kind = PretrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        if kind != UmbrellaConfig.model_type:
            raise ValueError(f"{name} is a {kind} without volume embedders; presets.build_model gives it some")
        if (Path(name) / BASE).is_file():
            raise ValueError(
                f"{name} holds only what was trained, not the base that it stands on;"
                " umbrella.model.loading.load_trained makes the whole model, and its save_pretrained a folder for here"
            )
        loaded = super().from_pretrained(name, *args, **options | {"use_safetensors": True})
        config = cached_file(
            name, "adapter_config.json", subfolder=ADAPTER, _raise_exceptions_for_missing_entries=False, **hub
        )
        if config:
            cached_file(name, "adapter_model.safetensors", subfolder=ADAPTER, **hub)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.load_adapter(str(Path(config).parent))
        return loaded


def restarted(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) that start at 0 with each sample of a row, for a mask (B, L) that numbers the samples."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
    begins = functional.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(1).values


AutoConfig.register(UmbrellaConfig.model_type, UmbrellaConfig)
AutoModelForImageTextToText.register(UmbrellaConfig, UmbrellaForConditionalGeneration)
