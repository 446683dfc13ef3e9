"""The sweep of the experts: its methods at a tiny size, its checks, its tables and its plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import chart_moe_sweep
import moe_grid
import moe_sweep
import pytest
import torch
from moe_grid import ORDERED, TOGETHER, grid_tables, label, measure_grid
from moe_methods import (
    BOUNDS,
    Call,
    Experts,
    Method,
    Routing,
    executorch_methods,
    executorch_weights,
    gathered,
    grouped,
    pytorch_methods,
    random_experts,
    random_routing,
    reference,
)
from moe_ours import KINDS, Ours
from moe_sweep import Row, measure, report, sweep
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear.reference import dequantize_int4
from qwen_runner.kernels.moe.reference import router
from qwen_runner.kernels.tolerance import relative_error
from qwen_runner.kernels.tune.sweep import Measured
from qwen_runner.kernels.tune.sweep import measure as sweep_of_sizes
from qwen_runner.kernels.tune.workloads import Model

SMALL = Model(hidden=128, experts=8, top_k=3, intermediate=128)


@pytest.fixture
def experts() -> Experts:
    return random_experts(SMALL, 64, torch.Generator().manual_seed(1))


def ten_us(call: Call, sets: int, captured: bool) -> float:
    return 10.0


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("function", [gathered, grouped])
def test_eager_methods_compute_what_the_loop_does(experts: Experts, function: Any, tokens: int) -> None:
    x, [routing, *_] = moe_sweep.inputs(SMALL, tokens, torch.Generator().manual_seed(2))
    out = function(x, routing.ids, routing.weights, *experts.tensors)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, reference(x, routing, experts)) < BOUNDS["bf16"]


def test_a_routing_is_what_the_router_makes_of_its_logits() -> None:
    routing = random_routing(SMALL, 40, torch.Generator().manual_seed(3))
    ids, weights = router(routing.logits.bfloat16(), torch.eye(SMALL.experts).bfloat16(), SMALL.top_k)
    assert torch.equal(routing.ids, ids)
    assert torch.equal(routing.weights, weights)


def test_few_tokens_have_many_routings() -> None:
    assert [moe_sweep.sets_for(tokens) for tokens in (1, 8, 15, 33, 4095)] == [32, 4, 2, 1, 1]


def test_executorch_reads_the_same_matrices(experts: Experts) -> None:
    """A kernel takes column k as ((byte >> 4 (k % 2)) & 15) - 8, of byte k // 2, times its group's scale."""
    gate_up, gate_up_scales, down, down_scales = executorch_weights(experts)
    for packed, scales, rows in (
        (gate_up, gate_up_scales, experts.gate_up),
        (down, down_scales, experts.down),
    ):
        assert packed.dtype == torch.int8
        columns = torch.arange(2 * packed.shape[-1])
        codes = ((packed[..., columns // 2].int() >> (4 * (columns % 2)).int()) & 15) - 8
        dense = codes.float() * scales[..., columns // experts.group].float()
        assert torch.equal(dense, dequantize_int4(rows, scales))


def test_executorch_is_missing_or_takes_calls(experts: Experts) -> None:
    methods = executorch_methods(experts)
    assert [method.activations for method in methods] == ["bf16", "bf16", "int8"]
    assert all((method.make is None) == bool(method.why_not) for method in methods)


@pytest.mark.parametrize("tokens", [1, 2, 15])
def test_ours_are_right_in_emulation(experts: Experts, tokens: int) -> None:
    pytest.importorskip("qwen_runner._emulated_kernels", reason="not built (QWEN_BUILD_TESTS, CUDA)")
    methods = Ours(Gpu(emulated=True), experts).methods()
    assert [method.activations for method in methods] == ["bf16", *KINDS]
    rows = sweep(experts, methods, [tokens], torch.Generator().manual_seed(4), ten_us)
    assert rows[-1].problem in ("", "not on this card")  # fp8
    assert [row.problem for row in rows[:-1]] == ["not run" if tokens > 8 else "", *[""] * (len(KINDS) - 1)]
    assert all(row.us == 10.0 and row.error is not None and row.error > 0 for row in rows if not row.problem)


def fake(result: Any, **fields: Any) -> Method:
    """A method that returns `result(expected, calls before)`."""

    def make(x: torch.Tensor, routings: Sequence[Routing]) -> Call:
        calls: list[int] = []

        def call(i: int) -> torch.Tensor:
            calls.append(i)
            returned = result(torch.ones(2, 2), len(calls) - 1)
            assert isinstance(returned, torch.Tensor)
            return returned

        return call

    return Method("fake", make, **fields)


def out_of_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 GiB")


def unsupported(*_: object) -> torch.Tensor:
    raise RuntimeError("cudaErrorNotSupported: operation not supported")


def broken(*_: object) -> torch.Tensor:
    raise ValueError("first line\nand more")


@pytest.mark.parametrize(
    ("result", "fields", "problem"),
    [
        (lambda right, before: right, {}, ""),
        (lambda right, before: 1.02 * right, {}, "wrong"),
        (lambda right, before: 1.02 * right, {"activations": "int8"}, ""),
        (lambda right, before: right * float("nan"), {}, "wrong"),
        (lambda right, before: right + 1e-3 * before, {}, "wrong: another result the second time"),
        (lambda right, before: right, {"most": 1}, "not run"),
        (out_of_memory, {}, "out of memory"),
        (unsupported, {}, "not on this card"),
        (broken, {}, "failed: ValueError: first line"),
    ],
)
def test_what_is_wrong_is_not_timed(result: Any, fields: dict[str, Any], problem: str) -> None:
    timed: list[int] = []

    def timer(call: Call, sets: int, captured: bool) -> float:
        timed.append(sets)
        return 10.0

    row = measure(fake(result, **fields), torch.ones(2, 2), [], torch.ones(2, 2), timer)
    assert row.problem == problem
    assert (row.us, timed) == ((None, []) if problem else (10.0, [0]))


def test_a_method_that_is_not_there_says_so() -> None:
    row = measure(Method("peer", None, why_not="not installed"), torch.ones(2, 2), [], torch.ones(2, 2))
    assert row == Row("peer", "bf16", 2, problem="not installed")


ROWS = [
    Row("eager", "bf16", 1, 12.34, 3e-3),
    Row("ours", "bf16", 1, 5.0, 2e-3),
    Row("peer", "int8", 1, None, None, "not installed (no module)"),
    Row("eager", "bf16", 4095, None, None, "out of memory"),
    Row("ours", "bf16", 4095, 1234.5, 2.5e-3),
    Row("peer", "int8", 4095, None, None, "not installed (no module)"),
]
ROWS_OF_JSON = [asdict(row) for row in ROWS]


def test_the_report_shows_times_errors_and_why_there_are_none() -> None:
    text = report(ROWS)
    assert "| tokens | eager | ours | peer |\n|---|---|---|---|\n| 1 | 12.3 | 5.0 | – |" in text
    assert "| 4095 | out of memory | 1234 | – |" in text
    assert "| 4095 | – | 2.5e-03 | – |" in text
    assert "- peer: not installed (no module) (tokens: 1, 4095)" in text
    wrong = [Row("ours", "bf16", 2, None, 0.5, "wrong"), Row("ours", "bf16", 3, None, None, "failed: x")]
    assert "| 2 | wrong |" in report(wrong)
    assert "| 3 | failed |" in report(wrong)
    assert all(map(moe_sweep.is_bad, wrong))


def test_the_grid_marks_the_fastest_of_each_length() -> None:
    key = ("moe", "prefill", "MOE_DOWN", 2048, 512, 128)
    times: list[dict[str, float | None]] = [
        {"64,32,2,True": 6.0, "64,32": 4.0, "8,16": 3.0},
        {"64,32,2,True": 4.5, "64,32": 5.0, "8,16": None},
    ]
    grid = [
        Measured(*key, rows, (8, 16), 3.0, (8, 16), 3.0, measured)
        for rows, measured in zip((2, 256), times, strict=True)
    ]
    assert grid_tables(grid).splitlines()[2:] == [
        "| tile, order | 64 tokens | 8192 tokens |",
        "|---|---|---|",
        "| 8 × 256 | **3.0** | – |",
        "| 64 × 512, persistent, 1 together | 4.0 | 5.0 |",
        "| 64 × 512, a block a tile, 2 together | 6.0 | **4.5** |",
        "| fastest, TFLOP/s | 358 | 30542 |",
    ]


def test_the_grid_measures_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qwen_runner._emulated_kernels", reason="not built (QWEN_BUILD_TESTS, CUDA)")
    monkeypatch.setattr(moe_grid, "measure", lambda gpu, work: sweep_of_sizes(gpu, work, lambda *_: 1.0))
    grid = measure_grid(Gpu(emulated=True), 64, SMALL, (6,))
    assert [row.kernel for row in grid] == ["MOE_GATE_UP", "MOE_DOWN"]
    for row in grid:
        assert not row.wrong
        each = [config for config in row.times if config.endswith("True")]
        assert len(each) == len(TOGETHER) * len(ORDERED)
        assert len(set(map(label, row.times))) == len(row.times)
    assert "64 × 512, a block a tile, 16 together" in grid_tables(grid, SMALL)


def test_pytorch_needs_no_gpu(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows = sweep(experts, pytorch_methods(experts), [4, 1], torch.Generator().manual_seed(5), ten_us)
    assert [(row.tokens, row.problem) for row in rows] == [(4, "")] * 4 + [(1, "")] * 4
    assert len({row.method for row in rows}) == 4


def test_the_plot_leaves_out_what_has_no_time(tmp_path: Path) -> None:
    assert chart_moe_sweep.lines(ROWS_OF_JSON) == {"eager": [(1, 12.34)], "ours": [(1, 5.0), (4095, 1234.5)]}
    assert chart_moe_sweep.first_out_of_memory(ROWS_OF_JSON) == {"eager": 4095}
    pytest.importorskip("matplotlib", reason="not installed (pip install '.[bench]')")
    path = tmp_path / "moe_sweep.svg"
    chart_moe_sweep.draw_moe_sweep({"card": "a card", "group": 128, "sweep": ROWS_OF_JSON}, path)
    drawn = path.read_text()
    assert "a card" in drawn and "out of memory" in drawn
