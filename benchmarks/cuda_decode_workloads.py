"""The kernels of a decode step, one row."""

from collections.abc import Iterator

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
    VOCABULARY,
    Bench,
    D,
    Workload,
    rms,
    stream,
)
from qwen_runner.kernels.tolerance import relative_error

L2_BYTES = 128 << 20  # more than any card's


def sets_for(weight_bytes: float) -> int:
    return max(2, min(16, int(L2_BYTES / weight_bytes) + 1))


def decode_workloads(b: Bench, context: int) -> Iterator[Workload]:
    m = b.module
    x = b.randn(1, D)
    norm_weight, norm = b.norm(D)
    residual = b.randn(1, D)
    slot = b.keep(torch.zeros(1, dtype=torch.int64, device="cuda"))
    delta_shape = m.DeltaShape(KEY_HEADS, VALUE_HEADS, DELTA_DIM, DELTA_DIM, TAPS)
    linear_layers, attention_layers = LAYERS * 3 // 4, LAYERS // 4

    # Gated DeltaNet.
    n_sets = 12
    qkvz = [b.int4(CHANNELS + VALUES, D) for _ in range(n_sets)]
    ab = b.randn(2 * VALUE_HEADS, D, scale=D**-0.5)
    conv_weight, conv_state = b.randn(CHANNELS, TAPS, scale=0.5), b.randn(1, CHANNELS, TAPS - 1)
    mixed, z = b.empty(1, CHANNELS, dtype=torch.float32), b.empty(1, VALUES)
    gates = b.empty(1, 2 * VALUE_HEADS, dtype=torch.float32)

    def delta_input(i: int) -> None:
        m.delta_input_decode(
            x.data_ptr(),
            norm,
            qkvz[i % n_sets].struct,
            ab.data_ptr(),
            conv_weight.data_ptr(),
            conv_state.data_ptr(),
            slot.data_ptr(),
            mixed.data_ptr(),
            z.data_ptr(),
            gates.data_ptr(),
            delta_shape,
            1,
            stream(),
        )

    def check_delta_input() -> float:
        delta_input(0)
        return relative_error(z, rms(x, norm_weight) @ qkvz[0].dense()[CHANNELS:].T)

    yield Workload(
        "delta_input",
        delta_input,
        qkvz[0].bytes + 2 * ab.numel(),
        per_token=linear_layers,
        check=check_delta_input,
    )

    states = [
        b.randn(1, VALUE_HEADS, DELTA_DIM, DELTA_DIM, dtype=torch.float32, scale=0.1) for _ in range(32)
    ]
    a_log, dt_bias = b.randn(VALUE_HEADS), b.randn(VALUE_HEADS)
    core = b.empty(1, VALUES, dtype=torch.float32)

    def delta_step(i: int) -> None:
        m.delta_step_decode(
            mixed.data_ptr(),
            gates.data_ptr(),
            a_log.data_ptr(),
            dt_bias.data_ptr(),
            states[i % len(states)].data_ptr(),
            slot.data_ptr(),
            core.data_ptr(),
            delta_shape,
            1,
            stream(),
        )

    yield Workload("delta_step", delta_step, 8.0 * states[0].numel(), per_token=linear_layers)

    out = [b.int4(D, VALUES) for _ in range(32)]
    gated_norm, y = b.randn(DELTA_DIM, scale=0.1), b.empty(1, D)

    def delta_output(i: int) -> None:
        m.delta_output_decode(
            core.data_ptr(),
            z.data_ptr(),
            gated_norm.data_ptr(),
            EPS,
            out[i % 32].struct,
            residual.data_ptr(),
            y.data_ptr(),
            delta_shape,
            1,
            stream(),
        )

    yield Workload("delta_output", delta_output, out[0].bytes, per_token=linear_layers)

    # Attention.
    qkv_weights = [b.int4(QKV, D) for _ in range(n_sets)]
    qkv = b.empty(1, QKV)

    def qkv_linear(i: int) -> None:
        m.int4_linear_decode(
            x.data_ptr(), norm, qkv_weights[i % n_sets].struct, 0, qkv.data_ptr(), 1, stream()
        )

    def check_qkv() -> float:
        qkv_linear(0)
        return relative_error(qkv, rms(x, norm_weight) @ qkv_weights[0].dense().T)

    yield Workload(
        "attention_qkv", qkv_linear, qkv_weights[0].bytes, per_token=attention_layers, check=check_qkv
    )

    for length in sorted({context, 128, 4096, 32768}):
        cache_length = max(4096, length) + 64  # the grid depends on it
        shape = m.AttentionShape(QUERY_HEADS, CACHE_HEADS, HEAD_DIM, ROTARY_DIM, 1e7, EPS, cache_length)
        cache_bytes = 4.0 * CACHE_HEADS * length * HEAD_DIM
        cache = (1, CACHE_HEADS, cache_length, HEAD_DIM)
        caches = [(b.randn(*cache), b.randn(*cache)) for _ in range(sets_for(cache_bytes))]
        q_norm, k_norm, mixed_out = (
            b.randn(HEAD_DIM, scale=0.1),
            b.randn(HEAD_DIM, scale=0.1),
            b.empty(1, VALUES),
        )
        position = b.keep(torch.tensor([length - 1], device="cuda"))
        scratch = b.scratch(m.attention_decode_scratch(shape, 1))

        def attention(
            i: int,
            shape=shape,
            caches=caches,
            position=position,
            scratch=scratch,
            q_norm=q_norm,
            k_norm=k_norm,
            mixed_out=mixed_out,
        ) -> None:
            keys, values = caches[i % len(caches)]
            m.attention_decode(
                qkv.data_ptr(),
                q_norm.data_ptr(),
                k_norm.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                position.data_ptr(),
                slot.data_ptr(),
                scratch.data_ptr(),
                b.counters.data_ptr(),
                mixed_out.data_ptr(),
                shape,
                1,
                stream(),
            )

        yield Workload(
            f"attention@{length}",
            attention,
            cache_bytes,
            per_token=attention_layers if length == context else 0,
        )

    def attention_out(i: int) -> None:
        m.int4_linear_decode(
            z.data_ptr(), b.no_norm, out[i % 32].struct, residual.data_ptr(), y.data_ptr(), 1, stream()
        )

    yield Workload("attention_out", attention_out, out[0].bytes, per_token=attention_layers)

    # Experts.
    moe_shape = m.MoeShape(D, EXPERTS, TOP_K, INTERMEDIATE, INTERMEDIATE)
    router, shared_gate = b.randn(EXPERTS, D, scale=D**-0.5), b.randn(1, D, scale=D**-0.5)
    router_logits = b.empty(1, EXPERTS + 1, dtype=torch.float32)

    def route(_: int) -> None:
        m.router_decode(
            x.data_ptr(),
            norm,
            router.data_ptr(),
            shared_gate.data_ptr(),
            router_logits.data_ptr(),
            moe_shape,
            1,
            stream(),
        )

    def check_route() -> float:
        route(0)
        return relative_error(router_logits, rms(x, norm_weight) @ torch.cat((router, shared_gate)).float().T)

    yield Workload("router", route, 2.0 * (EXPERTS + 1) * D, per_token=LAYERS, check=check_route)

    gate_up, down = b.int4(2 * INTERMEDIATE, D, EXPERTS), b.int4(D, INTERMEDIATE, EXPERTS)
    shared_up, shared_down = b.int4(2 * INTERMEDIATE, D), b.int4(D, INTERMEDIATE)
    # Calls choose other experts, of which no two are equal.
    scores = [
        b.keep(torch.randperm(EXPERTS + 1, device="cuda", generator=b.generator)[None] * 0.0078125)
        for _ in range(32)
    ]
    act = b.empty(1, (TOP_K + 1) * INTERMEDIATE)

    def moe_gate_up(i: int) -> None:
        m.moe_gate_up_decode(
            x.data_ptr(),
            norm,
            scores[i % 32].data_ptr(),
            gate_up.struct,
            shared_up.struct,
            act.data_ptr(),
            moe_shape,
            1,
            stream(),
        )

    def check_gate_up() -> float:
        moe_gate_up(0)
        expert = int(scores[0][0, :EXPERTS].topk(TOP_K).indices[3])
        rows = (rms(x, norm_weight) @ gate_up.dense(expert).T).view(-1, 2, 8)
        expected = (torch.nn.functional.silu(rows[:, 0]) * rows[:, 1]).flatten()
        return relative_error(act[0, 3 * INTERMEDIATE : 4 * INTERMEDIATE], expected)

    yield Workload(
        "moe_gate_up", moe_gate_up, (TOP_K + 1) * gate_up.bytes, per_token=LAYERS, check=check_gate_up
    )

    def moe_down(i: int) -> None:
        m.moe_down_decode(
            act.data_ptr(),
            scores[i % 32].data_ptr(),
            down.struct,
            shared_down.struct,
            residual.data_ptr(),
            y.data_ptr(),
            moe_shape,
            1,
            stream(),
        )

    def check_down() -> float:
        moe_down(0)
        total = residual[0].float()
        top = scores[0][0, :EXPERTS].topk(TOP_K)
        shares = (*top.values.softmax(-1), scores[0][0, EXPERTS].sigmoid())
        experts = (*map(down.dense, top.indices.tolist()), shared_down.dense())
        for part, share, expert in zip(act[0].float().chunk(TOP_K + 1), shares, experts, strict=True):
            total = total + share * (part @ expert.T)
        return relative_error(y[0], total)

    yield Workload("moe_down", moe_down, (TOP_K + 1) * down.bytes, per_token=LAYERS, check=check_down)

    # The end.
    head, logits = b.int4(VOCABULARY, D), b.empty(1, VOCABULARY, dtype=torch.float32)

    def int4_head(_: int) -> None:
        m.int4_head(x.data_ptr(), norm, head.struct, logits.data_ptr(), 1, stream())

    def check_head() -> float:
        int4_head(0)
        return relative_error(logits, rms(x, norm_weight) @ head.dense().T)

    yield Workload("head", int4_head, head.bytes, check=check_head)

    seen = b.keep(torch.zeros(1, VOCABULARY, dtype=torch.uint8, device="cuda"))
    long = {
        name: b.keep(torch.zeros(1, dtype=torch.int64, device="cuda"))
        for name in ("token", "position", "seed")
    }
    later = b.keep(torch.full((1,), 1 << 40, device="cuda"))
    next_token = b.keep(torch.zeros(1, dtype=torch.int64, device="cuda"))
    zero, one = b.keep(torch.zeros(1, device="cuda")), b.keep(torch.ones(1, device="cuda"))
    sample_scratch = b.scratch(m.sample_scratch(VOCABULARY, 1))
    for label, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("sampled", 0.7, 20, 0.95),
        ("whole", 1.0, 0, 0.99),
    ):
        t, k, p = (
            b.keep(torch.tensor([temperature], device="cuda")),
            b.keep(torch.tensor([top_k], device="cuda")),
            b.keep(torch.tensor([top_p], device="cuda")),
        )
        arguments = (
            logits.data_ptr(),
            long["token"].data_ptr(),
            long["position"].data_ptr(),
            slot.data_ptr(),
            seen.data_ptr(),
            t.data_ptr(),
            k.data_ptr(),
            p.data_ptr(),
            zero.data_ptr(),
            zero.data_ptr(),
            one.data_ptr(),
            long["seed"].data_ptr(),
            later.data_ptr(),
            next_token.data_ptr(),
            1,
            1,
            VOCABULARY,
        )

        def sample(_: int, arguments=arguments) -> None:
            m.sample(*arguments, sample_scratch.data_ptr(), b.counters.data_ptr(), stream())

        def check_sample(sample=sample, label=label) -> float:
            sample(0)
            assert label != "greedy" or int(next_token) == int(logits.nan_to_num(-1e30).argmax())
            return 0.0

        yield Workload(
            f"sample_{label}", sample, 4.0 * VOCABULARY, per_token=label == "greedy", check=check_sample
        )
