"""Sweeps the routed experts of Qwen3.5-35B-A3B over prompt lengths: this project's kernels beside PyTorch and
ExecuTorch.

    python benchmarks/moe_sweep.py [name ...] [--quick] [--grid] [--json FILE]

From given choices of experts to their weighted sum, every method from the same bfloat16 x and the same int4
codes and scales. A method is first compared with a loop over experts in float32, and called twice; what is
wrong, or not the same again, is not timed, and the exit status says so. A time is the median of replays of a
CUDA graph, so that launches cost nothing; where a call takes milliseconds, or its sizes depend on the routing
(the loop), of calls. Of few tokens calls choose other experts each time, so that the L2 cache does not hold
them. --grid measures the tiles and grids that the prefill kernels can have, from 64 to 8192 tokens.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from cuda_bench import Workload
from cuda_bench import microseconds as graph_microseconds
from moe_grid import grid_tables, measure_grid
from moe_methods import (
    BOUNDS,
    EXECUTORCH,
    Call,
    Experts,
    Method,
    Routing,
    executorch_methods,
    pytorch_methods,
    random_experts,
    random_routing,
    reference,
)
from moe_ours import Ours
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.tolerance import relative_error
from qwen_runner.kernels.tune.sweep import warm_up
from qwen_runner.kernels.tune.workloads import QWEN3_5_35B_A3B, Model
from torch import Tensor
from torch.nn import functional

LENGTHS = (1, 2, 4, 8, 15, 16, 32, 63, 64, 128, 256, 500, 512, 1024, 1642, 2048, 4095, 8192)
QUICK = (1, 2, 15, 63, 500, 1642, 4095)
# Triton tunes a kernel at the first length it sees: one that it is for.
TUNED_AT = {"fused_moe": 1, "fused_moe_batched_gemm": 1642, "fused_moe_batched_gemm_int8": 1642}
# One token, any number, and so many that offsets take 64 bits: torch.compile makes code for each.
COMPILED_AT = (1, 3, 300)
LONG_US = 4000.0  # of a call: launches take no share of it


@dataclass(frozen=True)
class Row:
    """A method at a length; `problem` says why there is no time."""

    method: str
    activations: str
    tokens: int
    us: float | None = None
    error: float | None = None
    problem: str = ""


NOT_FOR_THIS = "not run"  # at this length
NOT_HERE = "not on this card"
OUT_OF_MEMORY = "out of memory"
Timer = Callable[[Call, int, bool], float]


def microseconds(call: Call, sets: int, captured: bool) -> float:
    """Of a call that has run before, on `sets` routings in turn."""

    def run(i: int) -> None:
        call(i % sets)

    times: list[float] = []
    while len(times) < 3 or (len(times) < 7 and sum(times) < 10 * LONG_US):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(len(times))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    direct = statistics.median(times)
    if not captured or direct > LONG_US:
        return direct
    return graph_microseconds(Workload("", run, 0.0), calls=max(4, sets))


def measure(
    method: Method, x: Tensor, routings: Sequence[Routing], expected: Tensor, timer: Timer = microseconds
) -> Row:
    tokens = x.shape[0]

    def row(us: float | None = None, error: float | None = None, problem: str = "") -> Row:
        return Row(method.name, method.activations, tokens, us, error, problem)

    if method.make is None:
        return row(problem=method.why_not)
    if method.most is not None and tokens > method.most:
        return row(problem=NOT_FOR_THIS)
    try:
        call = method.make(x, routings)
        first = call(0).clone()
        error = relative_error(first, expected)
        if not error < BOUNDS[method.activations]:
            return row(error=error, problem="wrong")
        if not torch.equal(call(0), first):
            return row(error=error, problem="wrong: another result the second time")
        return row(timer(call, len(routings), method.captured), error)
    except torch.OutOfMemoryError:
        return row(problem=OUT_OF_MEMORY)
    except Exception as failure:  # a peer's: the others' rows are still wanted
        if "cudaErrorNotSupported" in str(failure):
            return row(problem=NOT_HERE)
        lines = str(failure).strip().splitlines() or [""]
        return row(problem=f"failed: {type(failure).__name__}: {lines[0][:120]}")


def is_bad(row: Row) -> bool:
    return row.problem.startswith(("wrong", "failed"))


def sets_for(tokens: int) -> int:
    """Routings whose experts together are more than an L2 cache holds."""
    return max(1, 32 // tokens)


def inputs(model: Model, tokens: int, generator: torch.Generator) -> tuple[Tensor, list[Routing]]:
    """x bf16 [T, D] of normalized rows, as a layer's norm leaves them."""
    x = torch.randn(tokens, model.hidden, device=generator.device, generator=generator)
    x = functional.rms_norm(x, (model.hidden,)).bfloat16()
    return x, [random_routing(model, tokens, generator) for _ in range(sets_for(tokens))]


def sweep(
    experts: Experts,
    methods: Iterable[Method],
    lengths: Iterable[int],
    generator: torch.Generator,
    timer: Timer = microseconds,
) -> list[Row]:
    methods, rows = list(methods), []
    for tokens in lengths:
        x, routings = inputs(experts.model, tokens, generator)
        expected = reference(x, routings[0], experts)
        for method in methods:
            rows.append(measure(method, x, routings, expected, timer))
            if rows[-1].problem and torch.cuda.is_available():
                torch.cuda.empty_cache()
        done = [row for row in rows if row.tokens == tokens and row.us is not None]
        print(f"{tokens} tokens: {len(done)} of {len(methods)} methods timed", file=sys.stderr, flush=True)
    return rows


def _time(row: Row) -> str:
    if row.us is not None:
        return f"{row.us:.1f}" if row.us < 1000 else f"{row.us:.0f}"
    if row.problem == OUT_OF_MEMORY or row.problem.startswith("wrong"):
        return row.problem.split(":")[0]
    return "failed" if is_bad(row) else "–"


def _error(row: Row) -> str:
    return "–" if row.error is None else f"{row.error:.1e}"


def markdown(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """A line a length, a column a method."""
    names = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.tokens, row.method): cell(row) for row in rows}
    lines = [f"| tokens | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for tokens in dict.fromkeys(row.tokens for row in rows):
        lines.append(f"| {tokens} | {' | '.join(cells.get((tokens, name), '–') for name in names)} |")
    return "\n".join(lines)


def notes(rows: Sequence[Row]) -> str:
    """Why there are no times, a line a method and reason."""
    lengths: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.problem not in ("", OUT_OF_MEMORY, NOT_FOR_THIS):
            lengths.setdefault((row.method, row.problem), []).append(row.tokens)
    return "".join(
        f"\n- {method}: {problem} (tokens: {', '.join(map(str, found))})"
        for (method, problem), found in lengths.items()
    )


def report(rows: Sequence[Row]) -> str:
    parts = ["Microseconds:", markdown(rows, _time), "Relative error, ||out - reference|| / ||reference||:"]
    parts.append(markdown(rows, _error))
    if notes(rows):
        parts.append("No times:\n" + notes(rows))
    return "\n\n".join(parts)


def compile_executorch(name: str, model: Model, group: int) -> None:
    """Fills Triton's cache with every configuration of an operator, from a process of its own."""
    generator = torch.Generator("cuda").manual_seed(0)
    few = random_experts(
        Model(hidden=model.hidden, intermediate=model.intermediate, experts=8), group, generator
    )
    [method] = [method for method in executorch_methods(few) if method.name.endswith(f" {name}")]
    assert method.make is not None
    x, routings = inputs(few.model, min(64, TUNED_AT[name]), generator)
    method.make(x, routings)(0)
    torch.cuda.synchronize()


def prepare(methods: Sequence[Method], experts: Experts, generator: torch.Generator) -> None:
    """Compiles, in as many processes as there is work for, and lets Triton choose its configurations."""
    by_name = {method.name.removeprefix("ExecuTorch "): method for method in methods if method.make}
    names = [name for name, _, _ in EXECUTORCH if name in by_name]

    def run(method: Method, tokens: int) -> None:
        began = time.monotonic()
        x, routings = inputs(experts.model, tokens, generator)
        row = measure(method, x, routings[:1], reference(x, routings[0], experts), lambda *_: 0.0)
        took = time.monotonic() - began
        print(f"{method.name}, {tokens} tokens: {took:.1f} s to prepare {row.problem}", file=sys.stderr)

    with ProcessPoolExecutor(len(EXECUTORCH), get_context("spawn")) as pool:
        compiling = [pool.submit(compile_executorch, name, experts.model, experts.group) for name in names]
        for method in methods:
            if method.name.startswith("torch.compile"):
                for tokens in COMPILED_AT:
                    run(method, tokens)
        wait(compiling)  # what failed there fails again here, and is reported
    for name in names:
        run(by_name[name], TUNED_AT[name])


def conditions(group: int) -> str:
    try:
        peer = f"executorch {importlib.metadata.version('executorch')}"
    except importlib.metadata.PackageNotFoundError:
        peer = "no executorch"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {peer}, int4 in groups of {group}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="methods to run, or a part of their names (all by default)")
    parser.add_argument("--group", type=int, default=128, choices=(32, 64, 128), help="int4 group size")
    parser.add_argument("--quick", action="store_true", help=f"fewer lengths: {QUICK}")
    parser.add_argument("--grid", action="store_true", help="instead, the prefill kernels' tiles and grids")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to this file")
    options = parser.parse_args()
    try:
        gpu = Gpu(emulated=False)
    except (ModuleNotFoundError, RuntimeError) as error:
        sys.exit(f"the sweep needs an NVIDIA GPU and the kernels built for it (QWEN_BUILD_TESTS): {error}")
    print(conditions(options.group), flush=True)
    measured: dict[str, object] = {"card": torch.cuda.get_device_name(), "group": options.group}
    measured["conditions"] = conditions(options.group)
    if options.grid:
        warm_up()
        grid = measure_grid(gpu, options.group)
        print(grid_tables(grid))
        measured["grid"] = [row.to_json() for row in grid]
        bad = [row.kernel for row in grid if row.wrong]
    else:
        generator = torch.Generator("cuda").manual_seed(0)
        experts = random_experts(QWEN3_5_35B_A3B, options.group, generator)
        methods = [*pytorch_methods(experts), *executorch_methods(experts), *Ours(gpu, experts).methods()]
        if options.names:
            methods = [method for method in methods if any(name in method.name for name in options.names)]
        with torch.inference_mode():
            prepare(methods, experts, generator)
            warm_up()
            rows = sweep(experts, methods, QUICK if options.quick else LENGTHS, generator)
        print(report(rows))
        measured["sweep"] = [asdict(row) for row in rows]
        bad = [row.method for row in rows if is_bad(row)]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if bad:
        raise SystemExit(f"wrong or failed: {', '.join(dict.fromkeys(bad))}")


if __name__ == "__main__":
    main()
