"""When each kernel of a prefill starts and ends on the GPU, as CUPTI sees it, and what speed it reaches.

    python benchmarks/prefill_timeline.py PROGRAM [--tokens 32 128 1642 8192] [--expert-activations TYPE]
                                          [--json FILE]

A prompt of each length, from an empty session to its first token, is first timed without the profiler: the
median of several. Of as many with the profiler the one of median span is printed: for each kind of kernel how
many there are, how long one is, what it adds (the time from the latest end before it to its own, of which the
sum is the span), and what it computes and moves in that time, of what the card reaches in a large bfloat16
product and in a copy, measured before. See prefill_costs.py for what is counted. plot.py draws the JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kernel_timeline import (
    Event,
    Kernel,
    Timed,
    from_start,
    latest_end,
    open_engine,
    profiled,
    steps_of,
    synchronize,
    union,
    write_json,
)
from prefill_costs import Cost, Model, prefill_costs
from prefill_kinds import prefill_kinds

LENGTHS = (32, 128, 1642, 8192)
TIMED, PROFILED = 5, 3  # prompts of each length
GREEDY = {"temperature": 0.0}

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Kind:
    """All kernels of a kind in a prefill."""

    kind: str
    calls: int
    duration: float  # the mean in us, waiting for its predecessor included
    added: float  # us, all of them
    operations: float
    bytes: float

    def share(self, amount: float, peak: float) -> float:
        """Of what `peak` would do of operations or bytes in the time that it adds."""
        return amount / (self.added * 1e-6) / peak if self.added > 0 else 0.0


@dataclass(frozen=True)
class Prefill:
    """One prompt's, in us unless said otherwise."""

    tokens: int
    chunk: int  # tokens of a chunk, at most
    milliseconds: float  # to the first token, without the profiler
    span: float  # from the first kernel's start to the last's end
    idle: float  # of it, with no kernel running
    kinds: list[Kind]  # the first that ran first
    kernels: list[Kernel]


def measured_kinds(timed: Sequence[Timed], costs: dict[str, Cost]) -> list[Kind]:
    steps: dict[str, list[tuple[float, float]]] = {}
    for kind, duration, _, added in steps_of(timed, timed[0][1].start):
        steps.setdefault(kind, []).append((duration, added))
    kinds = []
    for kind, all_steps in steps.items():
        duration = statistics.mean(duration for duration, _ in all_steps)
        added = sum(added for _, added in all_steps)
        cost = costs.get(kind, Cost(0, 0))
        kinds.append(Kind(kind, len(all_steps), duration, added, cost.operations, cost.bytes))
    return kinds


def summary(events: Sequence[Event], model: Model, tokens: int, chunk: int, milliseconds: float) -> Prefill:
    """Of one prompt's kernels."""
    timed = list(zip(prefill_kinds([event.name for event in events]), events, strict=True))
    span = latest_end(timed) - timed[0][1].start
    kinds = measured_kinds(timed, prefill_costs(model, tokens, chunk))
    return Prefill(tokens, chunk, milliseconds, span, span - union(timed), kinds, from_start(timed))


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes the host."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def measure(engine: Any, model: Model, tokens: int) -> Prefill:
    session = engine.open_session()
    draw = random.Random(tokens)

    def prefill(run: Callable[[Callable[[], object]], Measured]) -> Measured:
        """What `run` finds of a prompt, from an empty session and an idle GPU to the first token."""
        prompt = [draw.randrange(engine.vocab_size) for _ in range(tokens)]
        session.reset()
        synchronize()
        return run(lambda: session.run(engine, prompt, GREEDY))

    prefill(milliseconds)  # to warm up
    unprofiled = statistics.median(prefill(milliseconds) for _ in range(TIMED))
    found = [summary(prefill(profiled), model, tokens, engine.chunk, unprofiled) for _ in range(PROFILED)]
    return sorted(found, key=lambda prefill: prefill.span)[PROFILED // 2]


def report(prefill: Prefill, copy: float, bf16: float) -> str:
    """A table of the kinds, what adds most first."""
    chunks = f" in chunks of {prefill.chunk}" if prefill.tokens > prefill.chunk else ""
    whole = prefill.milliseconds
    lines = [
        f"{prefill.tokens} tokens{chunks}: {whole:.2f} ms to the first token without the profiler "
        f"({prefill.tokens / whole * 1e3:.0f} tok/s); {len(prefill.kernels)} kernels span "
        f"{prefill.span / 1e3:.2f} ms, idle {prefill.idle:.1f} us of it",
        f"{'kernel':16} {'calls':>5} {'us each':>8} {'adds, us':>8} {'in all, us':>10} {'share':>6} "
        f"{'TFLOP/s':>7} {'of peak':>7} {'TB/s':>5} {'of peak':>7}",
    ]

    def row(kind: Kind, each: str, adds: str) -> str:
        cells = f"{kind.kind:16} {kind.calls:5} {each:>8} {adds:>8} {kind.added:10.1f}"
        cells += f" {kind.added / total:6.1%}"
        for amount, peak, width, digits in ((kind.operations, bf16, 7, 0), (kind.bytes, copy, 5, 2)):
            speed = kind.share(amount, peak) * peak / 1e12
            known = amount > 0 and kind.added > 0
            cells += f" {speed:{width}.{digits}f}" if known else " " * (width + 1)
            cells += f" {kind.share(amount, peak):7.0%}" if known else " " * 8
        return cells.rstrip()

    total = sum(kind.added for kind in prefill.kinds)
    for kind in sorted(prefill.kinds, key=lambda kind: -kind.added):
        lines.append(row(kind, f"{kind.duration:.1f}", f"{kind.added / kind.calls:.1f}"))
    everything = Kind(
        "sum",
        len(prefill.kernels),
        0,
        total,
        sum(kind.operations for kind in prefill.kinds),
        sum(kind.bytes for kind in prefill.kinds),
    )
    return "\n".join([*lines, row(everything, "", "")])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("program", type=Path, help="folder of the program")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="lengths of the prompts")
    parser.add_argument(
        "--expert-activations", default="bfloat16", metavar="TYPE", help="of the routed experts (bfloat16)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the timelines to")
    arguments = parser.parse_args()
    manifest = json.loads((arguments.program / "manifest.json").read_text(encoding="utf-8"))
    engine = open_engine(arguments.program, expert_activations=arguments.expert_activations)
    # A prompt of one token is a decode step.
    lengths = [tokens for tokens in arguments.tokens if 2 <= tokens <= engine.max_seq_len]
    if not lengths:
        sys.exit(f"{arguments.program} prefills 2 to {engine.max_seq_len} tokens: none of --tokens")
    for tokens in sorted(set(arguments.tokens) - set(lengths)):
        print(f"{tokens} tokens are left out: {arguments.program} prefills 2 to {engine.max_seq_len}")
    from cuda_bench import peaks  # imports PyTorch, as does what has looked for a GPU before

    copy, bf16 = peaks()
    print(
        f"{arguments.program.name}, the experts' activations in {arguments.expert_activations}, on "
        f"{engine.gpu['name']}: copy {copy / 1e12:.2f} TB/s, "
        f"bfloat16 {bf16 / 1e12:.0f} TFLOP/s"
    )
    model = Model.of(manifest)
    prefills = []
    for tokens in lengths:
        prefills.append(measure(engine, model, tokens))
        print(f"\n{report(prefills[-1], copy, bf16)}", flush=True)
    if arguments.json is not None:
        timeline = {
            "program": str(arguments.program),
            "card": engine.gpu["name"],
            "expert_activations": arguments.expert_activations,
            "copy": copy,
            "bf16": bf16,
            "prefills": [asdict(prefill) for prefill in prefills],
        }
        write_json(arguments.json, timeline)


if __name__ == "__main__":
    main()
