"""The charts of cuda_kernels.py: what each kernel takes of a decode step or of a prefill chunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chart import COLOR, pyplot, save


@dataclass(frozen=True)
class Bar:
    kernel: str
    us: float  # of all calls
    label: str


def bars(rows: list[dict[str, Any]], copy: float, bf16: float) -> list[Bar]:
    """A bar a kernel that the step calls, the longest first.

    Args:
        copy: the card's measured bytes a second.
        bf16: its measured operations a second.
    """
    result = []
    for row in rows:
        if not row["calls"]:
            continue
        seconds = row["us"] * 1e-6
        bandwidth, arithmetic = row["bytes"] / seconds, row["operations"] / seconds
        if bandwidth > copy:  # more than memory gives: one set of arguments stays in the L2 cache
            reached = f"{bandwidth / 1e12:.2f} TB/s with the L2 cache"
        elif bandwidth / copy >= arithmetic / bf16:
            reached = f"{bandwidth / 1e12:.2f} TB/s, {bandwidth / copy:.0%} of peak"
        else:
            reached = f"{arithmetic / 1e12:.0f} TFLOP/s, {arithmetic / bf16:.0%} of peak"
        calls = f"{row['calls']} × " if row["calls"] > 1 else ""
        result.append(Bar(row["kernel"], row["us"] * row["calls"], f"{calls}{row['us']:.1f} µs, {reached}"))
    return sorted(result, key=lambda bar: -bar.us)


def title(phase: str, total_us: float, measured: dict[str, Any]) -> str:
    peak = f"{measured['copy'] / 1e12:.2f} TB/s copied, {measured['bf16'] / 1e12:.0f} TFLOP/s in bfloat16"
    return f"{phase}: {total_us / 1e3:.2f} ms of kernels on one {measured['card']}\n(its own peaks: {peak})"


def draw_bars(drawn: list[Bar], heading: str, path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(9, 0.9 + 0.27 * len(drawn)), layout="constrained")
    axes.barh([bar.kernel for bar in drawn], [bar.us for bar in drawn], color=COLOR)
    for row, bar in enumerate(drawn):
        axes.annotate(bar.label, (bar.us, row), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * drawn[0].us)  # room for the longest bar's label
    axes.set_xlabel("µs, all calls")
    axes.set_title(heading, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_kernels(measured: dict[str, Any], folder: Path) -> None:
    for phase in dict.fromkeys(row["phase"] for row in measured["rows"]):
        rows = [row for row in measured["rows"] if row["phase"] == phase]
        drawn = bars(rows, measured["copy"], measured["bf16"])
        if drawn:
            heading = title(phase.capitalize(), sum(bar.us for bar in drawn), measured)
            draw_bars(drawn, heading, folder / f"{phase.split(',')[0]}_kernels.svg")
