"""The chart of cuda_model.py: tokens a second against the context, and against the answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chart import COLOR, FAINT, PEER_COLORS, pyplot, save


def points(rows: list[dict[str, Any]], across: str) -> list[tuple[int, float]]:
    """(`across` of the run, tokens a second in sum) of what worked."""
    result = []
    for row in rows:
        report = row["report"] or {}
        speed = report.get("decode_tokens_per_second_in_sum") or report.get("decode_tokens_per_second")
        if speed:
            result.append((row["run"][across], speed["mean"]))
    return sorted(result)


def draw_growth(model: dict[str, Any], path: Path) -> None:
    # Those are for prefill: 32 tokens are few of any context, 1642 the peers' prompt.
    contexts = [point for point in points(model["contexts"], "prompt") if point[0] not in (32, 1642)]
    batches = points(model["batches"], "batch")
    peers = {"llama.cpp, another day": {int(k): v for k, v in model["llama_cpp_decode"].items() if int(k)}}
    if model["executorch_decode"]:
        peers["ExecuTorch, same run"] = {512: model["executorch_decode"]}
    panels = [
        (contexts, "context, tokens", "tok/s, one answer", peers),
        (batches, "answers at once", "tok/s in sum", {}),
    ]
    panels = [panel for panel in panels if len(panel[0]) > 1]
    if not panels:
        return
    figure, row = pyplot().subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3), squeeze=False, layout="constrained"
    )
    for axes, (drawn, across, unit, others) in zip(row[0], panels, strict=True):
        places, speeds = zip(*drawn, strict=True)
        axes.plot(places, speeds, marker="o", markersize=4, color=COLOR)
        for place, speed in drawn:
            axes.annotate(
                f"{speed:.0f}", (place, speed), (0, 6), textcoords="offset points", ha="center", color=COLOR
            )
        for color, (label, values) in zip(PEER_COLORS, others.items(), strict=False):
            inside = {place: v for place, v in values.items() if places[0] <= place <= places[-1]}
            axes.plot(list(inside), list(inside.values()), "s", markersize=4, color=color)
            for place, speed in inside.items():
                axes.annotate(
                    f"{label}: {speed:.0f}",
                    (place, speed),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    color=color,
                )
        axes.set_xscale("log", base=2)
        names = [f"{place / 1024:.0f} k" if place >= 1024 else str(place) for place in places]
        axes.set_xticks(places, names)
        axes.minorticks_off()
        axes.set_ylim(0, 1.15 * max(speeds))
        axes.margins(x=0.08)
        axes.grid(axis="y", color=FAINT, alpha=0.25)
        axes.set_xlabel(across)
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Decode on one {model['card']}", x=0.01, ha="left", fontsize=10)
    save(figure, path)
