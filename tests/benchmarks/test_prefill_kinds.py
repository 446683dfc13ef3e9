"""Which kernel of a prefill is which."""

import pytest
from prefill_kinds import layers, prefill_kinds
from small_prefill import (
    ATTENTION,
    BEGIN,
    DELTA,
    DENSE,
    END,
    EXPERTS,
    KINDS,
    LAYER_KINDS,
    NORM,
    PREFILL,
    multiply,
)


def test_every_kernel_of_a_prefill_has_its_kind() -> None:
    assert tuple(prefill_kinds(PREFILL)) == KINDS


def test_a_second_chunk_has_the_same_kinds() -> None:
    assert tuple(prefill_kinds(PREFILL * 2)) == KINDS * 2


@pytest.mark.parametrize(
    ("function", "has_rows"),
    [("multiply_few<128, 1, ", True), ("multiply_narrow<4, ", True), ("multiply_int8<", False)],
)
def test_products_of_other_kernels_are_told_apart(function: str, has_rows: bool) -> None:
    names = [name.replace("multiply<8, 2, 128, ", function) for name in PREFILL]
    if not has_rows:
        names = [name.split("(qwen::cuda::gemm::Output)")[0].rstrip("<, ") for name in names]
    assert tuple(prefill_kinds(names)) == KINDS


def test_an_unknown_kernel_keeps_its_name_and_moves_no_other() -> None:
    names, kinds = [], []
    for name, kind in zip(PREFILL, KINDS, strict=True):
        if kind in ("moe_gate_up", "moe_down"):  # quantized activations
            names.append("void qwen::cuda::(anonymous namespace)::quantize_rows<128>(int)")
            kinds.append("quantize_rows")
        names.append(name)
        kinds.append(kind)
    assert prefill_kinds(names) == kinds


def test_the_shared_expert_may_come_before_the_routing() -> None:
    shared = (multiply(1, DENSE), multiply(0, DENSE))
    routed = tuple(name for name in EXPERTS[1:] if name not in shared)
    kinds = prefill_kinds((*BEGIN, *ATTENTION, NORM, *shared, *routed, *END))
    at = 1 + len(ATTENTION) + 1
    assert kinds[at - 2] == "attention_out"
    assert kinds[at : at + 2] == ["shared_gate_up", "shared_down"]
    assert kinds[at + 6 : at + 8] == ["moe_gate_up", "moe_down"]


def test_norms_may_be_part_of_other_kernels() -> None:
    kinds = prefill_kinds((*BEGIN, *DELTA[1:], *EXPERTS[1:], *DELTA[1:], *EXPERTS[1:], *END))
    layer = [kind for kind in LAYER_KINDS["delta"] + LAYER_KINDS["experts"] if kind != "rms_norm"]
    assert kinds[1:-3] == layer * 2


def test_more_products_than_are_known_keep_their_name() -> None:
    kinds = prefill_kinds((*BEGIN, *DELTA, *EXPERTS[:-1], multiply(0, DENSE), EXPERTS[-1]))
    assert kinds[-3:] == ["shared_down", "multiply", "moe_combine"]


def test_layers_follow_each_other_from_the_embedding_to_the_head() -> None:
    delta, attention = len(DELTA) + len(EXPERTS), len(ATTENTION) + len(EXPERTS)
    expected = [
        ("delta", 1, 1 + delta),
        ("attention", 1 + delta, 1 + delta + attention),
        ("delta", 1 + delta + attention, 1 + 2 * delta + attention),
    ]
    assert layers(KINDS) == expected
    chunk = [(mixer, begin + len(KINDS), end + len(KINDS)) for mixer, begin, end in expected]
    assert layers(KINDS * 2) == expected + chunk


def test_without_kernels_there_are_no_layers() -> None:
    assert prefill_kinds([]) == []
    assert layers([]) == []
    assert layers(["head", "sample"]) == []
