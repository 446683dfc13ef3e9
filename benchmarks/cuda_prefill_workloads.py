"""The kernels of a prefill chunk."""

from collections.abc import Iterator
from typing import Any

import torch
from cuda_bench import (
    CACHE_HEADS,
    CHANNELS,
    DELTA_DIM,
    EPS,
    EXPERTS,
    HEAD_DIM,
    INTERMEDIATE,
    KEY_HEADS,
    LAYERS,
    QKV,
    QUERY_HEADS,
    ROTARY_DIM,
    TAPS,
    TOP_K,
    VALUE_HEADS,
    VALUES,
    Bench,
    D,
    Workload,
    rms,
    stream,
)
from qwen_runner.kernels.tolerance import relative_error


def prefill_workloads(b: Bench, tokens: int) -> Iterator[Workload]:
    m = b.module
    T = tokens
    x, residual, y = b.randn(T, D), b.randn(T, D), b.empty(T, D)
    norm_weight, norm = b.norm(D)
    slot = b.keep(torch.zeros(1, dtype=torch.int64, device="cuda"))
    linear_layers, attention_layers = LAYERS * 3 // 4, LAYERS // 4

    def rms_norm(_: int) -> None:
        m.rms_norm(x.data_ptr(), norm, y.data_ptr(), T, D, stream())

    def check_norm() -> float:
        rms_norm(0)
        return relative_error(y, rms(x, norm_weight))

    yield Workload("rms_norm", rms_norm, 4.0 * T * D, per_token=2 * LAYERS, check=check_norm)

    def linear(name: str, n: int, k: int, calls: int, with_residual: bool) -> Workload:
        weights = [b.int4(n, k) for _ in range(4)]
        source, target = b.randn(T, k), b.empty(T, n)

        def call(i: int) -> None:
            m.int4_linear_prefill(
                source.data_ptr(),
                weights[i % 4].struct,
                residual.data_ptr() if with_residual else 0,
                target.data_ptr(),
                T,
                stream(),
            )

        def check() -> float:
            call(0)
            expected = source.float() @ weights[0].dense().T
            return relative_error(target, expected + residual.float() if with_residual else expected)

        moved = weights[0].bytes + 2.0 * T * (n + k)
        return Workload(name, call, moved, 2.0 * T * n * k, calls, check)

    yield linear("delta_qkvz", CHANNELS + VALUES, D, linear_layers, with_residual=False)
    yield linear("delta_out", D, VALUES, linear_layers, with_residual=True)
    yield linear("attention_qkv", QKV, D, attention_layers, with_residual=False)
    yield linear("attention_out", D, QUERY_HEADS * HEAD_DIM, attention_layers, with_residual=True)

    def float_linear(name: str, n: int, calls: int) -> Workload:
        weight, target = b.randn(n, D, scale=D**-0.5), b.empty(T, n, dtype=torch.float32)

        def call(_: int) -> None:
            m.float_linear_prefill(x.data_ptr(), weight.data_ptr(), target.data_ptr(), T, D, n, stream())

        def check() -> float:
            call(0)
            return relative_error(target, x.float() @ weight.float().T)

        return Workload(name, call, 2.0 * n * D + 2.0 * T * D + 4.0 * T * n, 2.0 * T * n * D, calls, check)

    yield float_linear("delta_ab", 2 * VALUE_HEADS, linear_layers)

    router, router_logits = b.randn(EXPERTS, D, scale=D**-0.5), b.empty(T, EXPERTS, dtype=torch.float32)
    gate, gate_logit = b.randn(1, D, scale=D**-0.5), b.empty(T, dtype=torch.float32)

    def logits_of_both(_: int) -> None:
        m.router_logits_prefill(
            x.data_ptr(),
            router.data_ptr(),
            gate.data_ptr(),
            router_logits.data_ptr(),
            gate_logit.data_ptr(),
            T,
            D,
            EXPERTS,
            stream(),
        )

    def check_logits() -> float:
        logits_of_both(0)
        return relative_error(
            torch.cat([router_logits, gate_logit[:, None]], 1),
            x.float() @ torch.cat([router, gate]).float().T,
        )

    rows = EXPERTS + 1
    yield Workload(
        "router_logits",
        logits_of_both,
        2.0 * rows * D + 2.0 * T * D + 4.0 * T * rows,
        2.0 * T * rows * D,
        LAYERS,
        check_logits,
    )

    delta_shape = m.DeltaShape(KEY_HEADS, VALUE_HEADS, DELTA_DIM, DELTA_DIM, TAPS)
    qkvz, gates = b.randn(T, CHANNELS + VALUES), b.randn(T, 2 * VALUE_HEADS, dtype=torch.float32)
    conv_weight, conv_state = b.randn(CHANNELS, TAPS, scale=0.5), b.randn(1, CHANNELS, TAPS - 1)
    state = b.randn(1, VALUE_HEADS, DELTA_DIM, DELTA_DIM, dtype=torch.float32, scale=0.1)
    a_log, dt_bias = b.randn(VALUE_HEADS), b.randn(VALUE_HEADS)
    core, mixed = b.empty(T, VALUES, dtype=torch.float32), b.empty(T, VALUES)
    delta_scratch = b.scratch(m.delta_prefill_scratch(delta_shape, T))

    def delta(_: int) -> None:
        m.delta_prefill(
            qkvz.data_ptr(),
            gates.data_ptr(),
            conv_weight.data_ptr(),
            a_log.data_ptr(),
            dt_bias.data_ptr(),
            conv_state.data_ptr(),
            state.data_ptr(),
            slot.data_ptr(),
            core.data_ptr(),
            delta_scratch.data_ptr(),
            delta_shape,
            T,
            stream(),
        )

    moved = 2.0 * T * CHANNELS + 4.0 * T * VALUES + 8.0 * state.numel()
    yield Workload("delta_prefill", delta, moved, 8.0 * T * VALUES * DELTA_DIM, linear_layers)

    peer = _fla_delta(b, T)
    if peer:
        yield peer

    gated_norm = b.randn(DELTA_DIM, scale=0.1)

    def gated(_: int) -> None:
        m.gated_rms_norm(
            core.data_ptr(),
            qkvz.data_ptr() + 2 * CHANNELS,
            CHANNELS + VALUES,
            gated_norm.data_ptr(),
            EPS,
            mixed.data_ptr(),
            T,
            VALUE_HEADS,
            DELTA_DIM,
            stream(),
        )

    yield Workload("gated_rms_norm", gated, 8.0 * T * VALUES, per_token=linear_layers)

    shape = m.AttentionShape(QUERY_HEADS, CACHE_HEADS, HEAD_DIM, ROTARY_DIM, 1e7, EPS, T)
    qkv = b.randn(T, QKV)
    keys, values = b.empty(1, CACHE_HEADS, T, HEAD_DIM), b.empty(1, CACHE_HEADS, T, HEAD_DIM)
    q_norm, k_norm = b.randn(HEAD_DIM, scale=0.1), b.randn(HEAD_DIM, scale=0.1)
    position = b.keep(torch.zeros(1, dtype=torch.int64, device="cuda"))
    attention_scratch = b.scratch(m.attention_prefill_scratch(shape, T))

    def attention(_: int) -> None:
        m.attention_prefill(
            qkv.data_ptr(),
            q_norm.data_ptr(),
            k_norm.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            position.data_ptr(),
            slot.data_ptr(),
            attention_scratch.data_ptr(),
            mixed.data_ptr(),
            shape,
            T,
            stream(),
        )

    operations = 2.0 * T * T * QUERY_HEADS * HEAD_DIM  # half of the pairs
    yield Workload("attention", attention, 2.0 * T * (QKV + VALUES), operations, attention_layers)

    moe_shape = m.MoeShape(D, EXPERTS, TOP_K, INTERMEDIATE, INTERMEDIATE)
    logits = b.randn(T, EXPERTS).float()
    b.keep(logits)
    ids = b.keep(torch.zeros(T, TOP_K, dtype=torch.int32, device="cuda"))
    weights = b.empty(T, TOP_K, dtype=torch.float32)
    order = b.keep(torch.zeros(T * TOP_K, dtype=torch.int32, device="cuda"))
    offsets = b.keep(torch.zeros(EXPERTS + 1, dtype=torch.int32, device="cuda"))
    sort_scratch = b.scratch(m.moe_sort_scratch(moe_shape, T))

    def route(_: int) -> None:
        m.router_prefill(logits.data_ptr(), ids.data_ptr(), weights.data_ptr(), moe_shape, T, stream())

    def check_route() -> float:
        route(0)
        top = logits.softmax(-1).topk(TOP_K)
        return relative_error(weights, top.values / top.values.sum(-1, keepdim=True))

    yield Workload("router_top_k", route, 4.0 * T * EXPERTS, per_token=LAYERS, check=check_route)

    def sort(_: int) -> None:
        m.moe_sort(
            ids.data_ptr(),
            order.data_ptr(),
            offsets.data_ptr(),
            sort_scratch.data_ptr(),
            moe_shape,
            T,
            stream(),
        )

    def check_sort() -> float:
        sort(0)
        expected = ids.flatten().sort(stable=True).indices
        assert torch.equal(order.long(), expected), "choices are not sorted stably"
        return 0.0

    yield Workload("moe_sort", sort, 8.0 * T * TOP_K, per_token=LAYERS, check=check_sort)

    route(0)
    sort(0)
    chosen_experts = int((offsets[1:] > offsets[:-1]).sum())  # whose weights are read
    gate_up = [b.int4(2 * INTERMEDIATE, D, EXPERTS) for _ in range(2)]
    down = [b.int4(D, INTERMEDIATE, EXPERTS) for _ in range(2)]
    act, chosen = b.empty(T * TOP_K, INTERMEDIATE), b.empty(T * TOP_K, D)

    eight_bit_scratch = b.scratch(m.moe_8bit_scratch(moe_shape, T))
    expert_operations = 2.0 * T * TOP_K * D * INTERMEDIATE

    def gate_up_error() -> float:
        expert = EXPERTS // 2
        rows = order[offsets[expert] : offsets[expert + 1]].long() // TOP_K
        product = (x[rows].float() @ gate_up[0].dense(expert).T).unflatten(1, (-1, 2, 8))
        expected = (torch.nn.functional.silu(product[:, :, 0]) * product[:, :, 1]).flatten(1)
        return relative_error(act[offsets[expert] : offsets[expert + 1]], expected)

    def down_error() -> float:
        expert = EXPERTS // 3
        begin, end = int(offsets[expert]), int(offsets[expert + 1])
        expected = act[begin:end].float() @ down[0].dense(expert).T
        return relative_error(chosen[order[begin:end].long()], expected)

    def experts(name: str, kind: Any) -> Workload:
        """`kind` of activations; the quantization is part of the call."""
        source, matrices, target = (x, gate_up, act) if name == "gate_up" else (act, down, chosen)
        operations = expert_operations * (2 if name == "gate_up" else 1)
        error = gate_up_error if name == "gate_up" else down_error
        bfloat16 = kind == m.ExpertActivations.BFLOAT16

        def call(i: int) -> None:
            pointers = (source.data_ptr(), order.data_ptr(), offsets.data_ptr())
            arguments = (*pointers, matrices[i % 2].struct, target.data_ptr())
            sizes = (moe_shape, T, stream())
            if bfloat16:
                getattr(m, f"moe_{name}_prefill")(*arguments, *sizes)
            else:
                getattr(m, f"moe_{name}_prefill_8bit")(kind, *arguments, eight_bit_scratch.data_ptr(), *sizes)

        def check() -> float:
            call(0)
            return error()

        label = f"moe_{name}" if bfloat16 else f"moe_{name}, {kind.name.lower()}"
        moved = chosen_experts * matrices[0].bytes + 2.0 * target.numel()
        return Workload(label, call, moved, operations, LAYERS if bfloat16 else 0, check)

    for name in ("gate_up", "down"):
        for kind in (
            m.ExpertActivations.BFLOAT16,
            m.ExpertActivations.INT8,
            m.ExpertActivations.FLOAT8,
        ):
            yield experts(name, kind)

    shared_up, shared_act = b.int4(2 * INTERMEDIATE, D), b.empty(T, INTERMEDIATE)

    def swiglu(_: int) -> None:
        m.int4_swiglu_prefill(x.data_ptr(), shared_up.struct, shared_act.data_ptr(), T, stream())

    yield Workload("shared_gate_up", swiglu, shared_up.bytes, 4.0 * T * D * INTERMEDIATE, LAYERS)
    yield linear("shared_down", D, INTERMEDIATE, LAYERS, with_residual=False)

    shared, shared_logit = b.randn(T, D), b.randn(T).float()
    b.keep(shared_logit)

    def combine(_: int) -> None:
        m.moe_combine(
            weights.data_ptr(),
            chosen.data_ptr(),
            shared.data_ptr(),
            shared_logit.data_ptr(),
            residual.data_ptr(),
            y.data_ptr(),
            moe_shape,
            T,
            stream(),
        )

    def check_combine() -> float:
        combine(0)
        total = (chosen.view(T, TOP_K, D).float() * weights[..., None]).sum(1)
        return relative_error(y, residual.float() + total + shared_logit.sigmoid()[:, None] * shared.float())

    yield Workload("moe_combine", combine, 2.0 * T * (TOP_K + 3) * D, per_token=LAYERS, check=check_combine)


def _fla_delta(b: Bench, tokens: int) -> Workload | None:
    """What delta_prefill's chunks compute, by flash-linear-attention; None where that is not installed.

    Its kernels alone: convolution, gates and normalization are not part of it, as they are of delta_prefill.
    """
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    heads = (1, tokens, VALUE_HEADS)
    query, key = (
        b.keep(torch.nn.functional.normalize(b.randn(*heads, DELTA_DIM).float(), dim=-1).bfloat16())
        for _ in range(2)
    )
    value, beta = b.randn(*heads, DELTA_DIM), b.keep(b.randn(*heads).sigmoid())
    decay = b.keep(torch.nn.functional.logsigmoid(b.randn(*heads, dtype=torch.float32)))
    state = b.randn(1, VALUE_HEADS, DELTA_DIM, DELTA_DIM, dtype=torch.float32, scale=0.1)

    def call(_: int) -> None:
        chunk_gated_delta_rule(query, key, value, decay, beta, initial_state=state, output_final_state=True)

    moved = 8.0 * tokens * VALUES + 8.0 * state.numel()  # q, k, v and the result, two bytes each
    return Workload("fla_delta", call, moved, 8.0 * tokens * VALUES * DELTA_DIM, per_token=0)
