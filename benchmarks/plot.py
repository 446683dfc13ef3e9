"""Draws what `cuda_kernels.py --json` measured: python benchmarks/plot.py FILE [--output FOLDER].

A chart a phase, <phase>_kernels.svg: the time that each kernel takes of a decode step or of a prefill chunk,
all its calls together, and beside it what it reaches, of the card's own peak in whichever is nearer to it:
bandwidth or arithmetic. Needs matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parent / "figures"
COLOR = "#4477aa"


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


def draw(drawn: list[Bar], heading: str, path: Path) -> None:
    """Writes the chart; the same bars give the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "qwen_runner", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.27 * len(drawn)), layout="constrained")
    axes.barh([bar.kernel for bar in drawn], [bar.us for bar in drawn], color=COLOR)
    for row, bar in enumerate(drawn):
        axes.annotate(bar.label, (bar.us, row), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * drawn[0].us)  # room for the longest bar's label
    axes.set_xlabel("µs, all calls")
    axes.set_title(heading, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="+", help="written by cuda_kernels.py --json")
    parser.add_argument("--copy", type=float, help="TB/s of a copy on this card, if not what the file says")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the charts")
    arguments = parser.parse_args()
    for file in arguments.file:
        measured = json.loads(file.read_text(encoding="utf-8"))
        if arguments.copy:
            measured["copy"] = arguments.copy * 1e12
        for phase in dict.fromkeys(row["phase"] for row in measured["rows"]):
            rows = [row for row in measured["rows"] if row["phase"] == phase]
            drawn = bars(rows, measured["copy"], measured["bf16"])
            if drawn:
                path = arguments.output / f"{phase.split(',')[0]}_kernels.svg"
                draw(drawn, title(phase.capitalize(), sum(bar.us for bar in drawn), measured), path)
                print(path)


if __name__ == "__main__":
    main()
