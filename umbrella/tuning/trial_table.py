"""Tables of trials for the terminal: of a running sweep, and of its ranking."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from umbrella.plots import shorten
from umbrella.tuning.results import Configuration, format_interval, ranked_trials, with_seeds
from umbrella.tuning.search_space import format_point, format_value, short_name
from umbrella.tuning.sweep_files import STOPPED

MAX_RANKED = 25
"""Maximum number of rows of a ranking."""
GAP, LEAST = 2, 6
"""Characters between two columns of a table, and the least width of the column of a setting."""


def trial_table(points: Sequence[Mapping[str, Any]], others: Mapping[str, Sequence[str]], width: int) -> Table:
    """Make a table with a column for each setting that differs between the points, and other columns.

    Names and values of settings are shortened in the middle to fit into the width, but only so far that different ones
    stay different. A cell that is still too long continues on the next line.

    Args:
        others: header to cells, one for each point.
        width: of the terminal, in characters.
    """
    others = {"/\n".join(name.rsplit("/", 1)): cells for name, cells in others.items()}
    names = dict.fromkeys(name for point in points for name in point)
    settings = {name: [format_value(point[name]) if name in point else "–" for point in points] for name in names}
    settings = {short_name(name, names): cells for name, cells in settings.items() if len(set(cells)) > 1}
    settings = settings or {"trial": [format_point(point) for point in points]}
    free = width - sum(GAP + _width(name, cells) for name, cells in others.items())
    widths = {name: _width(name, cells) for name, cells in settings.items()}
    narrow = [w for w in widths.values() if w <= free // len(settings) - GAP]
    most = (free - sum(narrow) - GAP * len(narrow)) // max(1, len(settings) - len(narrow)) - GAP
    most = max(LEAST, most, *narrow)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.title_justify = table.caption_justify = "left"
    for name in shorten(list(settings), most):
        table.add_column(name, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name in ("state", "trials") else "right", overflow="fold")
    for row in zip(*(shorten(cells, most) for cells in settings.values()), *others.values(), strict=True):
        table.add_row(*row)
    return table


def _width(name: str, cells: Iterable[str]) -> int:
    return max(map(len, [*name.split("\n"), *cells]))


def short_state(state: str) -> str:
    """The state of a trial in at most 13 characters."""
    return "ended by ASHA" if state == STOPPED else state


def ranking_table(configurations: Sequence[Configuration], metric: str, width: int) -> Table:
    """The best rows of the ranking: configurations if there are several seeds, otherwise trials."""

    def four(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    points: list[Mapping[str, Any]]
    if with_seeds(configurations):
        title, shown = "settings, best first", configurations[:MAX_RANKED]
        points, count = [c.point for c in shown], len(configurations)
        columns = {
            "trials": [c.state_counts for c in shown],
            "eval/loss": [four(c.loss) for c in shown],
            f"{metric}: mean ± 95%": [format_interval(c) for c in shown],
        }
    else:
        trials = ranked_trials(configurations)
        title, best = "trials, best first", trials[:MAX_RANKED]
        points, count = [t.point for t in best], len(trials)
        columns = {
            "state": [short_state(t.state) for t in best],
            "step": [four(t.step) for t in best],
            "eval/loss": [four(t.loss) for t in best],
            metric: [four(t.metric) for t in best],
        }
    table = trial_table(points, columns, width)
    table.title, table.caption = title, f"and {count - MAX_RANKED} more" if count > MAX_RANKED else None
    return table
