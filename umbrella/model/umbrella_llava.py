"""The model: transformers' LLaVA, reading volumes through a 3D/4D embedder in place of the tower's 2D one."""

import copy
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
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
from umbrella.model.token_nll import supervised, token_nll
from umbrella.model.volume_embedder import VolumeEmbedder
from umbrella.version import check_version, write_version

ADAPTER = "adapter"
"""The folder beside a saved model's weights that holds its adapters, as PEFT saves them."""
BASE = "base.json"
"""Says, beside weights that are not all of a model, which checkpoint has the others: see ``partial``."""


class UmbrellaConfig(LlavaConfig):
    """A LLaVA configuration, the modalities that the model has an embedder for, and what it was trained on.

    Args:
        umbrella_modalities: name to grid and patch of each modality.
        trained_modalities: names of the modalities that occur in the training data; None where this is not recorded.
        longest_answer: tokens of the longest assistant turn in the training data, with its end of turn.
    """

    model_type = "umbrella_llava"

    umbrella_modalities: dict[str, Any] | None = None
    trained_modalities: list[str] | None = None
    longest_answer: int | None = None

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities as their own type."""
        return {name: Modality.model_validate(raw) for name, raw in (self.umbrella_modalities or {}).items()}

    @property
    def known_modalities(self) -> dict[str, Modality]:
        """The modalities that the model was trained on; all of its modalities where this is not recorded."""
        trained = self.trained_modalities
        return {name: m for name, m in self.modalities.items() if trained is None or name in trained}


@dataclass
class UmbrellaOutput(ModelOutput):
    """token_nll (B, L), float32: the negative log likelihood of each token that has a loss weight, 0 elsewhere."""

    token_nll: torch.Tensor | None = None


class UmbrellaForConditionalGeneration(LlavaForConditionalGeneration):
    """Reads volumes and text, and says how likely each supervised token is.

    1. input_ids (B, L)                                → word vectors (B, L, d)
    2. each modality's voxels (n, *grid)               → embedder (n, tokens, w) → tower → projector (n, tokens, d)
    3. features of all modalities are put at the placeholder runs they stand at
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

    @property
    def feature_layers(self) -> list[int]:
        """After how many of the tower's layers its states are read; those behind the last of them are not run."""
        read = self.config.vision_feature_layer
        count = len(self.model.vision_tower.encoder.layers)
        return [layer % (count + 1) for layer in ([read] if isinstance(read, int) else read)]

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
        # All that reads numbers from the GPU comes before its long work: each reading waits until that is done.
        where = None if loss_weights is None else supervised(loss_weights)
        cache = generation.get("past_key_values")
        if input_ids is not None and (cache is None or not cache.get_seq_length()):  # not the next word of an answer
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                inputs |= _attending(attention_mask, complete=loss_weights is not None)
            inputs |= {"input_ids": None, "inputs_embeds": self.embed_inputs(input_ids, pixel_values or {})}
        if loss_weights is None:
            return super().forward(**generation | inputs)
        assert input_ids is not None
        hidden = self.model(**inputs | {"use_cache": False})[0]
        return UmbrellaOutput(token_nll=token_nll(hidden, self.lm_head.weight, input_ids, loss_weights, where=where))

    def embed_inputs(self, input_ids: torch.Tensor, pixel_values: dict[str, Any]) -> torch.Tensor:
        """Word vectors (B, L, d) with the volumes' projected features at the placeholders."""
        words = self.get_input_embeddings()(input_ids)
        if self.training:
            words = words + self._anchor(pixel_values)
        run = torch.cat([input_ids.new_empty(0), *(group.run for group in pixel_values.values())])
        sizes = [
            group.run.new_full(group.run.shape, self._tokens(n, group.voxels)) for n, group in pixel_values.items()
        ]
        order = torch.argsort(run)
        starts = self._starts(input_ids, run[order], torch.cat([run[:0], *sizes])[order])
        if not pixel_values:
            return words
        features, places = [], []
        for name, group in pixel_values.items():
            part = self.volume_features(name, group.voxels)
            features.append(part.flatten(0, 1))
            places.append((starts[group.run][:, None] + torch.arange(part.shape[1], device=run.device)).flatten())
        flat = words.flatten(0, 1).index_copy(0, torch.cat(places), torch.cat(features).to(words.dtype))
        return flat.view_as(words)

    def _tokens(self, name: str, voxels: torch.Tensor) -> int:
        """How many tokens each of these volumes becomes."""
        modality: Any = self.embedder.by_modality[name]
        patches = prod(size // step for size, step in zip(voxels.shape[1:], modality.patch, strict=True))
        dropped = self.config.vision_feature_select_strategy == "default"
        return patches + (self.embedder.class_embedding is not None) - dropped

    def volume_features(self, name: str, voxels: torch.Tensor) -> torch.Tensor:
        """One modality's volumes (n, *grid) through tower and projector: (n, tokens, d).

        Which layer of the tower is read, and whether its class token stays, is the configuration's
        ``vision_feature_layer`` and ``vision_feature_select_strategy``.
        """
        tower, read = self.model.vision_tower, self.feature_layers
        state = tower.embeddings((name, voxels))
        if hasattr(tower, "pre_layrnorm"):  # CLIP's, and its spelling
            state = tower.pre_layrnorm(state)
        # Layer by layer, since what transformers does to note all states breaks a compiled layer into three.
        states = {0: state}
        for number, layer in enumerate(tower.encoder.layers[: max(read)], 1):
            state = layer(state, attention_mask=None)
            if number in read:
                states[number] = state
        selected = torch.cat([states[number] for number in read], -1)
        if self.config.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        return self.model.multi_modal_projector(selected)

    def _starts(self, input_ids: torch.Tensor, runs: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Where each run of placeholders begins, (V,), in the rows laid end to end.

        ``runs`` (V,), rising, and ``sizes`` (V,): at which of them the volumes stand, and how many tokens they are.
        """
        mask = functional.pad(input_ids == self.config.image_token_id, (1, 1))
        edges = (mask[:, 1:] != mask[:, :-1]).nonzero()  # where a run starts, where it stops, and so on
        starts, stops = edges[0::2], edges[1::2]
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
        return starts[:, 0] * input_ids.shape[1] + starts[:, 1]

    def _anchor(self, pixel_values: dict[str, Any]) -> torch.Tensor | float:
        """Zero, made of the weights that this batch leaves out, for the word vectors.

        So the backward passes of data-parallel workers reach the same weights through the same layers, whatever their
        batches hold: with sharded weights each layer is gathered on its way.
        """
        absent = [m for name, m in self.embedder.by_modality.items() if name not in pixel_values]
        if not pixel_values:
            absent = [self.model.vision_tower, self.model.multi_modal_projector]
        weights = [p for module in absent for p in module.parameters() if p.requires_grad]
        return 0.0 * sum(p.sum() for p in weights) if weights else 0.0

    @property
    def has_adapters(self) -> bool:
        """Whether PEFT has put adapters into the model."""
        return bool(getattr(self, "peft_config", None))

    def generate(self, *args: Any, **options: Any) -> Any:
        """As in transformers, with one answer for each row.

        Raises:
            ValueError: several beams or answers for each row are asked for, and volumes would not follow.
        """
        config = options.get("generation_config") or self.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name, getattr(config, name, None)) or 1) > 1:
                raise ValueError("num_beams and num_return_sequences stay at 1: repeat the rows for several answers")
        return super().generate(*args, **options)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write weights and configuration as safetensors and JSON; adapters apart, in ``adapter/``, as PEFT does.

        ``code.json`` says which version of UMBRELLA wrote them.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_version(save_directory)
        options = {"save_original_format": False} | options  # weights by their names here, not by LLaVA's older ones
        adapter = Path(save_directory) / ADAPTER
        shutil.rmtree(adapter, ignore_errors=True)  # what another model has left there is not this one's
        if not self.has_adapters:
            return super().save_pretrained(save_directory, **options)
        super().save_pretrained(adapter, **options | {"max_shard_size": "1TB"})  # adapters alone; PEFT reads one file
        own = {k.replace(".base_layer.", "."): w for k, w in self.state_dict().items() if ".lora_" not in k}
        save_torch_state_dict(
            own,
            save_directory,
            max_shard_size=options.get("max_shard_size", "50GB"),  # as in transformers
            shared_tensors_to_discard=list(self.all_tied_weights_keys),
        )
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.save_pretrained(save_directory)
        if self.generation_config:
            self.generation_config.save_pretrained(save_directory)
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """A model that ``save_pretrained`` wrote, with its adapters. With adapters, no weight moves until told to.

        Only safetensors are read: nothing is unpickled.

        Raises:
            ValueError: a plain LLaVA, which ``presets.build_model`` makes a model of; a checkpoint that holds only what
                was trained, which ``loading.load_trained`` does.
            UserError: a version of UMBRELLA that is too old wrote it.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: options[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in options}
        kind = PretrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        if kind != UmbrellaConfig.model_type:
            raise ValueError(f"{name} is a {kind} without volume embedders; presets.build_model gives it some")
        check_version(name, **hub)
        if (Path(name) / BASE).is_file():
            raise ValueError(
                f"{name} holds only what was trained, not the base that it stands on;"
                " umbrella.model.build.load_trained makes the whole model, and its save_pretrained a folder for here"
            )
        loaded = super().from_pretrained(name, *args, **options | {"use_safetensors": True, "trust_remote_code": False})
        try:
            config = cached_file(name, "adapter_config.json", subfolder=ADAPTER, **hub)
        except OSError:  # it has no adapters
            return loaded
        cached_file(name, "adapter_model.safetensors", subfolder=ADAPTER, **hub)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(str(Path(config).parent))
        return loaded


def _attending(attention_mask: torch.Tensor, complete: bool) -> dict[str, Any]:
    """How a mask (B, L) is told to the language model. ``complete``: no words will follow, and no cache is needed."""
    # Read in one go: each reading waits for the GPU.
    packed, left = torch.stack([(attention_mask > 1).any(), (attention_mask[:, 0] == 0).any()]).tolist()
    if packed:
        # transformers tells the samples of a row apart by where positions start anew, if it gets no mask.
        return {"attention_mask": None, "position_ids": packed_position_ids(attention_mask), "use_cache": False}
    # What stands before padding never looks at it. Without a mask attention knows that it is causal, and is faster.
    return {"attention_mask": None} if complete and not left else {}


def packed_position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) that start at 0 with each sample of a row, for a mask (B, L) that numbers the samples."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
    begins = functional.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(1).values


AutoConfig.register(UmbrellaConfig.model_type, UmbrellaConfig)
AutoModelForImageTextToText.register(UmbrellaConfig, UmbrellaForConditionalGeneration)
