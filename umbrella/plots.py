"""Style of figures, and functions to save them.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. On all pages, blue is a measured
value, green the best or right, vermilion failed, wrong or unusual, and grey a reference; page.html has the legend. The
other colours distinguish the lines of one figure, which names them.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, SOFT, INK = "#98A2B3", "#667085", "#1D2430"
LINES = (BLUE, ORANGE, PURPLE, SKY, INK)
STYLE = {
    "text.parse_math": False,  # labels may contain dollar signs
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {list(LINES)})",
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


def save_png(file: File, draw: Callable[..., "Figure"], *arguments: Any) -> File:
    """Save the figure that ``draw(*arguments)`` returns as a PNG, and return ``file``."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw(*arguments).savefig(file, dpi=DPI, format="png")
    return file


def new_figure(width: float, height: float) -> "Figure":
    """Create an empty figure. Sizes are in inches."""
    from matplotlib.figure import Figure  # unlike pyplot it has no global state and needs no display

    return Figure(figsize=(width, height), layout="constrained")


def truncate(text: str, length: int) -> str:
    """Shorten a text in the middle to at most ``length`` characters."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def shorten(texts: Sequence[str], length: int) -> list[str]:
    """Truncate texts to ``length`` characters, or to the next length at which different texts stay different."""
    for size in range(length, max(map(len, texts), default=0)):
        short = [truncate(text, size) for text in texts]
        if len(set(short)) == len(set(texts)):
            return short
    return list(texts)


def png_data_url(png: bytes) -> tuple[str, int]:
    """Return a data URL of a PNG, and the width in pixels at which all figures of a page have the same font size."""
    pixels = int.from_bytes(png[16:20], "big")  # the width in the PNG header
    return "data:image/png;base64," + base64.b64encode(png).decode(), round(pixels * 1190 / WIDTH / DPI)


MAX_POINTS = 2000
"""Largest number of points of a curve; more points are thinned out."""


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], title: str) -> bytes:
    """Plot curves over steps as a PNG.

    Args:
        panels: name of a panel to its curves, each of which is a label to its (step, value) points.
    """

    def draw() -> "Figure":
        figure = new_figure(7, 2.3 * len(panels))
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (name, lines) in zip(rows, panels.items(), strict=True):
            for label, points in lines.items():
                thinned = points[:: max(1, len(points) // MAX_POINTS)]
                axes.plot(*zip(*thinned, strict=True), "o-" if len(points) < 40 else "-", markersize=4, label=label)
            axes.set_ylabel(name)
            if len(lines) > 1:
                axes.legend()
        axes.set_xlabel("step")
        figure.suptitle(title)
        return figure

    return save_png(BytesIO(), draw).getvalue()
