"""UMBRELLA: train LLaVA-style models that read brain MRI, and find out which training choices work.

Importing this package stays cheap: neither torch nor ray is loaded until a room that needs them is. ``Umbrella``, a
trained model that answers questions, is loaded when it is asked for.
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
