"""Less memory or less time for the same numbers: activations computed anew, and layers compiled."""

from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import TrainSettings


def apply_options(model: UmbrellaForConditionalGeneration, settings: TrainSettings) -> None:
    """Set up the layers of tower and language model as ``checkpoint_activations`` and ``compile`` say. In place.

    Names of weights do not change. Both work in training mode; compiled layers are compiled anew for evaluation.
    """
    if settings.checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers has word vectors require gradients here, which only re-entrant checkpoints need.
        model.disable_input_require_grads()
    if settings.compile:
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            # Batches differ in size and length: without this, each of the first few would be compiled for.
            layer.compile(dynamic=True)
