"""Figures by matplotlib, an optional package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rapid_llm.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(who_needs: str, width: float, height: float, dpi: float | None = None) -> Figure:
    """Make an empty figure without a window.

    Args:
        who_needs: beginning of the error where matplotlib is missing, such as "the plot needs".
        width, height: size in inches.
        dpi: dots per inch; None for matplotlib's default.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"{who_needs} matplotlib; run: pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def draw_bars(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw samples as bars of their medians with their ranges, one panel for each title.

    Args:
        path: image file to write.
        panels: samples by name, by the title of their panel.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    heights = [len(bars) + 2 for bars in panels.values()] or [2]
    figure = new_figure("--plot needs", 9, 0.3 * sum(heights))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for index, (title, bars) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[index])
        middle = [median(samples) for samples in bars.values()]
        below = [m - min(samples) for m, samples in zip(middle, bars.values(), strict=True)]
        above = [max(samples) - m for m, samples in zip(middle, bars.values(), strict=True)]
        drawn = axes.barh([*bars], middle, xerr=[below, above], color="#4878a8", ecolor="#999999")
        axes.bar_label(drawn, fmt="%.3g", padding=6, fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=150)
