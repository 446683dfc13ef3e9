"""The CUDA attention kernels against PyTorch: results, caches, what may not be read or depended on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from qwen_runner.kernels.attention import cuda_cases as cases
from qwen_runner.kernels.cuda_native import Gpu


def _native_shape(gpu: Gpu, heads: cases.Heads, cache_length: int) -> Any:
    return gpu.module.AttentionShape(
        heads.query_heads,
        heads.key_heads,
        heads.head_dim,
        heads.rotary_dim,
        heads.theta,
        heads.eps,
        cache_length,
    )


def _run(
    gpu: Gpu, heads: cases.Heads, given: cases.Inputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, key_cache, value_cache) of the kernel, decode if each row has its slot; keeps `given`."""
    shape = _native_shape(gpu, heads, given.key_cache.shape[2])
    rows, m = len(given.qkv), gpu.module
    decode = len(given.slot) == rows
    scratch_bytes = (m.attention_decode_scratch if decode else m.attention_prefill_scratch)(shape, rows)
    scratch = gpu.scratch(scratch_bytes)
    out = gpu.poisoned(rows, heads.query_heads * heads.head_dim, dtype=torch.bfloat16)
    given = replace(given, key_cache=given.key_cache.clone(), value_cache=given.value_cache.clone())
    pointers = [gpu.ptr(tensor) for tensor in vars(given).values()] + [gpu.ptr(scratch)]
    if decode:
        counters = gpu.counters()
        m.attention_decode(*pointers, gpu.ptr(counters), gpu.ptr(out), shape, rows, gpu.stream())
        gpu.synchronize()
        assert not counters.any()
    else:
        m.attention_prefill(*pointers, gpu.ptr(out), shape, rows, gpu.stream())
        gpu.synchronize()
    return out, given.key_cache, given.value_cache


def _difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _check(gpu: Gpu, heads: cases.Heads, given: cases.Inputs) -> None:
    out, key_cache, value_cache = _run(gpu, heads, given)
    wanted_out, wanted_keys, wanted_values = cases.expected(heads, given)
    assert _difference(out, wanted_out) < 5e-3
    assert torch.equal(value_cache.nan_to_num(7.0), wanted_values.nan_to_num(7.0))
    # Keys differ by single roundings, and not where no row has its place.
    assert torch.equal(key_cache.isnan(), wanted_keys.isnan())
    stored = ~wanted_keys.isnan()
    assert _difference(key_cache[stored], wanted_keys[stored]) < 1e-3
    before = ~given.key_cache.isnan()
    assert torch.equal(key_cache[before], given.key_cache[before])
    again = _run(gpu, heads, given)
    for first, second in zip((out, key_cache, value_cache), again, strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


@pytest.mark.parametrize("positions", cases.DECODE_POSITIONS, ids=str)
@pytest.mark.parametrize("heads", cases.HEADS, ids=str)
def test_cuda_attention_decode(
    gpu: Gpu, generator: torch.Generator, heads: cases.Heads, positions: list[int]
) -> None:
    _check(gpu, heads, cases.inputs(heads, len(positions), positions, 201, generator, gpu.device))


@pytest.mark.parametrize(("heads", "positions"), cases.LONG_DECODE, ids=str)
def test_cuda_attention_decode_of_long_contexts(
    gpu: Gpu, generator: torch.Generator, heads: cases.Heads, positions: list[int]
) -> None:
    given = cases.inputs(heads, len(positions), positions, max(positions) + 1, generator, gpu.device)
    _check(gpu, heads, given)


@pytest.mark.parametrize("cluster", ["8", "1"])
@pytest.mark.parametrize(
    ("heads", "positions"),
    [
        (cases.FULL, [65, 40]),
        (cases.Heads(12, 1, 128, 32), [2047, 1040, 17]),
        (cases.Heads(6, 3, 16, 16), [0, 1, 700, 64, 65, 200, 1300, 17]),
    ],
    ids=str,
)
def test_cuda_attention_decode_in_any_order(
    gpu: Gpu,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    heads: cases.Heads,
    positions: list[int],
    cluster: str,
) -> None:
    if not gpu.emulated:
        pytest.skip("a GPU has its own order")
    monkeypatch.setenv("QWEN_EMULATED_CLUSTER", cluster)
    given = cases.inputs(heads, len(positions), positions, max(positions) + 1, generator, gpu.device)
    _check(gpu, heads, given)
    forwards = _run(gpu, heads, given)
    monkeypatch.setenv("QWEN_EMULATION_ORDER", "reverse")
    for first, second in zip(forwards, _run(gpu, heads, given), strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


@pytest.mark.parametrize("heads", [cases.Heads(9, 3, 32, 8), cases.Heads(4, 2, 64, 16)], ids=str)
def test_cuda_attention_decode_of_a_row_depends_on_no_other(
    gpu: Gpu, generator: torch.Generator, heads: cases.Heads
) -> None:
    given = cases.inputs(heads, 8, [5, 1500, 17, 1599, 64, 800, 0, 900], 1600, generator, gpu.device)
    together = _run(gpu, heads, given)[0]
    for rows in ([0], [3], [7, 2, 1]):
        alone = replace(
            given,
            qkv=given.qkv[rows].contiguous(),
            position=given.position[rows].contiguous(),
            slot=given.slot[rows].contiguous(),
        )
        assert torch.equal(_run(gpu, heads, alone)[0], together[rows])


@pytest.mark.parametrize(("tokens", "position"), cases.PREFILL)
@pytest.mark.parametrize("heads", cases.HEADS, ids=str)
def test_cuda_attention_prefill(
    gpu: Gpu, generator: torch.Generator, heads: cases.Heads, tokens: int, position: int
) -> None:
    if gpu.emulated and heads.head_dim >= 128 and tokens > 65:
        pytest.skip("slow without a GPU")
    _check(gpu, heads, cases.inputs(heads, tokens, [position], 190, generator, gpu.device))


@pytest.mark.parametrize(("tokens", "position"), cases.FULL_PREFILL)
def test_cuda_attention_prefill_of_the_full_shape(
    gpu: Gpu, generator: torch.Generator, tokens: int, position: int
) -> None:
    if gpu.emulated:
        pytest.skip("slow without a GPU")
    given = cases.inputs(cases.FULL, tokens, [position], 4096, generator, gpu.device)
    _check(gpu, cases.FULL, given)


@pytest.mark.parametrize(("heads", "tokens", "position"), cases.CONTINUED_PREFILL, ids=str)
def test_cuda_attention_prefill_after_a_long_context(
    gpu: Gpu, generator: torch.Generator, heads: cases.Heads, tokens: int, position: int
) -> None:
    if gpu.emulated:
        pytest.skip("slow without a GPU")
    _check(gpu, heads, cases.inputs(heads, tokens, [position], 3100, generator, gpu.device))


@pytest.mark.parametrize("position", [32767, 105616, 262140])
def test_cuda_attention_rotates_far_positions(gpu: Gpu, generator: torch.Generator, position: int) -> None:
    heads = cases.Heads(1, 1, 64, 64)
    given = cases.inputs(heads, 1, [position], position + 1, generator, gpu.device)
    key_cache = _run(gpu, heads, given)[1]
    wanted = cases.expected(heads, given)[1]
    assert _difference(key_cache[1, 0, position], wanted[1, 0, position]) < 2e-3


def test_cuda_attention_prefill_is_decode_token_by_token(gpu: Gpu, generator: torch.Generator) -> None:
    heads = cases.Heads(4, 2, 64, 16)
    given = cases.inputs(heads, 20, [37], 64, generator, gpu.device)
    out, key_cache, value_cache = _run(gpu, heads, given)
    step = given
    for token in range(20):
        step = replace(step, qkv=given.qkv[token : token + 1].contiguous(), position=given.position + token)
        row, keys, values = _run(gpu, heads, step)
        step = replace(step, key_cache=keys, value_cache=values)
        assert _difference(row[0], out[token]) < 1e-2
    assert torch.equal(step.key_cache.nan_to_num(7.0), key_cache.nan_to_num(7.0))
    assert torch.equal(step.value_cache.nan_to_num(7.0), value_cache.nan_to_num(7.0))
