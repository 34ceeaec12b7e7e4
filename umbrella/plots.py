"""What pictures share: colours, letters, sizes, and the way into a page.

Colours are those of Okabe and Ito, which the colour-blind tell apart.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, SOFT, INK = "#98A2B3", "#667085", "#1D2430"
LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY)
STYLE = {
    "text.parse_math": False,  # people's words may hold dollar signs
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E6EB",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
File = TypeVar("File", Path, BytesIO)
WIDTH, DPI = 9.0, 160


def save_png(file: File, draw: Callable[..., "Figure"], *about: Any) -> File:
    """Draw a figure of ``new_figure`` as a PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw(*about).savefig(file, dpi=DPI, format="png")
    return file


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot: this one keeps no state, and draws without a screen

    return Figure(figsize=(width, height), layout="constrained")


def truncate(words: str, most: int) -> str:
    """At most so many letters."""
    return words if len(words) <= most else f"{words[: most - 1]}…"


def png_data_url(png: bytes) -> tuple[str, int]:
    """The address that holds a PNG itself, and the width in a page at which all pictures' letters are of one size."""
    pixels = int.from_bytes(png[16:20], "big")  # of a PNG's first chunk
    return "data:image/png;base64," + base64.b64encode(png).decode(), round(pixels * 1190 / WIDTH / DPI)


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
