"""Charts of a layer's kernels as bars of a timeline, a panel a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chart import COLOR, FAINT, pyplot, save

SHADES = ("#c6d6e8", COLOR, "#10305c")  # from none of the peak to all of it


@dataclass(frozen=True)
class Bar:
    """A kernel of a layer, in µs since the end of the layer before."""

    kernel: str
    start: float
    end: float
    added: float  # from the latest end before it to its own: a layer's sum is its length
    share: float | None  # of the card's peak while it adds to the layer; None where there is no saying
    label: str


@dataclass(frozen=True)
class Panel:
    title: str
    bars: list[Bar]


def timed_layer(kernels: Sequence[dict[str, Any]], begin: int, end: int) -> list[dict[str, Any]]:
    """Those kernels of a timeline, since the end of what ran before them, with what each adds."""
    latest = origin = max((kernel["end"] for kernel in kernels[:begin]), default=kernels[begin]["start"])
    timed = []
    for kernel in kernels[begin:end]:
        added = max(0.0, kernel["end"] - latest)
        latest = max(latest, kernel["end"])
        timed.append(
            {
                "kind": kernel["kind"],
                "start": kernel["start"] - origin,
                "end": kernel["end"] - origin,
                "added": added,
            }
        )
    return timed


def median_layer(layers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """That of median length."""
    lengths = [sum(kernel["added"] for kernel in layer) for layer in layers]
    return layers[sorted(range(len(layers)), key=lengths.__getitem__)[(len(layers) - 1) // 2]]


def draw_panels(panels: list[list[Panel]], unit: str, peak: str, path: Path) -> None:
    """A row of panels a list, all rows alike; those of a column have one scale.

    Args:
        unit: of the time, what it is since, and what a pale bar means.
        peak: what shades are the shares of.
    """
    plt = pyplot()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = LinearSegmentedColormap.from_list("share", SHADES)
    norm = Normalize(0, 100)
    columns = len(panels[0])
    most = [max(len(panel.bars) for panel in row) for row in panels]
    figure, grid = plt.subplots(
        len(panels),
        columns,
        figsize=(9 if columns == 1 else 6.5 * columns, 0.9 + sum(0.55 + 0.2 * count for count in most)),
        sharex="col",
        squeeze=False,
        layout="constrained",
        height_ratios=most,
    )
    for row, axes_row in zip(panels, grid, strict=True):
        for panel, axes in zip(row, axes_row, strict=True):
            for place, bar in enumerate(panel.bars):
                color = FAINT if bar.share is None else shades(norm(100 * bar.share))
                # What comes before its own part is beside the kernel before, or waits for it.
                alone = max(bar.end - bar.added, bar.start)
                axes.barh(place, bar.end - bar.start, left=bar.start, color=color, alpha=0.3)
                axes.barh(place, bar.end - alone, left=alone, color=color)
                axes.annotate(bar.label, (bar.end, place), (4, 0), textcoords="offset points", va="center")
            axes.set_yticks(range(len(panel.bars)), [bar.kernel for bar in panel.bars])
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(panel.title, loc="left", fontsize=10)
    for column in range(columns):
        bars = [bar for row in panels for bar in row[column].bars]
        first, longest = min(0.0, *(bar.start for bar in bars)), max(bar.end for bar in bars)
        # Room for the last bar's label, of which a narrower panel takes more.
        grid[-1, column].set_xlim(1.05 * first, (1.3 if columns == 1 else 1.5) * longest)
        grid[-1, column].set_xlabel(unit)
    colors = figure.colorbar(ScalarMappable(norm, shades), ax=grid.ravel().tolist(), aspect=30, pad=0.01)
    colors.set_label(peak)
    colors.outline.set_visible(False)
    save(figure, path)
