"""What a prefill has to compute and to move."""

import pytest
from prefill_costs import Model, prefill_costs
from small_prefill import MANIFEST

MODEL = Model.of(MANIFEST)


def test_a_product_computes_two_operations_a_weight_and_token() -> None:
    costs = prefill_costs(MODEL, 10, 100)
    assert costs["delta_qkvz"].operations == 2 * 2 * 10 * 64 * (2 * 2 * 16 + 2 * 4 * 32)
    assert costs["attention_qkv"].operations == 2 * 10 * 64 * (2 * 4 + 2 * 2) * 32
    assert costs["moe_gate_up"].operations == 3 * 2 * 10 * 2 * 64 * 2 * 96
    assert costs["shared_down"].operations == 3 * 2 * 10 * 64 * 48


def test_a_token_attends_to_itself_and_to_what_is_before_it() -> None:
    pairs = sum(range(1, 11))
    assert prefill_costs(MODEL, 10, 100)["attention"].operations == 4 * pairs * 4 * 32


@pytest.mark.parametrize("chunk", [16, 25, 99])
def test_chunks_change_no_operations_but_read_weights_again(chunk: int) -> None:
    whole, chunked = prefill_costs(MODEL, 100, 100), prefill_costs(MODEL, 100, chunk)
    assert whole.keys() == chunked.keys()
    for kind, cost in whole.items():
        if kind != "head":  # each chunk has one
            assert chunked[kind].operations == pytest.approx(cost.operations), kind
        assert chunked[kind].bytes >= cost.bytes * (1 - 1e-9), kind
    chunks = -(-100 // chunk)
    added = chunked["attention_qkv"].bytes - whole["attention_qkv"].bytes
    assert added == (chunks - 1) * MODEL.int4_bytes((2 * 4 + 2 * 2) * 32, 64)


def test_one_token_reads_its_experts_and_many_tokens_read_all() -> None:
    one = MODEL.int4_bytes(64, 96)
    for tokens, experts in ((1, 2), (1000, 8)):
        moved = 3 * 2 * tokens * 2 * (96 + 64)
        assert prefill_costs(MODEL, tokens, 1000)["moe_down"].bytes == pytest.approx(
            3 * experts * one + moved
        )


def test_a_head_may_be_int8() -> None:
    quantization = MANIFEST["quantization"] | {"head": "int8"}
    wide = Model.of(MANIFEST | {"quantization": quantization})
    assert prefill_costs(wide, 10, 100)["head"].bytes == 1000 * (64 + 2)
    assert prefill_costs(MODEL, 10, 100)["head"].bytes == 1000 * (32 + 2 * 2)
