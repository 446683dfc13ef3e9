"""Draws what was measured: python benchmarks/plot.py FILE [FILE ...] [--output FOLDER].

FILEs are what cuda_kernels.py, decode_timeline.py and cuda_model.py wrote with --json, of one machine:

- Of the kernels a chart a phase, <phase>_kernels.svg: the time that each takes of a decode step or of a
  prefill chunk, all its calls together, and beside it what it reaches, of the card's own peak in whichever is
  nearer to it: bandwidth or arithmetic.
- Of the kernels and the timeline decode_layer.svg, when the kernels of one layer run, a layer of each type.
  Without a timeline they are drawn one after the other.
- Of the model decode_growth.svg, tokens a second against the context and against the answers at once.

What no file tells of stays as it is. Needs matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parent / "figures"
COLOR, PEER_COLORS = "#4477aa", ("#cc6677", "#997700")
FAINT = "#888888"

EXPERTS = ("router", "moe_gate_up", "moe_down")
LAYERS = {
    "A DeltaNet layer": ("delta_input", "delta_step", "delta_output", *EXPERTS),
    "An attention layer": ("attention_qkv", "attention", "attention_out", *EXPERTS),
}


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


def pyplot() -> Any:
    """matplotlib's, set so that the same data gives the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "qwen_runner", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """White behind it, so that it reads the same on a dark page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    pyplot().close(figure)
    print(path)


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


@dataclass(frozen=True)
class Span:
    """A kernel of a layer, in µs since the end of the layer before."""

    kernel: str
    start: float
    end: float
    added: float  # from the latest end before it to its own: a layer's sum is its length
    bytes: float

    def share(self, copy: float) -> float:
        """Of the bytes that a copy moves while this kernel adds to the layer."""
        return self.bytes / (self.added * 1e-6) / copy if self.added > 0 else 1.0


def decode_kernels(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(µs, bytes) of each kernel that a decode step calls."""
    return {
        row["kernel"].split("@")[0]: (row["us"], row["bytes"])
        for row in rows
        if row["calls"] and row["phase"].startswith("decode")
    }


def layers_of(token: list[dict[str, Any]], kinds: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Each run of kernels of these kinds, with the end of what ran before as `origin` and `added` of each."""
    found = []
    for i in range(1, len(token) - len(kinds) + 1):
        layer = token[i : i + len(kinds)]
        if [kernel["kind"] for kernel in layer] != list(kinds):
            continue
        latest = origin = max(kernel["end"] for kernel in token[:i])
        timed = []
        for kernel in layer:
            added = max(0.0, kernel["end"] - latest)
            latest = max(latest, kernel["end"])
            timed.append({**kernel, "origin": origin, "added": added})
        found.append(timed)
    return found


def layer_spans(
    kinds: Sequence[str], kernels: dict[str, tuple[float, float]], token: list[dict[str, Any]]
) -> list[Span]:
    """The token's layer of median length; without such a layer the kernels' own times in a row.

    Empty where a kernel was not measured.
    """
    if any(kind not in kernels for kind in kinds):
        return []
    layers = layers_of(token, kinds)
    if layers:
        lengths = [sum(kernel["added"] for kernel in layer) for layer in layers]
        layer = layers[lengths.index(statistics.median_low(lengths))]
        return [
            Span(
                k["kind"], k["start"] - k["origin"], k["end"] - k["origin"], k["added"], kernels[k["kind"]][1]
            )
            for k in layer
        ]
    spans, end = [], 0.0
    for kind in kinds:
        us, moved = kernels[kind]
        spans.append(Span(kind, end, end + us, us, moved))
        end += us
    return spans


def draw_layers(measured: dict[str, Any], timeline: dict[str, Any] | None, path: Path) -> None:
    kernels, copy = decode_kernels(measured["rows"]), measured["copy"]
    token = timeline["token"] if timeline else []
    drawn = {name: layer_spans(kinds, kernels, token) for name, kinds in LAYERS.items()}
    drawn = {name: spans for name, spans in drawn.items() if spans}
    if not drawn:
        return
    plt = pyplot()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = LinearSegmentedColormap.from_list("share", ["#c6d6e8", COLOR, "#10305c"])
    norm = Normalize(0, 100)
    longest = max(span.end for spans in drawn.values() for span in spans)
    first = min(0.0, *(span.start for spans in drawn.values() for span in spans))
    figure, panels = plt.subplots(
        len(drawn),
        1,
        figsize=(9, 0.9 + 1.75 * len(drawn)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, spans) in zip(panels[:, 0], drawn.items(), strict=True):
        for row, span in enumerate(spans):
            color = shades(norm(100 * span.share(copy)))
            alone = span.end - span.added  # what comes before is beside the kernel before, or waits for it
            axes.barh(row, span.end - span.start, left=span.start, color=color, alpha=0.3)
            axes.barh(row, span.end - max(alone, span.start), left=max(alone, span.start), color=color)
            label = f"{span.added:.1f} µs, {span.bytes / 1e6:.1f} MB, {span.share(copy):.0%}"
            axes.annotate(label, (span.end, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(spans)), [span.kernel for span in spans])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        length, moved = sum(span.added for span in spans), sum(span.bytes for span in spans)
        share = moved / (length * 1e-6) / copy
        axes.set_title(
            f"{name}: {length:.1f} µs, {moved / 1e6:.1f} MB, {share:.0%} of what a copy moves",
            loc="left",
            fontsize=10,
        )
    panels[-1, 0].set_xlim(1.05 * first, 1.3 * longest)  # room for the last bar's label
    source = "as they ran in one token; pale: beside the kernel before" if token else "timed one by one"
    panels[-1, 0].set_xlabel(f"µs since the layer before ({source})")
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=panels[:, 0].tolist(), aspect=30, pad=0.01)
    bar.set_label(f"% of a copy's {copy / 1e12:.2f} TB/s")
    bar.outline.set_visible(False)
    save(figure, path)


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


def draw_kernels(measured: dict[str, Any], folder: Path) -> None:
    for phase in dict.fromkeys(row["phase"] for row in measured["rows"]):
        rows = [row for row in measured["rows"] if row["phase"] == phase]
        drawn = bars(rows, measured["copy"], measured["bf16"])
        if drawn:
            heading = title(phase.capitalize(), sum(bar.us for bar in drawn), measured)
            draw_bars(drawn, heading, folder / f"{phase.split(',')[0]}_kernels.svg")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="+", help="written with --json; of two alike the last counts"
    )
    parser.add_argument("--copy", type=float, help="TB/s of a copy on this card, if not what the file says")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the charts")
    arguments = parser.parse_args()
    kernels = timeline = model = None
    for file in arguments.file:
        measured = json.loads(file.read_text(encoding="utf-8"))
        if "copy" in measured:
            kernels = measured
        elif "token" in measured:
            timeline = measured
        elif "contexts" in measured:
            model = measured
        else:
            parser.error(f"{file} is of none of the three")
    if kernels is not None:
        if arguments.copy:
            kernels["copy"] = arguments.copy * 1e12
        draw_kernels(kernels, arguments.output)
        draw_layers(kernels, timeline, arguments.output / "decode_layer.svg")
    elif timeline is not None:
        print("no layer is drawn: a timeline needs the file of cuda_kernels.py beside it, for the bytes")
    if model is not None:
        draw_growth(model, arguments.output / "decode_growth.svg")


if __name__ == "__main__":
    main()
