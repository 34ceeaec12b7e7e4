"""What Ray's dashboard calls the actor of a trial."""

from collections.abc import Callable
from typing import Any

from umbrella.tuning.space import label


class Labelled:
    """Mixed into Ray Tune's actor: its name is the trial's label, as in MLflow, and not the trial function's."""

    _name: str

    def setup(self, config: dict[str, Any]) -> None:
        """What Ray Tune calls as the actor is made, just before Ray asks for its name."""
        self._name = label(config)
        super().setup(config)  # type: ignore[misc]


def labelled(trial: Callable[..., None]) -> Callable[..., None]:
    """A trial function whose actors bear their trials' labels."""
    trial.__mixins__ = (Labelled,)  # type: ignore[attr-defined]
    return trial
