"""The chart of prefill_timeline.py: when the kernels of one layer of a prompt run, and how fast each is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chart_layers import Bar, Panel, draw_panels, median_layer, timed_layer
from prefill_kinds import layers

NAMES = {"delta": "A DeltaNet layer", "attention": "An attention layer"}
LENGTHS = (1642, 8192)  # a column each
LEAST = 0.02  # of a copy's speed, to be worth a label


def bar(kernel: dict[str, Any], kind: dict[str, Any], copy: float, bf16: float) -> Bar:
    """Labelled with its arithmetic's speed and, where that is nearer to the card's, its memory's."""
    added, seconds = kernel["added"], kernel["added"] * 1e-6 * kind["calls"]
    label, share = f"{added:.1f} µs", 0.0
    if added > 0:
        arithmetic, bandwidth = kind["operations"] / seconds, kind["bytes"] / seconds
        share = max(arithmetic / bf16, bandwidth / copy)
        if arithmetic:
            label += f", {arithmetic / 1e12:.0f} TFLOP/s"
        if bandwidth / copy > max(arithmetic / bf16, LEAST):
            label += f", {bandwidth / 1e12:.2f} TB/s"
    return Bar(kernel["kind"], kernel["start"], kernel["end"], added, share or None, label)


def panel(prefill: dict[str, Any], mixer: str, copy: float, bf16: float) -> Panel | None:
    """The layer of median length of those with this mixer."""
    kernels = prefill["kernels"]
    found = layers([kernel["kind"] for kernel in kernels])
    timed = [timed_layer(kernels, begin, end) for of, begin, end in found if of == mixer]
    if not timed:
        return None
    kinds = {kind["kind"]: kind for kind in prefill["kinds"]}
    layer = median_layer(timed)
    bars = [bar(kernel, kinds[kernel["kind"]], copy, bf16) for kernel in layer]
    length = sum(kernel["added"] for kernel in layer)
    operations = sum(kinds[k["kind"]]["operations"] / kinds[k["kind"]]["calls"] for k in layer)
    speed = f"{operations / length / 1e6:.0f} TFLOP/s"
    return Panel(f"{NAMES[mixer]}, {prefill['tokens']} tokens: {length:.0f} µs, {speed}", bars)


def draw_prefill_layers(timeline: dict[str, Any], path: Path) -> None:
    copy, bf16 = timeline["copy"], timeline["bf16"]
    prefills = timeline["prefills"]
    drawn = [prefill for prefill in prefills if prefill["tokens"] in LENGTHS] or prefills[-1:]
    rows = [[panel(prefill, mixer, copy, bf16) for prefill in drawn] for mixer in NAMES]
    panels = [[panel for panel in row if panel is not None] for row in rows]
    panels = [row for row in panels if len(row) == len(drawn)]
    if panels:
        peak = f"% of {bf16 / 1e12:.0f} TFLOP/s or {copy / 1e12:.2f} TB/s, whichever is nearer"
        draw_panels(
            panels, "µs since the layer before (pale: waits, or beside the kernel before)", peak, path
        )
