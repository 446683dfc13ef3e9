"""The chart of decode_timeline.py: when the kernels of one layer of a token run, a layer of each type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chart_layers import Bar, Panel, draw_panels, median_layer, timed_layer

EXPERTS = ("router", "moe_gate_up", "moe_down")
LAYERS = {
    "A DeltaNet layer": ("delta_input", "delta_step", "delta_output", *EXPERTS),
    "An attention layer": ("attention_qkv", "attention", "attention_out", *EXPERTS),
}


def decode_kernels(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(µs, bytes) of each kernel that a decode step calls."""
    return {
        row["kernel"].split("@")[0]: (row["us"], row["bytes"])
        for row in rows
        if row["calls"] and row["phase"].startswith("decode")
    }


def layers_of(token: list[dict[str, Any]], kinds: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Each run of kernels of these kinds, behind the token's first kernel."""
    names = [kernel["kind"] for kernel in token]
    begins = range(1, len(token) - len(kinds) + 1)
    return [timed_layer(token, i, i + len(kinds)) for i in begins if names[i : i + len(kinds)] == list(kinds)]


def one_by_one(kinds: Sequence[str], kernels: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """The kernels' own times in a row."""
    layer, end = [], 0.0
    for kind in kinds:
        us = kernels[kind][0]
        layer.append({"kind": kind, "start": end, "end": end + us, "added": us})
        end += us
    return layer


def layer_panel(
    name: str,
    kinds: Sequence[str],
    kernels: dict[str, tuple[float, float]],
    token: list[dict[str, Any]],
    copy: float,
) -> Panel:
    """The token's layer of median length; without such a layer the kernels' own times."""

    def share(moved: float, us: float) -> float:
        return moved / (us * 1e-6) / copy if us > 0 else 1.0

    layers = layers_of(token, kinds)
    bars = []
    for kernel in median_layer(layers) if layers else one_by_one(kinds, kernels):
        added, moved = kernel["added"], kernels[kernel["kind"]][1]
        label = f"{added:.1f} µs, {moved / 1e6:.1f} MB, {share(moved, added):.0%}"
        bars.append(Bar(kernel["kind"], kernel["start"], kernel["end"], added, share(moved, added), label))
    length, moved = sum(bar.added for bar in bars), sum(kernels[kind][1] for kind in kinds)
    of_copy = f"{moved / 1e6:.1f} MB, {share(moved, length):.0%} of what a copy moves"
    return Panel(f"{name}: {length:.1f} µs, {of_copy}", bars)


def draw_decode_layers(measured: dict[str, Any], timeline: dict[str, Any] | None, path: Path) -> None:
    """Nothing of a layer with a kernel that was not measured."""
    kernels, copy = decode_kernels(measured["rows"]), measured["copy"]
    token = timeline["token"] if timeline else []
    panels = [
        [layer_panel(name, kinds, kernels, token, copy)]
        for name, kinds in LAYERS.items()
        if all(kind in kernels for kind in kinds)
    ]
    if panels:
        source = "as they ran in one token; pale: beside the kernel before" if token else "timed one by one"
        unit = f"µs since the layer before ({source})"
        draw_panels(panels, unit, f"% of a copy's {copy / 1e12:.2f} TB/s", path)
