"""Less memory or less time for the same numbers: activations computed anew, and layers compiled."""

from typing import Any

from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import TrainSettings

LONGEST_ROW = 8192
"""Features that a norm of a compiled layer reads in one go."""


def apply_options(model: UmbrellaForConditionalGeneration, settings: TrainSettings) -> None:
    """Set up the layers of tower and language model as ``checkpoint_activations`` and ``compile`` say. In place.

    Names of weights do not change. Both work in training mode; compiled layers are compiled anew for evaluation.
    """
    if settings.checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers has word vectors require gradients here, which only re-entrant checkpoints need.
        model.disable_input_require_grads()
    if settings.compile:
        _read_rows_once()
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            # Batches differ in size and length: without this, each of the first few would be compiled for.
            layer.compile(dynamic=True)


def _read_rows_once() -> None:
    """Have norms over more than 1,024 features compiled like those of fewer: each row read once, and held.

    torch's own choice is a loop over the row, which took three times as long for the 1,152 of SigLIP.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction:
                return V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    V.set_choices_handler(Choices())
