"""float_linear, int8_linear, int4_linear and int8_embedding."""

from collections.abc import Callable

import pytest
import torch
from kernel_checks import Kernel, assert_kernel_matches
from qwen_runner.kernels.linear import cases, reference

DTYPES = (torch.float32, torch.bfloat16)
MAKERS = {
    "int8_linear": cases.int8_arguments,
    "int4_linear": cases.int4_arguments,
    "int8_embedding": cases.embedding_arguments,
}


def test_int4_codes_survive_packing() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = reference.pack_int4(codes)
    assert packed[0, 0] == 0x10  # -8 is code 0 in the low half, -7 is code 1 in the high half
    assert torch.equal(reference.unpack_int4(packed), codes)


def test_each_group_has_its_scale() -> None:
    codes = torch.ones(1, 6, dtype=torch.int8)
    scales = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    assert reference.dequantize(codes, scales).tolist() == [[1, 1, 2, 2, 4, 4]]


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_float_kernel_matches_reference(
    kernel: Kernel, generator: torch.Generator, case: cases.LinearCase, weight_dtype: torch.dtype
) -> None:
    arguments = cases.float_arguments(case, weight_dtype, generator)
    assert_kernel_matches(kernel, "float_linear", arguments, case.dtype)


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_quantized_kernel_matches_reference(
    kernel: Kernel, generator: torch.Generator, case: cases.LinearCase, name: str
) -> None:
    assert_kernel_matches(kernel, name, MAKERS[name](case, generator), case.dtype)


@pytest.mark.parametrize("in_features", [96, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8_linear", "int4_linear"])
def test_a_token_does_not_depend_on_the_others(
    kernel: Kernel, generator: torch.Generator, name: str, dtype: torch.dtype, in_features: int
) -> None:
    case = cases.LinearCase(11, in_features, 37, in_features // 2 if in_features == 50 else 32, dtype)
    if name in MAKERS:
        x, *weights = (
            MAKERS[name](case, generator) if in_features == 96 else _odd_groups(name, case, generator)
        )
    else:
        x, *weights = cases.float_arguments(case, getattr(torch, name), generator)
        name = "float_linear"
    whole = kernel(name, x, *weights)
    for size in (1, 2, 3, 4, 7):
        parts = [kernel(name, part.contiguous(), *weights) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), whole)


def _odd_groups(name: str, case: cases.LinearCase, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return MAKERS[name](cases.LinearCase(case.tokens, 50, case.out_features, 10, case.dtype), generator)


def test_threads_do_not_change_a_bit(
    kernel: Kernel, set_threads: Callable[[int], None], generator: torch.Generator
) -> None:
    arguments = cases.int4_arguments(cases.LinearCase(33, 512, 300, 32), generator)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(kernel("int4_linear", *arguments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_tokens_give_no_rows(kernel: Kernel) -> None:
    assert kernel("float_linear", torch.zeros(0, 8), torch.zeros(3, 8)).shape == (0, 3)


def test_nan_stays_in_its_row(kernel: Kernel, generator: torch.Generator) -> None:
    x, weight = cases.float_arguments(cases.LinearCase(5, 64, 9, 32), torch.float32, generator)
    x[2, 7] = float("nan")
    nan_rows = kernel("float_linear", x, weight).isnan()
    assert nan_rows[2].all()
    assert not nan_rows[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("bad_id", [-1, 17, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(
    kernel: Kernel, generator: torch.Generator, bad_id: int
) -> None:
    ids, *table = cases.embedding_arguments(cases.LinearCase(3, 64, 17, 32), generator)
    ids[1] = bad_id
    for function in (kernel, lambda name, *a: getattr(torch.ops.qwen, name)(*a)):
        with pytest.raises(IndexError):
            function("int8_embedding", ids, *table)


def test_shapes_that_contradict_each_other_are_refused_at_export() -> None:
    x = torch.zeros(2, 64, device="meta")
    with pytest.raises(RuntimeError, match="qweight is not"):
        torch.ops.qwen.int4_linear(
            x,
            torch.zeros(4, 64, dtype=torch.uint8, device="meta"),
            torch.zeros(4, 2, dtype=torch.bfloat16, device="meta"),
        )
