"""UMBRELLA: train LLaVA-style models that read brain MRI, and find out which training choices work.

The import of this package is fast: modules import torch and ray only if they need them, and the class ``Umbrella``,
a trained model that answers questions, at its first use.
"""

from typing import TYPE_CHECKING, Any

from umbrella.version import __version__

if TYPE_CHECKING:
    from umbrella.inference.model import Umbrella

__all__ = ["Umbrella", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Umbrella":
        from umbrella.inference.model import Umbrella

        return Umbrella
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
