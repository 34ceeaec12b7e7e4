"""The model: LLaVA from transformers, with 3D and 4D patch embeddings in the vision tower."""

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
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput, cached_file

from umbrella.base import UserError
from umbrella.modality import Modality, class_tokens
from umbrella.models.number_loss import NumberLoss
from umbrella.models.token_nll import supervised_positions, target_nll, token_nll
from umbrella.models.varlen import find_sequences
from umbrella.models.volume_embedder import VolumeEmbedder
from umbrella.version import check_version, write_version

ADAPTER = "adapter"
"""Subfolder of a saved model with its adapters, in the format of PEFT."""
BASE = "base.json"
"""File of a partial checkpoint that names its base checkpoint, see ``partial_checkpoint``."""


class UmbrellaConfig(LlavaConfig):
    """A LLaVA configuration with the modalities of the volume embedder.

    Args:
        umbrella_modalities: fields of ``Modality`` (grid, patch, ...) by modality name.
        trained_modalities: names of the modalities in the training data. None if not recorded.
        longest_answer: number of tokens of the longest assistant turn in the training data, with its end of turn.
    """

    model_type = "umbrella_llava"

    umbrella_modalities: dict[str, Any] | None = None
    trained_modalities: list[str] | None = None
    longest_answer: int | None = None

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities of the volume embedder by name."""
        return {name: Modality.model_validate(raw) for name, raw in (self.umbrella_modalities or {}).items()}

    @property
    def known_modalities(self) -> dict[str, Modality]:
        """The modalities that the model was trained on, or all of them if this is not recorded."""
        trained = self.trained_modalities
        return {name: m for name, m in self.modalities.items() if trained is None or name in trained}


@dataclass
class UmbrellaOutput(ModelOutput):
    """The negative log likelihood in nats, float32: (B, L), 0 at unsupervised tokens; or (Q,) of the targets."""

    token_nll: torch.Tensor | None = None


class UmbrellaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA for volumes and text. With loss weights, it returns the negative log likelihood of supervised tokens.

    1. input_ids (B, L)                                → token embeddings (B, L, d)
    2. voxels of each modality (n, *grid)              → embedder (n, tokens, w) → tower → projector (n, tokens, d)
    3. The features replace the embeddings of the placeholder tokens.
    4. language model                                  → hidden states (B, L, d)
    5. hidden states before supervised tokens (S, d)   → logits, float32, in chunks of S → token_nll (B, L)

    Without loss weights, the output is that of LLaVA: logits, as ``generate`` needs them.
    """

    config_class = UmbrellaConfig
    number_loss: NumberLoss | None = None
    """The loss of numbers in training; None: cross entropy."""
    uses_varlen = False
    """Whether attention is computed by ``varlen_attention``. Set by ``use_attention``."""

    def __init__(self, config: UmbrellaConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.model.vision_tower.embeddings = VolumeEmbedder(
            config.modalities, vision.hidden_size, class_token=vision.model_type == "clip_vision_model"
        )

    def use_attention(self, name: str) -> None:
        """Set the attention implementation of the language model; see ``ModelSettings.attention``.

        Raises:
            UserError: the kernels of varlen do not have what the model needs.
        """
        config = self.config.text_config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if name == "varlen" and (width % 8 or width > 256 or config.attention_dropout):
            raise UserError(
                f"model.attention=varlen: needs attention heads of a width that is a multiple of 8, at most 256, and no"
                f" attention_dropout; the model has width {width} and dropout {config.attention_dropout}"
            )
        self.set_attn_implementation({"text_config": name})
        self.uses_varlen = name == "varlen"

    @property
    def embedder(self) -> VolumeEmbedder:
        """The volume embedder, which replaces the 2D embeddings of the vision tower."""
        return self.model.vision_tower.embeddings

    @property
    def feature_layers(self) -> list[int]:
        """Numbers of the tower layers whose outputs are the features; 0 is the input of the first layer."""
        layers = self.config.vision_feature_layer
        count = len(self.model.vision_tower.encoder.layers)
        return [layer % (count + 1) for layer in ([layers] if isinstance(layers, int) else layers)]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: dict[str, Any] | None = None,
        loss_weights: torch.Tensor | None = None,
        targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        prefix: torch.Tensor | None = None,
        **generation: Any,
    ) -> Any:
        """Run the model; ``generation`` are further arguments of LLaVA's ``forward``.

        Args:
            input_ids: (B, L). Each volume has one run of consecutive placeholder tokens.
            attention_mask: (B, L), 0 at padding. In rows with several packed samples, the tokens of the first sample
                are 1, of the second 2, and so on. Each sample attends only to itself, and its positions start at 0.
            pixel_values: ``VolumeGroup`` by modality name.
            loss_weights: (B, L), nonzero at supervised tokens.
            targets: rows, columns and token ids, (Q,) each: asks for the likelihood of each token after a position.
            prefix: (B, L), a number in ``attention_mask``, or 0: the tokens with this number precede those of the
                sample, which attends to them and continues their positions. Padding is on the right.

        Returns:
            ``UmbrellaOutput`` with loss weights, or with targets, where ``token_nll`` is (Q,); otherwise the output of
            LLaVA.

        Raises:
            ValueError: if the number of placeholder tokens of a run differs from the number of tokens of its volume.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        # Synchronize with the GPU only before its long computations.
        positions = None if loss_weights is None else supervised_positions(loss_weights)
        cache = generation.get("past_key_values")
        if input_ids is not None and (cache is None or not cache.get_seq_length()):  # not a later generation step
            if prefix is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                inputs |= _attention_arguments(attention_mask, is_complete=loss_weights is not None)
            if self.uses_varlen and attention_mask is not None:
                inputs["sequences"] = find_sequences(attention_mask, prefix)
            embeddings = self.embed_inputs(input_ids, pixel_values or {})
            inputs |= {"input_ids": None, "inputs_embeds": embeddings}
            if prefix is not None and attention_mask is not None:
                inputs |= _prefix_arguments(self.model.language_model.config, embeddings, attention_mask, prefix)
        if targets is not None:
            hidden = self.model(**generation | inputs)[0]
            return UmbrellaOutput(token_nll=target_nll(hidden, self.lm_head.weight, *targets))
        if loss_weights is None:
            return super().forward(**generation | inputs)
        assert input_ids is not None
        assert positions is not None
        hidden = self.model(**inputs | {"use_cache": False})[0]
        nll = token_nll(hidden, self.lm_head.weight, input_ids, loss_weights, positions=positions)
        if self.training and self.number_loss:
            nll = self.number_loss(nll, hidden, self.lm_head.weight, input_ids, positions)
        return UmbrellaOutput(token_nll=nll)

    def embed_inputs(self, input_ids: torch.Tensor, pixel_values: dict[str, Any]) -> torch.Tensor:
        """Return token embeddings (B, L, d), with volume features at the placeholder tokens."""
        embeddings = self.get_input_embeddings()(input_ids)
        if self.training:
            embeddings = embeddings + self._zero_of_unused_weights(pixel_values)
        by_modality: Any = self.embedder.by_modality
        extra = class_tokens(self.config.vision_config.model_type, self.config.vision_feature_select_strategy)
        sizes = [torch.full_like(g.run, by_modality[name].num_tokens + extra) for name, g in pixel_values.items()]
        run = torch.cat([input_ids.new_empty(0), *(group.run for group in pixel_values.values())])
        order = torch.argsort(run)
        starts = self._run_starts(input_ids, run[order], torch.cat([run[:0], *sizes])[order])
        if not pixel_values:
            return embeddings
        features, indices = [], []
        for name, group in pixel_values.items():
            of_group = self.volume_features(name, group.voxels)
            if group.index is not None:
                of_group = of_group[group.index]
            features.append(of_group.flatten(0, 1))
            offsets = torch.arange(of_group.shape[1], device=run.device)
            indices.append((starts[group.run][:, None] + offsets).flatten())
        places = torch.cat(indices)
        rows, columns = places // input_ids.shape[1], places % input_ids.shape[1]
        # No view of a flat tensor: the first of compiled layers would be compiled for views, and the others again.
        return embeddings.index_put((rows, columns), torch.cat(features).to(embeddings.dtype))

    def volume_features(self, name: str, voxels: torch.Tensor) -> torch.Tensor:
        """Return the features (n, tokens, d) of volumes (n, *grid) of the modality ``name``.

        The configuration's ``vision_feature_layer`` selects the layers of the tower, and
        ``vision_feature_select_strategy`` keeps or drops the class token.
        """
        tower, feature_layers = self.model.vision_tower, self.feature_layers
        state = tower.embeddings((name, voxels))
        if hasattr(tower, "pre_layrnorm"):  # CLIP spells it like this
            state = tower.pre_layrnorm(state)
        # A loop over layers: output_hidden_states would split each compiled layer into three graphs.
        states = {0: state}
        for number, layer in enumerate(tower.encoder.layers[: max(feature_layers)], 1):
            state = layer(state, attention_mask=None)
            if number in feature_layers:
                states[number] = state
        selected = torch.cat([states[number] for number in feature_layers], -1)
        if self.config.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        return self.model.multi_modal_projector(selected)

    def _run_starts(self, input_ids: torch.Tensor, runs: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Return the start of each run of placeholder tokens, (V,), as an index into the flattened (B * L) tokens.

        ``runs``, ascending, and ``sizes``, (V,) each, are the run and the number of tokens of each volume.
        """
        mask = functional.pad(input_ids == self.config.image_token_id, (1, 1))
        edges = (mask[:, 1:] != mask[:, :-1]).nonzero()  # alternating starts and stops
        starts, stops = edges[0::2], edges[1::2]
        lengths = stops[:, 1] - starts[:, 1]
        if len(lengths) != len(sizes) or (runs != torch.arange(len(lengths), device=runs.device)).any():
            example = next((run for run in range(len(lengths)) if run not in runs), None)
            where = "" if example is None else f"; row {int(starts[example, 0])}, run {example} of the batch has none"
            raise ValueError(f"{len(sizes)} volumes for {len(lengths)} runs of placeholders in the batch{where}")
        if (lengths != sizes).any():
            wrong = int((lengths != sizes).nonzero()[0])
            raise ValueError(
                f"row {int(starts[wrong, 0])}, run {wrong} of the batch: {int(lengths[wrong])} placeholders for a"
                f" volume of {int(sizes[wrong])} tokens"
            )
        return starts[:, 0] * input_ids.shape[1] + starts[:, 1]

    def _zero_of_unused_weights(self, pixel_values: dict[str, Any]) -> torch.Tensor | float:
        """Return 0, computed from the trainable vision weights that this batch does not use.

        It connects these weights to the loss, so that all data-parallel ranks compute gradients of the same weights
        through the same layers. Sharded weights are gathered layer by layer and need this.
        """
        unused = [m for name, m in self.embedder.by_modality.items() if name not in pixel_values]
        if not pixel_values:
            unused = [self.model.vision_tower, self.model.multi_modal_projector]
        weights = [p for module in unused for p in module.parameters() if p.requires_grad]
        return 0.0 * sum(p.sum() for p in weights) if weights else 0.0

    @property
    def has_adapters(self) -> bool:
        """Whether the model has PEFT adapters."""
        return bool(getattr(self, "peft_config", None))

    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate one answer per row, see ``GenerationMixin.generate``.

        Raises:
            ValueError: if several beams or sequences per row are requested; ``generate`` would not repeat the volumes.
        """
        config = options.get("generation_config") or self.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name, getattr(config, name, None)) or 1) > 1:
                raise ValueError("num_beams and num_return_sequences stay at 1: repeat the rows for several answers")
        return super().generate(*args, **options)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Save weights as safetensors, and the configuration. ``code.json`` gets the version of UMBRELLA.

        Raises:
            ValueError: the model has adapters.
        """
        if self.has_adapters:
            raise ValueError("the model has adapters; merge them with umbrella.models.build.merge_adapters first")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_version(save_directory)
        shutil.rmtree(Path(save_directory) / ADAPTER, ignore_errors=True)  # may belong to a model saved here before
        # Current parameter names, not LLaVA's older ones.
        super().save_pretrained(save_directory, **{"save_original_format": False} | options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a full checkpoint, or a model that ``save_pretrained`` wrote. With adapters, all weights are frozen.

        Only safetensors files are read, no pickles.

        Raises:
            ValueError: if it is a plain LLaVA or a partial checkpoint.
            UserError: if its version of UMBRELLA is too old.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: options[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in options}
        model_type = PretrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        if model_type != UmbrellaConfig.model_type:
            raise ValueError(
                f"{name} is a {model_type} without volume embedders; umbrella.models.build.build_model adds them"
            )
        check_version(name, **hub)
        if (Path(name) / BASE).is_file():
            raise ValueError(
                f"{name} is a partial checkpoint: it has only the trained weights. umbrella.inference.model.Umbrella"
                ".from_checkpoint loads the full model; its save_pretrained writes a folder with all weights"
            )
        loaded = super().from_pretrained(name, *args, **options | {"use_safetensors": True, "trust_remote_code": False})
        try:
            config = cached_file(name, "adapter_config.json", subfolder=ADAPTER, **hub)
        except OSError:  # no adapters
            return loaded
        cached_file(name, "adapter_model.safetensors", subfolder=ADAPTER, **hub)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(str(Path(config).parent))
        return loaded


def _attention_arguments(attention_mask: torch.Tensor, is_complete: bool) -> dict[str, Any]:
    """Return the arguments of the language model for an attention mask (B, L).

    ``is_complete``: no generation follows, so that no cache is needed.
    """
    # One transfer for both values: each one synchronizes with the GPU.
    is_packed, is_left_padded = torch.stack([(attention_mask > 1).any(), (attention_mask[:, 0] == 0).any()]).tolist()
    if is_packed:
        # Without a mask, transformers separates the samples of a row where position ids restart.
        return {"attention_mask": None, "position_ids": _packed_position_ids(attention_mask), "use_cache": False}
    # Causal attention never reads right padding. Without a mask, a faster kernel for causal attention is used.
    return {"attention_mask": None} if is_complete and not is_left_padded else {}


def _prefix_arguments(
    config: PretrainedConfig, embeddings: torch.Tensor, segments: torch.Tensor, prefix: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments of the language model for ``attention_mask`` and ``prefix`` of ``forward``."""
    sizes = segments.new_zeros(len(segments), segments.shape[1] + 1)
    sizes.scatter_add_(1, segments, (segments > 0).long())

    def is_visible(row: Any, head: Any, query: Any, key: Any) -> Any:
        # Prefix 0 is padding on the right, which causal attention does not reach.
        return (segments[row, key] == segments[row, query]) | (segments[row, key] == prefix[row, query])

    return {
        "attention_mask": create_causal_mask(config, embeddings, None, None, and_mask_function=is_visible),
        "position_ids": _packed_position_ids(segments) + sizes.gather(1, prefix),
        "use_cache": False,
    }


def _packed_position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return position ids (B, L) that restart at 0 with each sample of a row of ``attention_mask`` (B, L)."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
    is_start = functional.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)
    return positions - torch.where(is_start, positions, 0).cummax(1).values


AutoConfig.register(UmbrellaConfig.model_type, UmbrellaConfig)
AutoModelForImageTextToText.register(UmbrellaConfig, UmbrellaForConditionalGeneration)
