"""Two kinds of charts: methods one below the other, and lines over a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rapid_llm.evaluation.intervals import Interval
from rapid_llm.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart with every kind of colour vision, without its pale yellow; one
# marker more, so that no pair comes twice.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX*"
_GREY = "#666666"

Point = tuple[float, Interval]


@dataclass(frozen=True)
class Bar:
    """A method's value, with what is written beside it."""

    method: str
    value: Interval
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A label and its points, from left to right."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """One of the axes of a figure.

    Attributes:
        label: of the values, with their unit.
        reference: a value that the others are to be seen against, with its name.
    """

    label: str
    reference: tuple[str, Interval] | None = None


def bars(panels: Sequence[tuple[Panel, Sequence[Bar]]], title: str) -> Figure:
    """Methods from top to bottom, a panel a quantity beside each other.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(bar.method for _, some in panels for bar in some))
    figure = _figure(4.2 * len(panels) + 2, 1.5 + 0.3 * len(names))
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    first: Axes | None = None
    for index, (panel, some) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1, sharey=first)
        first = first or axes
        for bar in some:
            _interval(axes, bar.value, names.index(bar.method), _COLOURS[index])
            if bar.note:
                right = max(bar.value.value, bar.value.high)
                axes.annotate(
                    bar.note,
                    (right if right == right else bar.value.value, names.index(bar.method)),
                    (7, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        _reference(axes, panel, vertical=True)
        axes.set_xlabel(panel.label, fontsize=9)
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.tick_params(axis="y", labelleft=index == 0, length=0, pad=8)
        axes.grid(axis="both", color="#e6e6e6")
    assert first is not None
    first.set_ylim(len(names) - 0.4, -0.6)
    _legend(figure)
    return figure


def lines(
    panels: Sequence[tuple[Panel, Sequence[Line]]],
    xlabel: str,
    title: str,
    *,
    logarithmic: bool = False,
) -> Figure:
    """Lines over a number, a panel a quantity one below the other.

    Args:
        logarithmic: powers of two of the number are equally far apart.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    labels = list(dict.fromkeys(line.label for _, some in panels for line in some))
    figure = _figure(8, 0.8 + 2.5 * len(panels))
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    positions = sorted({x for _, some in panels for line in some for x, _ in line.points})
    # Lines of the same abscissa are set side by side, so that their intervals can be seen.
    span = (positions[-1] - positions[0]) or 1
    first: Axes | None = None
    for index, (panel, some) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1, sharex=first)
        first = first or axes
        for line in some:
            number = labels.index(line.label)
            shift = 0.008 * (number - (len(labels) - 1) / 2)
            xs = [x * (1 + shift) if logarithmic else x + shift * span for x, _ in line.points]
            values = [value for _, value in line.points]
            axes.errorbar(
                xs,
                [value.value for value in values],
                yerr=_errors(values),
                label=line.label,
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle="-" if number < len(_COLOURS) else "--",
                markersize=5,
                linewidth=1.5,
                elinewidth=1,
                capsize=2,
            )
        _reference(axes, panel, vertical=False)
        axes.set_ylabel(panel.label, fontsize=9)
        axes.grid(color="#e6e6e6")
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xticks(positions, [f"{x:,g}" for x in positions], fontsize=9)
        axes.tick_params(axis="x", labelbottom=index == len(panels) - 1)
        axes.minorticks_off()
    assert first is not None
    figure.axes[-1].set_xlabel(xlabel, fontsize=9)
    _legend(figure)
    return figure


def _figure(width: float, height: float) -> Figure:
    return new_figure("a report's plots need", width, height, dpi=150)


def _interval(axes: Axes, value: Interval, at: float, colour: str) -> None:
    axes.errorbar(
        [value.value],
        [at],
        xerr=_errors([value]),
        fmt="o",
        color=colour,
        elinewidth=1.5,
        capsize=3,
        clip_on=False,  # a dot at 0 is whole
    )


def _errors(values: Sequence[Interval]) -> list[list[float]]:
    """Downwards and upwards; nan, which is not drawn, where nothing is known."""
    return [[v.value - v.low for v in values], [v.high - v.value for v in values]]


def _reference(axes: Axes, panel: Panel, *, vertical: bool) -> None:
    if panel.reference is None:
        return
    name, value = panel.reference
    draw, band = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
    draw(value.value, color=_GREY, linestyle="--", linewidth=1, zorder=1, label=name)
    band(value.low, value.high, color=_GREY, alpha=0.12, linewidth=0, zorder=0)


def _legend(figure: Figure) -> None:
    """Beside the data, each label once."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_axisbelow(True)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside right upper",
            fontsize=8,
            frameon=False,
            handlelength=3,
        )
