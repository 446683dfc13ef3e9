"""When kernels ran on the GPU, as CUPTI saw it: what the timelines of decode and of prefill share."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """A kernel that ran: its C++ name, start and end in us."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Kernel:
    """One of a token's or a prompt's, in us since its first one's start."""

    kind: str
    start: float
    end: float


# A kernel's kind, and when it ran; in order of their starts wherever there are several.
Timed = tuple[str, Event]


def function_name(name: str) -> str:
    """`decode` of `void qwen::cuda::(anonymous namespace)::decode<256, 8>(Arguments)`."""
    name = name.replace("(anonymous namespace)", "anonymous")
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return name.split("(")[0].strip().split(" ")[-1].split("::")[-1]


def latest_end(timed: Sequence[Timed]) -> float:
    return max(event.end for _, event in timed)


def steps_of(timed: Sequence[Timed], before: float) -> list[tuple[str, float, float, float]]:
    """(kind, duration, gap, added) of each kernel; `before` is when what ran before them ended.

    The gap is from its predecessor's end to its start, less than nothing where they overlap. Added is from
    the latest end before it to its own, of which the sum is the time that all take.
    """
    steps, latest, previous = [], before, before
    for kind, event in timed:
        steps.append((kind, event.end - event.start, event.start - previous, max(0.0, event.end - latest)))
        previous, latest = event.end, max(latest, event.end)
    return steps


def union(timed: Sequence[Timed]) -> float:
    """How long at least one of the kernels runs."""
    total, latest = 0.0, float("-inf")
    for _, event in timed:
        total += max(0.0, event.end - max(event.start, latest))
        latest = max(latest, event.end)
    return total


def from_start(timed: Sequence[Timed]) -> list[Kernel]:
    origin = timed[0][1].start
    return [
        Kernel(kind, round(event.start - origin, 3), round(event.end - origin, 3)) for kind, event in timed
    ]


def kernel_events(trace: dict[str, Any]) -> list[Event]:
    """Of a trace in Chrome's format, as torch.profiler writes it."""
    return [
        Event(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace.get("traceEvents", ())
        if event.get("cat") == "kernel" and "ts" in event and "dur" in event
    ]


def open_engine(program: Path, **options: Any) -> Any:
    """A cuda program's engine, with the profiler known to work; ends this process where one does not.

    CUPTI starts before there is a CUDA graph, so that it knows of the graph's kernels from their beginning.
    """
    import torch
    from torch.profiler import ProfilerActivity

    if not torch.cuda.is_available():
        sys.exit("no GPU: PyTorch finds none, and a timeline needs one")
    try:
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]):
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"PyTorch's profiler does not start here: {error}")

    from qwen_runner import _core

    engine = _core.Engine(str(program), **options)
    if engine.device != "cuda" or engine.gpu is None:
        sys.exit(f"{program} is a program for {engine.device}: a timeline needs one for cuda")
    return engine


def synchronize() -> None:
    """Waits until the GPU has nothing to do."""
    import torch

    torch.cuda.synchronize()


def profiled(work: Callable[[], object]) -> list[Event]:
    """The kernels that `work` runs; ends this process if the profiler sees none."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = kernel_events(json.loads(path.read_text(encoding="utf-8")))
    if not events:
        sys.exit("the profiler saw no kernels: CUPTI does not work here, or another profiler has the GPU")
    return sorted(events, key=lambda event: event.start)


def write_json(path: Path, timeline: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(timeline, indent=1) + "\n", encoding="utf-8")
