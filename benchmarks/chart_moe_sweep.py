"""The sweep of the experts, as plot.py draws it: what moe_sweep.py wrote with --json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chart import COLOR, FAINT, PEER_COLORS, pyplot, save

OURS, LOOP, PYTORCH = COLOR, FAINT, "#228833"
# Of methods by the beginning of their names: ours, and what a family's members differ in.
FAMILIES = {"ours": OURS, "ExecuTorch": PEER_COLORS[0], "torch.compile": PYTORCH, "eager": PEER_COLORS[1]}
STYLES = ("-", "--", ":", "-.")


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(tokens, us) of each method that has times."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["us"] is not None:
            found.setdefault(row["method"], []).append((row["tokens"], row["us"]))
    return {method: sorted(points) for method, points in found.items()}


def first_out_of_memory(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The tokens from which on a method has too little memory."""
    found: dict[str, int] = {}
    for row in rows:
        if row["problem"] == "out of memory":
            found[row["method"]] = min(row["tokens"], found.get(row["method"], row["tokens"]))
    return found


def looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(color, line style) of each: a color a family, a style a member."""
    members: dict[str, int] = {}
    result = {}
    for method in methods:
        family = next((name for name in FAMILIES if method.startswith(name)), "")
        member = members[family] = members.get(family, -1) + 1
        result[method] = (FAMILIES.get(family, LOOP), STYLES[member % len(STYLES)])
    return result


def draw_moe_sweep(measured: dict[str, Any], path: Path) -> None:
    """A line a method, microseconds against tokens; one that ran out of memory says from where on."""
    drawn, limits = lines(measured["sweep"]), first_out_of_memory(measured["sweep"])
    figure, axes = pyplot().subplots(figsize=(9, 5.2), layout="constrained")
    for method, (color, style) in looks(list(drawn)).items():
        tokens, us = zip(*drawn[method], strict=True)
        label = f"{method} (out of memory from {limits[method]} on)" if method in limits else method
        width = 2 if method.startswith("ours") else 1.2
        axes.plot(tokens, us, style, marker="o", markersize=3, linewidth=width, color=color, label=label)
        if method in limits:
            axes.plot(tokens[-1], us[-1], "x", markersize=9, color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    longest = max(tokens for points in drawn.values() for tokens, _ in points)
    places = [2**i for i in range(longest.bit_length() + 1) if 2**i <= 1.1 * longest]
    axes.set_xticks(places, [f"{place // 1024} k" if place >= 1024 else str(place) for place in places])
    axes.minorticks_off()
    axes.grid(color=FAINT, alpha=0.25)
    axes.set_xlabel("tokens")
    axes.set_ylabel("µs, from choices to the weighted sum")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    axes.set_title(
        f"Qwen3.5-35B-A3B's routed experts, int4 in groups of {measured['group']}, on one {measured['card']}",
        loc="left",
        fontsize=10,
    )
    save(figure, path)
