"""What each kind of kernel of a prefill has to compute and, at the least, to move.

The operations are the model's own, not those that a kernel adds to them: of attention half of all pairs, of
the delta rule its form in chunks of 64 tokens, half of what is triangular. The bytes are every weight once,
in its own format, and every activation once, in bfloat16, whatever format a kernel keeps it in and however
often it reads it; what is between two kernels is written by one and read by the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

CHUNK = 64  # tokens of a chunk of the delta rule
BF16, FLOAT = 2, 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Of all kernels of a kind in a prefill."""

    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Model:
    """A program's shape: names as in its manifest."""

    vocab_size: int
    hidden_size: int
    layer_types: list[str]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    group_size: int  # of the int4 weights' scales
    head: str  # "int4" or "int8"

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Model:
        stated = manifest["model"] | manifest["quantization"]
        return cls(**{field.name: stated[field.name] for field in fields(cls)})

    def int4_bytes(self, n: int, k: int) -> float:
        """Of a matrix [N, K] with its scales."""
        return n * k / 2 + BF16 * n * math.ceil(k / self.group_size)


def _chunk_costs(model: Model, tokens: int, position: int) -> dict[str, Cost]:
    """Of so many tokens, the first of them at `position`."""
    m, T, D = model, tokens, model.hidden_size
    E, A = m.num_experts, m.num_experts_per_tok
    Ir, Is = m.moe_intermediate_size, m.shared_expert_intermediate_size
    attention_layers = m.layer_types.count("full_attention")
    delta_layers = len(m.layer_types) - attention_layers
    keys = m.linear_num_key_heads * m.linear_key_head_dim
    values = m.linear_num_value_heads * m.linear_value_head_dim
    channels = 2 * keys + values
    gates = 2 * m.linear_num_value_heads
    squares = 2 * m.linear_num_value_heads * CHUNK  # a token's rows of a chunk's two matrices
    queries = m.num_attention_heads * m.head_dim
    cached = 2 * m.num_key_value_heads * m.head_dim
    pairs = T * position + T * (T + 1) / 2
    # Choices at random: as many different experts as they are expected to touch.
    touched = E * (1 - (1 - A / E) ** T)

    def product(n: int, k: int, residual: int = 0) -> Cost:
        return Cost(2.0 * T * n * k, m.int4_bytes(n, k) + BF16 * T * (n + k + residual))

    def float_product(n: int) -> Cost:
        return Cost(2.0 * T * n * D, BF16 * n * D + BF16 * T * D + FLOAT * T * n)

    def moved(elements: float) -> Cost:
        return Cost(0, BF16 * elements)

    delta = {
        "delta_qkvz": product(channels + values, D),
        "delta_ab": float_product(gates),
        # k k^T and q k^T, and the inverse of a triangle.
        "delta_prepare": Cost(
            T * (2.0 * CHUNK * keys + m.linear_num_value_heads * CHUNK**2 / 3),
            BF16 * T * (2 * channels + squares) + FLOAT * T * gates,
        ),
        # k S, q S and k^T N; the inverse and the mixing matrix times what is added.
        "delta_scan": Cost(
            T * values * (6.0 * m.linear_key_head_dim + 2 * CHUNK),
            BF16 * T * (channels + squares + values) + 2 * FLOAT * values * m.linear_key_head_dim,
        ),
        "gated_rms_norm": moved(3 * T * values),
        "delta_out": product(D, values, residual=D),
    }
    attention = {
        "attention_qkv": product(2 * queries + cached, D),
        "attention_heads": moved(2 * T * (queries + cached)),
        "attention": Cost(4.0 * pairs * queries, BF16 * (3 * T * queries + (position + T) * cached)),
        "attention_out": product(D, queries, residual=D),
    }
    experts = {
        "router_logits": float_product(E + 1),
        "router_top_k": Cost(0, FLOAT * T * (E + 2 * A)),
        "moe_sort": Cost(0, 2 * FLOAT * T * A),
        "moe_gate_up": Cost(
            2.0 * T * A * D * 2 * Ir, touched * m.int4_bytes(2 * Ir, D) + BF16 * T * (D + A * Ir)
        ),
        "moe_down": Cost(2.0 * T * A * D * Ir, touched * m.int4_bytes(D, Ir) + BF16 * T * A * (Ir + D)),
        "shared_gate_up": Cost(4.0 * T * D * Is, m.int4_bytes(2 * Is, D) + BF16 * T * (D + Is)),
        "shared_down": product(D, Is),
        "moe_combine": moved(T * (A + 3) * D),
    }
    head = m.int4_bytes(m.vocab_size, D) if m.head == "int4" else m.vocab_size * (D + BF16)
    costs = {
        "embedding": Cost(0, T * (D + BF16 * D)),
        "rms_norm": moved(2 * len(m.layer_types) * 2 * T * D),
        "head": Cost(2.0 * m.vocab_size * D, head),
    }
    for kinds, layers in (
        (delta, delta_layers),
        (attention, attention_layers),
        (experts, len(m.layer_types)),
    ):
        for kind, cost in kinds.items():
            costs[kind] = Cost(layers * cost.operations, layers * cost.bytes)
    return costs


def prefill_costs(model: Model, tokens: int, chunk: int) -> dict[str, Cost]:
    """By kind, of a prompt of so many tokens; kinds that are not here cost next to nothing."""
    total: dict[str, Cost] = {}
    for position in range(0, tokens, chunk):
        for kind, cost in _chunk_costs(model, min(chunk, tokens - position), position).items():
            total[kind] = total.get(kind, Cost(0, 0)) + cost
    return total
