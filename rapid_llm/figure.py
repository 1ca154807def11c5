"""matplotlib, an optional package, for those who draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rapid_llm.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(who_needs: str, width: float, height: float, dpi: float | None = None) -> Figure:
    """An empty figure, in inches, that belongs to no window.

    Raises:
        MissingDependencyError: matplotlib is not installed; begins with ``who_needs``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"{who_needs} matplotlib; run: pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")
