"""Checks and times a work with each of its configurations."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..cuda_native import Gpu
from .workloads import Config, Work

# Another split of a sum rounds otherwise, in float32 before the result is rounded to bfloat16.
TOLERANCE = 1e-2
# What a configuration must gain over the default to be worth a line that differs from it: the noise.
GAIN = 0.02


@dataclass(frozen=True)
class Measured:
    """A work, the default configuration and the best one with their times, and all the others' times."""

    operator: str
    phase: str
    kernel: str
    n: int
    k: int
    group: int
    rows: int
    default: Config
    default_us: float
    best: Config
    best_us: float
    times: dict[str, float | None]  # None: refused
    wrong: tuple[Config, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(row: dict[str, Any]) -> "Measured":
        configs = {key: tuple(row[key]) for key in ("default", "best")}
        return Measured(**{**row, **configs, "wrong": tuple(tuple(c) for c in row["wrong"])})


def microseconds(gpu: Gpu, work: Work) -> float:
    """A call, in the median of replays of a CUDA graph of many."""
    calls, replays = (max(32, work.sets), 10) if work.phase == "decode" else (8, 6)
    graph = torch.cuda.CUDAGraph()
    gpu.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph() would empty the allocator's cache
        graph.capture_begin()
        for i in range(calls):
            work.call(i)
        graph.capture_end()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    gpu.synchronize()
    return statistics.median(times[1:])


def warm_up(seconds: float = 1.0) -> None:
    """Until the GPU's clocks are where work keeps them: the first configuration is the default."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            torch.mm(a, a)
        torch.cuda.synchronize()


def _use(gpu: Gpu, work: Work, config: Config) -> None:
    m = gpu.module
    if work.phase == "decode":
        m.override_decode_config(getattr(m.DecodeKernel, work.kernel), *config)
    else:
        m.override_prefill_config(getattr(m.PrefillKernel, work.kernel), *config)


def default_config(gpu: Gpu, work: Work) -> Config:
    """What the rule predicts, whatever the tables say."""
    m = gpu.module
    if work.phase == "decode":
        kernel = getattr(m.DecodeKernel, work.kernel)
        return m.decode_config(kernel, work.n, work.k, work.group, 0)
    kernel = getattr(m.PrefillKernel, work.kernel)
    return m.prefill_config(kernel, work.n, work.k, work.group, work.rows, 0)


def _results(gpu: Gpu, work: Work, state: list[Tensor]) -> list[Tensor]:
    """What one call writes, from the same state and over NaN."""
    for now, before in zip(work.state, state, strict=True):
        now.copy_(before)
    for output in work.outputs:
        output.fill_(float("nan"))
    gpu.synchronize()
    work.call(0)
    gpu.synchronize()
    return [tensor.to(torch.float32, copy=True) for tensor in (*work.outputs, *work.state)]


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; NaN where one is."""
    errors = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    return float("nan") if any(error != error for error in errors) else max(errors)


def measure(gpu: Gpu, work: Work, microseconds: Callable[[Gpu, Work], float] = microseconds) -> Measured:
    """Each configuration is checked against the default one first.

    Raises:
        RuntimeError: a CUDA error other than a refusal of a configuration that is not the default.
        ValueError: the default's result is not a number.
    """
    default = default_config(gpu, work)
    state = [tensor.clone() for tensor in work.state]
    times: dict[Config, float | None] = {}
    wrong: list[Config] = []
    try:
        _use(gpu, work, default)
        expected = _results(gpu, work, state)
        if not _error(expected, expected) == 0:
            raise ValueError(f"{work.kernel} [{work.n}, {work.k}] with its default: not a number")
        for config in (default, *(c for c in work.configs if c != default)):
            _use(gpu, work, config)
            try:
                actual = _results(gpu, work, state)
            except RuntimeError as error:
                if config == default or "InvalidValue" not in str(error):
                    raise
                times[config] = None
                continue
            if not _error(actual, expected) < TOLERANCE:
                wrong.append(config)
                continue
            times[config] = microseconds(gpu, work)
    finally:
        _use(gpu, work, (0,) * len(default))
    taken = {config: us for config, us in times.items() if us is not None}
    best = min(taken, key=lambda config: taken[config])
    if taken[best] > (1 - GAIN) * taken[default]:
        best = default
    names = {",".join(map(str, config)): us for config, us in times.items()}
    key = (work.operator, work.phase, work.kernel, work.n, work.k, work.group, work.rows)
    return Measured(*key, default, taken[default], best, taken[best], names, tuple(wrong))
