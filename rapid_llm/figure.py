"""Make matplotlib figures; matplotlib is an optional package."""

from __future__ import annotations

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
