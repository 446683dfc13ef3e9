"""When each kernel of a decode step starts and ends on the GPU, as CUPTI sees it.

    python benchmarks/decode_timeline.py PROGRAM [--context 512] [--tokens 24] [--json FILE]

Decodes as an answer does, the next step enqueued before a token is waited for, in the CUDA graph. The steps
are first timed without the profiler, which slows the host. Prints for each kind of kernel how many a token
has, how long one is, how long after its predecessor's end it starts (less than nothing: it starts beside it)
and what it adds: the time from the latest end before it to its own, of which the sum is the token. Then how
long the GPU works, and how long it waits between the last kernel of a token and the first of the next. The
JSON has the token of median length, which plot.py draws.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernel_timeline import (
    Event,
    Kernel,
    Timed,
    from_start,
    function_name,
    latest_end,
    open_engine,
    profiled,
    steps_of,
    union,
    write_json,
)

FIRST = "embedding"  # of a token's kernels
WARM_UP, TIMED = 16, 64  # tokens before the profiled ones

# By the function's own name. A product of int4 weights has one name wherever it is: its neighbours say which.
PRODUCT = re.compile(r"decode_kernel|int4_linear")
KINDS = (
    (re.compile(r"embed"), FIRST),
    (re.compile(r"recur|delta_step"), "delta_step"),
    (re.compile(r"router|route$"), "router"),
    (re.compile(r"gate_up"), "moe_gate_up"),
    (re.compile(r"down"), "moe_down"),
    (re.compile(r"head_rows|_head$"), "head"),
    (re.compile(r"find_best|filter_bins|draw_token|sample"), "sample"),
    (re.compile(r"publish"), "publish"),
    (re.compile(r"norm"), "norm"),
    (re.compile(r"^decode$|attend|attention"), "attention"),
)
BEFORE = {"delta_step": "delta_input", "attention": "attention_qkv", "sample": "head"}
AFTER = {"delta_step": "delta_output", "attention": "attention_out"}


@dataclass(frozen=True)
class Kind:
    """All of a kind; means, in us."""

    kind: str
    count: float  # a token
    duration: float
    gap: float  # from its predecessor's end to its start; negative where they overlap
    added: float  # from the latest end before it to its own


@dataclass(frozen=True)
class Sums:
    """Of a token, the mean in us."""

    token: float  # from its first kernel's start to the next token's
    busy: float  # at least one kernel runs
    idle_inside: float
    idle_between: float  # from its last kernel's end to the next token's first


def kinds_of(names: Iterable[str]) -> list[str]:
    """The kinds of kernels that ran one after the other; of one unknown, its function's name."""
    functions = [function_name(name) for name in names]
    kinds: list[str | None] = []
    for function in functions:
        known = next((kind for pattern, kind in KINDS if pattern.search(function)), function)
        kinds.append(None if PRODUCT.search(function) else known)
    for i, kind in enumerate(kinds):
        if kind is not None:
            continue
        following = next((k for k in kinds[i + 1 : i + 2] if k is not None), None)
        # The output product of several rows has a norm before it.
        preceding = next((k for k in reversed(kinds[:i]) if k != "norm"), None)
        kinds[i] = BEFORE.get(following or "") or AFTER.get(preceding or "") or "product"
    return [kind or "product" for kind in kinds]


def split_tokens(events: Sequence[Event]) -> list[list[Timed]]:
    """The tokens' kernels with their kinds; what comes before the first token is left out."""
    ordered = sorted(events, key=lambda event: event.start)
    tokens: list[list[Timed]] = []
    for kind, event in zip(kinds_of(event.name for event in ordered), ordered, strict=True):
        if kind == FIRST:
            tokens.append([])
        if tokens:
            tokens[-1].append((kind, event))
    return tokens


def whole(tokens: list[list[Timed]]) -> list[int]:
    """Which tokens have as many kernels as most, and a successor that does: those to measure."""
    if not tokens:
        return []
    usual = Counter(map(len, tokens)).most_common(1)[0][0]
    return [i for i in range(len(tokens) - 1) if len(tokens[i]) == usual == len(tokens[i + 1])]


def measure_kinds(tokens: list[list[Timed]], measured: list[int]) -> list[Kind]:
    """In the order of a token; a token's first kernel starts after the idle time, which `Sums` has."""
    steps: dict[str, list[tuple[float, float, float]]] = {}
    for i in measured:
        for kind, *step in steps_of(tokens[i], tokens[i][0][1].start):
            steps.setdefault(kind, []).append((step[0], step[1], step[2]))
    kinds = []
    for kind, all_steps in steps.items():
        duration, gap, added = (statistics.mean(column) for column in zip(*all_steps, strict=True))
        kinds.append(Kind(kind, len(all_steps) / len(measured), duration, gap, added))
    return kinds


def measure_sums(tokens: list[list[Timed]], measured: list[int]) -> Sums:
    lengths, busy, inside, between = [], [], [], []
    for i in measured:
        start, end, following = tokens[i][0][1].start, latest_end(tokens[i]), tokens[i + 1][0][1].start
        lengths.append(following - start)
        busy.append(union(tokens[i]))
        inside.append(end - start - busy[-1])
        between.append(max(0.0, following - end))
    return Sums(*(statistics.mean(column) for column in (lengths, busy, inside, between)))


def median_token(tokens: list[list[Timed]], measured: list[int]) -> list[Kernel]:
    def length(i: int) -> float:
        return latest_end(tokens[i]) - tokens[i][0][1].start

    return from_start(tokens[sorted(measured, key=length)[len(measured) // 2]])


def report(kinds: list[Kind], sums: Sums, unprofiled: float, tokens: int) -> str:
    head = f"{'kernel':16} {'count':>6} {'us':>8} {'after, us':>9} {'adds, us':>8} {'in all, us':>10}"
    lines = [head]
    lines += [
        f"{k.kind:16} {k.count:6.0f} {k.duration:8.2f} {k.gap:9.2f} {k.added:8.2f} {k.count * k.added:10.1f}"
        for k in kinds
    ]
    count = sum(kind.count for kind in kinds)
    lines.append(
        f"{'sum':16} {count:6.0f} {'':8} {'':9} {'':8} {sum(k.count * k.added for k in kinds):10.1f}"
    )
    lines.append("")
    lines.append(f"a token, mean of {tokens}: {sums.token:.1f} us, busy {sums.busy:.1f} us, idle inside")
    lines[-1] += f" {sums.idle_inside:.1f} us, idle between tokens {sums.idle_between:.1f} us"
    lines[-1] += f" ({sums.idle_between / sums.token:.1%})"
    span = sums.token - sums.idle_between
    outside = max(0.0, unprofiled - span)
    lines.append(
        f"without the profiler: {unprofiled:.1f} us a token ({1e6 / unprofiled:.1f} tok/s), of which "
        f"{outside:.1f} us ({outside / unprofiled:.1%}) are beyond the kernels' span of {span:.1f} us"
    )
    return "\n".join(lines)


def decode(engine: Any, session: Any, token: int, count: int) -> int:
    """So many steps as an answer takes them: all but the last run ahead."""
    for i in range(count):
        token = session.decode(engine, token, {"temperature": 0.0}, i + 1 < count)
    return token


@dataclass(frozen=True)
class Profile:
    events: list[Event]
    unprofiled: float  # us a token without the profiler
    context: int  # positions in the middle of the profiled tokens
    card: str
    graph_nodes: int


def profile(program: Path, context: int, tokens: int) -> Profile:
    """Kernels of so many steps around `context`, or as near to it as the program's length lets them be."""
    engine = open_engine(program)
    before, after = WARM_UP + TIMED + tokens // 2, tokens - tokens // 2
    length = max(1, min(context, engine.max_seq_len - after) - before)
    if length + before + after > engine.max_seq_len:
        sys.exit(f"{program} holds {engine.max_seq_len} tokens, too few to measure {tokens}")
    draw = random.Random(0)
    prompt = [draw.randrange(engine.vocab_size) for _ in range(length)]
    session = engine.open_session()
    token = session.run(engine, prompt, {"temperature": 0.0})
    token = decode(engine, session, token, WARM_UP)
    began = time.perf_counter()
    token = decode(engine, session, token, TIMED)
    unprofiled = (time.perf_counter() - began) / TIMED * 1e6
    events = profiled(lambda: decode(engine, session, token, tokens))
    gpu = engine.gpu
    return Profile(events, unprofiled, length + before, gpu["name"], gpu["graph_nodes"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("program", type=Path, help="folder of the program")
    parser.add_argument(
        "--context", type=int, default=512, help="positions at the middle of what is measured"
    )
    parser.add_argument("--tokens", type=int, default=24, help="tokens to profile (24)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the timeline to")
    arguments = parser.parse_args()
    if arguments.tokens < 4:
        sys.exit(f"--tokens {arguments.tokens}: at least 4, the first and the last are not whole")
    found = profile(arguments.program, arguments.context, arguments.tokens)
    tokens = split_tokens(found.events)
    measured = whole(tokens)[1:]  # the host was not yet a step ahead at the first
    if not measured:
        functions = Counter(function_name(event.name) for event in found.events).most_common(12)
        sys.exit(f"the kernels are no tokens that begin with an embedding: {functions}")
    kinds, sums = measure_kinds(tokens, measured), measure_sums(tokens, measured)
    print(
        f"{arguments.program.name} at {found.context} positions on {found.card}, {len(tokens[measured[0]])} "
        f"kernels a token, {found.graph_nodes} nodes in the graph"
    )
    print(report(kinds, sums, found.unprofiled, len(measured)))
    if arguments.json is not None:
        timeline = {
            "program": str(arguments.program),
            "card": found.card,
            "context": found.context,
            "tokens": len(measured),
            "unprofiled_us": found.unprofiled,
            "sums": asdict(sums),
            "kinds": [asdict(kind) for kind in kinds],
            "token": [asdict(kernel) for kernel in median_token(tokens, measured)],
        }
        write_json(arguments.json, timeline)


if __name__ == "__main__":
    main()
