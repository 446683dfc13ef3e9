"""Checks each CPU kernel against its reference, then times it: python benchmarks/cpu_kernels.py [operator
...].

GB/s counts each weight, state or cache byte once, whatever a call reads again; GFLOP/s counts two operations
a multiply-add. `--threads` sets OpenMP's; `QWEN_CPU_ISA=v3` or `base` tries lesser instruction sets.
`--no-check` skips the references, which take most of the time.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

MIN_SECONDS = 0.3
REPETITIONS = 5


@dataclass(frozen=True)
class Workload:
    """One call: the operator's name and arguments, what to print of it, and what it reads and computes."""

    operator: str
    label: str
    arguments: tuple[Any, ...]
    dtype: torch.dtype
    bytes: float
    operations: float


def nbytes(*tensors: torch.Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def linear_workloads(generator: torch.Generator) -> Iterator[Workload]:
    from qwen_runner.kernels.linear import cases

    for case in cases.BENCHMARK:
        label = f"{case.tokens} x {case.in_features} -> {case.out_features}"
        operations = 2.0 * case.tokens * case.in_features * case.out_features
        for name, arguments in (
            ("float_linear", cases.float_arguments(case, torch.float32, generator)),
            ("float_linear", cases.float_arguments(case, torch.bfloat16, generator)),
            ("int8_linear", cases.int8_arguments(case, generator)),
            ("int4_linear", cases.int4_arguments(case, generator)),
        ):
            kind = f"{label} {str(arguments[1].dtype)[6:]}"
            yield Workload(name, kind, arguments, case.dtype, nbytes(*arguments[1:]), operations)


def moe_workloads(generator: torch.Generator) -> Iterator[Workload]:
    from qwen_runner.kernels.moe import cases

    for case in cases.BENCHMARK:
        label = f"{case.tokens} x {case.hidden}, {case.top_k} of {case.experts} x {case.intermediate}"
        operations = 6.0 * case.tokens * case.top_k * case.hidden * case.intermediate
        for name, arguments in (
            ("float_moe", cases.float_arguments(case, generator)),
            ("int4_moe", cases.int4_arguments(case, generator)),
        ):
            touched = arguments[1].unique().numel() / case.experts
            yield Workload(name, label, arguments, case.dtype, nbytes(*arguments[3:]) * touched, operations)


def gated_delta_workloads(generator: torch.Generator) -> Iterator[Workload]:
    from qwen_runner.kernels.gated_delta import cases

    for case in cases.BENCHMARK:
        heads = f"{case.key_heads}/{case.value_heads} heads of {case.key_dim} x {case.value_dim}"
        label = f"{case.rows} rows, {heads}"
        operations = 8.0 * case.rows * case.value_heads * case.key_dim * case.value_dim
        arguments = cases.arguments(case, generator)
        yield Workload("gated_delta", label, arguments, case.dtype, 2 * nbytes(arguments[7]), operations)


def attention_workloads(generator: torch.Generator) -> Iterator[Workload]:
    from qwen_runner.kernels.attention import cases

    for case in cases.BENCHMARK:
        heads = f"{case.query_heads}/{case.key_heads} heads of {case.head_dim}"
        label = f"{case.rows} rows at {case.position}, {heads}"
        pairs = case.rows * (case.position + 1) + case.rows * (case.rows - 1) // 2
        arguments = cases.arguments(case, generator)
        context = 2.0 * (case.position + case.rows) * case.key_heads * case.head_dim
        operations = 4.0 * pairs * case.query_heads * case.head_dim
        yield Workload("attention", label, arguments, case.dtype, context * case.dtype.itemsize, operations)


def sample_workloads(generator: torch.Generator) -> Iterator[Workload]:
    from qwen_runner.kernels.sample import cases

    for case in cases.BENCHMARK:
        one = torch.zeros(1, dtype=torch.int64)
        logits = torch.randn(1, case.vocabulary, generator=generator) * 3
        seen = torch.zeros(1, case.vocabulary, dtype=torch.uint8)
        arguments = cases.arguments(case, logits, one, one, one, seen, one, one)
        label = f"{case.vocabulary}, t={case.temperature} k={case.top_k} p={case.top_p}"
        yield Workload("sample", label, arguments, torch.float32, nbytes(logits, seen), 0.0)


WORKLOADS: tuple[Callable[[torch.Generator], Iterator[Workload]], ...] = (
    linear_workloads,
    moe_workloads,
    gated_delta_workloads,
    attention_workloads,
    sample_workloads,
)


def check(work: Workload) -> None:
    """Raises AssertionError if the kernel is not within tolerance of the reference."""
    from qwen_runner.kernels.native import call
    from qwen_runner.kernels.tolerance import TOLERANCE, error

    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in work.arguments]
    expected = getattr(torch.ops.qwen, work.operator)(*copies)
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in work.arguments]
    distance = error(call(work.operator, *copies), expected)
    assert distance < TOLERANCE[work.dtype], f"{work.operator} {work.label}: error {distance:.2e}"


def seconds(work: Workload) -> float:
    """The best of several means: other processes only ever add time."""
    from qwen_runner.kernels.native import bind

    kernel = bind(work.operator, *work.arguments)
    kernel()
    best, spent = float("inf"), 0.0
    for _ in range(REPETITIONS):
        runs, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < MIN_SECONDS / REPETITIONS:
            kernel()
            runs += 1
        best, spent = min(best, elapsed / runs), spent + elapsed
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operators", nargs="*", help="names to run (all by default), e.g. int4_linear")
    parser.add_argument("--threads", type=int, help="OpenMP threads")
    parser.add_argument("--no-check", action="store_true", help="time only")
    options = parser.parse_args()
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)
    import qwen_runner.kernels  # noqa: F401 - registers the operators
    from qwen_runner import _kernels

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, loops for {_kernels.isa()}")
    print(f"{'operator':13} {'shape':52} {'us':>10} {'GB/s':>8} {'GFLOP/s':>8}")
    for workloads in WORKLOADS:
        for work in workloads(torch.Generator().manual_seed(0)):
            if options.operators and work.operator not in options.operators:
                continue
            if not options.no_check:
                check(work)
            s = seconds(work)
            rates = f"{work.bytes / s / 1e9:8.1f} {work.operations / s / 1e9:8.1f}"
            print(f"{work.operator:13} {work.label:52} {s * 1e6:10.1f} {rates}", flush=True)


if __name__ == "__main__":
    main()
