"""A run's curves as one picture."""

import io
from collections.abc import Mapping, Sequence

MOST = 2000
"""Points of a curve that are drawn; a longer one is thinned out."""


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], title: str) -> bytes:
    """A PNG with a panel for each entry: its name to curves, each a name to (step, value) points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(rows, panels.items(), strict=True):
        for label, points in lines.items():
            thinned = points[:: max(1, len(points) // MOST)]
            steps, values = [step for step, _ in thinned], [value for _, value in thinned]
            axes.plot(steps, values, "o-" if len(points) < 40 else "-", markersize=4, label=label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    axes.set_xlabel("step")
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    return png.getvalue()
