"""Every prefill kernel against float32: Qwen3.5-35B-A3B's shapes, ten seeds, 1 to 4095 tokens, each twice.

Emulated: a tiny model, one seed.
"""

import pytest
import torch
from cuda_sweep import (
    EPS,
    F32,
    FLOAT8_BOUND,
    GROUPS,
    I32,
    INT8_BOUND,
    THETA,
    Int4,
    Out,
    State,
    Sweep,
    attend,
    rms_norm,
    swiglu,
)
from delta_oracle import gated_delta, prepare
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.gated_delta import cuda_cases as delta
from torch import Tensor
from torch.nn import functional

groups = pytest.mark.parametrize("group", GROUPS)


@groups
@pytest.mark.parametrize("name", ["delta_qkvz", "delta_out", "shared_down"])
def test_linear(gpu: Gpu, group: int, name: str) -> None:
    sweep = Sweep(gpu, group)
    model = sweep.model
    n, k = {
        "delta_qkvz": (model.channels + model.values, model.hidden),
        "delta_out": (model.hidden, model.values),
        "shared_down": (model.hidden, model.shared_intermediate),
    }[name]
    for _ in sweep.seeds():
        w = sweep.int4(n, k)
        for tokens in sweep.tokens:
            x = sweep.randn(tokens, k)
            added = sweep.randn(tokens, n) if name == "delta_out" else None
            (y,) = sweep.run(gpu.module.int4_linear_prefill, x, w.struct, added, Out((tokens, n)), tokens)
            expected = x.float() @ w.dense.T
            sweep.compare(name, tokens, y, expected if added is None else expected + added.float())
    sweep.report()


@groups
def test_swiglu(gpu: Gpu, group: int) -> None:
    sweep = Sweep(gpu, group)
    width, hidden = sweep.model.shared_intermediate, sweep.model.hidden
    for _ in sweep.seeds():
        w = sweep.int4(2 * width, hidden)
        for tokens in sweep.tokens:
            x = sweep.randn(tokens, hidden)
            (y,) = sweep.run(gpu.module.int4_swiglu_prefill, x, w.struct, Out((tokens, width)), tokens)
            sweep.compare("int4_swiglu_prefill", tokens, y, swiglu(x.float() @ w.dense.T))
    sweep.report()


def test_float_linear(gpu: Gpu) -> None:
    sweep = Sweep(gpu)
    model = sweep.model
    for _ in sweep.seeds():
        for n in (2 * model.value_heads, model.experts, 1):
            w = sweep.randn(n, model.hidden, scale=model.hidden**-0.5)
            for tokens in sweep.tokens:
                x = sweep.randn(tokens, model.hidden)
                (y,) = sweep.run(
                    gpu.module.float_linear_prefill, x, w, Out((tokens, n), F32), tokens, model.hidden, n
                )
                sweep.compare("float_linear_prefill", (tokens, n), y, x.float() @ w.float().T)
    sweep.report()


def test_norms(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model = sweep.model
    heads, dim = model.value_heads, model.delta_dim
    stride = model.channels + model.values
    for _ in sweep.seeds():
        weight, norm = sweep.norm(model.hidden)
        gated_weight = (1 + sweep.randn(dim, scale=0.3)).contiguous()
        for tokens in sweep.tokens:
            x = sweep.randn(tokens, model.hidden)
            (y,) = sweep.run(m.rms_norm, x, norm, Out((tokens, model.hidden)), tokens, model.hidden)
            sweep.compare("rms_norm", tokens, y, rms_norm(x, weight))

            core, gate = sweep.randn(tokens, heads, dim, dtype=F32), sweep.randn(tokens, stride)
            (y,) = sweep.run(
                m.gated_rms_norm,
                core,
                gate,
                stride,
                gated_weight,
                EPS,
                Out((tokens, heads * dim)),
                tokens,
                heads,
                dim,
            )
            normed = core * torch.rsqrt(core.pow(2).mean(dim=-1, keepdim=True) + EPS) * gated_weight.float()
            silu = functional.silu(gate[:, : heads * dim].float())
            sweep.compare("gated_rms_norm", tokens, y, normed.flatten(1) * silu)
    sweep.report()


def test_delta(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model, name = sweep.model, "delta_prefill"
    heads = delta.Heads(model.key_heads, model.value_heads, model.delta_dim, model.delta_dim, model.taps)
    shape = m.DeltaShape(heads.key_heads, heads.value_heads, heads.key_dim, heads.value_dim, heads.taps)
    generator = torch.Generator()
    for seed in sweep.seeds():
        generator.manual_seed(seed)
        for tokens in sweep.tokens:
            # Small draws of the host, and rows of the device's: a card is waiting.
            given = delta.inputs(heads, 1, generator, gpu.device, delta.NATURES[seed % 3], slots=2)
            given.qkvz = sweep.randn(tokens, heads.channels + heads.value_size)
            given.qkvz += delta.NATURES[seed % 3].common * sweep.randn(heads.channels + heads.value_size)
            given.gates = sweep.randn(tokens, 2 * heads.value_heads).float()
            inputs = [given.qkvz, given.gates, given.conv_weight, given.a_log, given.dt_bias]
            scratch = gpu.scratch(m.delta_prefill_scratch(shape, tokens))
            conv_state, state, core = sweep.run(
                m.delta_prefill,
                *inputs,
                State(given.conv_state),
                State(given.recurrent_state),
                given.slot,
                Out((tokens, heads.value_size), F32),
                scratch,
                shape,
                tokens,
            )
            slot = int(given.slot)
            expected = gated_delta(prepare(heads, given), given.recurrent_state[slot])
            case = (tokens, delta.NATURES[seed % 3])
            sweep.compare(name, case, core, expected[0].float())
            sweep.compare(f"{name}, state", case, state[slot], expected[1].float())
            history = torch.cat((given.conv_state[slot], given.qkvz[:, : heads.channels].T), dim=1)
            sweep.require(
                f"{name}: the taps", case, torch.equal(conv_state[slot], history[:, 1 - heads.taps :])
            )
            other = torch.equal(state[1 - slot], given.recurrent_state[1 - slot])
            sweep.require(f"{name}: the other slot", case, other)
    sweep.report()


def test_attention(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model, name = sweep.model, "attention_prefill"
    heads, dim = (model.query_heads, model.cache_heads), model.head_dim
    for seed in sweep.seeds():
        norms = sweep.randn(dim, scale=0.3), sweep.randn(dim, scale=0.3)
        for tokens in sweep.tokens:
            start = 0 if (seed + tokens) % 2 else 37  # each length has both
            length = start + tokens + 5
            shape = m.AttentionShape(*heads, dim, model.rotary_dim, THETA, EPS, length)
            qkv = sweep.randn(tokens, model.qkv)
            caches = [sweep.randn(2, heads[1], length, dim) for _ in range(2)]
            for cache in caches:
                cache[0] = cache[:, :, start:] = torch.nan  # nothing may read it
            position, slot = (torch.tensor([i], device=gpu.device) for i in (start, 1))
            scratch = gpu.scratch(m.attention_prefill_scratch(shape, tokens))
            keys, values, out = sweep.run(
                m.attention_prefill,
                qkv,
                *norms,
                *map(State, caches),
                position,
                slot,
                scratch,
                Out((tokens, heads[0] * dim)),
                shape,
                tokens,
            )
            positions = start + torch.arange(tokens, device=gpu.device)
            past = caches[0][1, :, :start], caches[1][1, :, :start]
            expected, new_keys = attend(model, qkv, norms, past, positions)
            case = f"{tokens} after {start}"
            sweep.compare(name, case, out, expected)
            stored = slice(start, start + tokens)
            sweep.compare(f"{name}, keys", case, keys[1, :, stored], new_keys)
            new_values = qkv[:, -heads[1] * dim :].unflatten(1, (heads[1], dim)).transpose(0, 1)
            sweep.require(f"{name}: the values", case, torch.equal(values[1, :, stored], new_values))
            for cache, before in ((keys, caches[0]), (values, caches[1])):
                cache[1, :, stored] = torch.nan
                same = torch.equal(cache.view(torch.int16), before.view(torch.int16))
                sweep.require(f"{name}: the rest of the caches", case, same)
    sweep.report()


def test_router(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model, name = sweep.model, "router_prefill"
    shape = m.MoeShape(model.hidden, model.experts, model.top_k, model.intermediate, model.intermediate)
    for _ in sweep.seeds():
        for tokens in sweep.tokens:
            logits = (sweep.randn(tokens, model.experts, scale=2)).float()
            ids, weights = sweep.run(
                m.router_prefill,
                logits,
                Out((tokens, model.top_k), I32),
                Out((tokens, model.top_k), F32),
                shape,
                tokens,
            )
            best = logits.sort(dim=-1, descending=True, stable=True).indices[:, : model.top_k]
            sweep.require(f"{name}: the choice", tokens, torch.equal(ids.long(), best))
            sweep.compare(name, tokens, weights, logits.gather(1, best).softmax(dim=-1))
    sweep.report()


def _routings(sweep: Sweep, tokens: int) -> dict[str, Tensor]:
    """ids i32 [T, A], some with A = 1."""
    experts, top_k = sweep.model.experts, sweep.model.top_k
    scores = sweep.rand(tokens, experts)
    few = scores.clone()
    few[:, sweep.permutation(experts)[: experts // 2]] -= 2
    return {
        "random": scores.topk(top_k).indices.int(),
        "half of the experts idle": few.topk(top_k).indices.int(),
        "all tokens to the same experts": sweep.permutation(experts)[:top_k].int().repeat(tokens, 1),
        "all tokens to one expert": sweep.permutation(experts)[:1].int().repeat(tokens, 1),
    }


def _products(rows: Tensor, offsets: list[int], w: Int4) -> Tensor:
    """Rows in the order of their experts, each times its expert's matrix."""
    out = torch.empty(len(rows), w.dense.shape[1], device=rows.device)
    wide = rows.float()
    for expert, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if end > begin:
            torch.mm(wide[begin:end], w.dense[expert].T, out=out[begin:end])
    return out


@groups
@pytest.mark.parametrize("matrix", ["gate_up", "down"])
def test_experts(gpu: Gpu, group: int, matrix: str) -> None:
    """Of bfloat16 activations and of both kinds of 8 bits, after the sort of the choices."""
    sweep, m = Sweep(gpu, group), gpu.module
    model, gate_up = sweep.model, matrix == "gate_up"
    hidden, width = model.hidden, model.intermediate
    name = f"moe_{matrix}_prefill"
    for _ in sweep.seeds():
        w = (
            sweep.int4(2 * width, hidden, model.experts)
            if gate_up
            else sweep.int4(hidden, width, model.experts)
        )
        for tokens in sweep.tokens:
            for routing, ids in _routings(sweep, tokens).items():
                top_k, choices, case = ids.shape[1], ids.numel(), f"{tokens}, {routing}"
                shape = m.MoeShape(hidden, model.experts, top_k, width, width)
                scratch = gpu.scratch(m.moe_sort_scratch(shape, tokens))
                order, offsets = sweep.run(
                    m.moe_sort,
                    ids,
                    Out((choices,), I32),
                    Out((model.experts + 1,), I32),
                    scratch,
                    shape,
                    tokens,
                )
                sorted_ids, expected_order = ids.flatten().long().sort(stable=True)
                counts = torch.bincount(sorted_ids, minlength=model.experts)
                begins = [0, *counts.cumsum(0).tolist()]
                sweep.require("moe_sort: the order", case, torch.equal(order.long(), expected_order))
                sweep.require("moe_sort: the offsets", case, offsets.tolist() == begins)

                x = sweep.randn(tokens if gate_up else choices, hidden if gate_up else width)
                if gate_up:
                    expected = swiglu(_products(x[expected_order // top_k], begins, w))
                else:
                    expected = torch.empty(choices, hidden, device=gpu.device)
                    expected[expected_order] = _products(x, begins, w)
                scratch = gpu.scratch(m.moe_8bit_scratch(shape, tokens))
                inputs = (x, order, offsets, w.struct)
                output = Out(tuple(expected.shape))
                (y,) = sweep.run(getattr(m, name), *inputs, output, shape, tokens)
                sweep.compare(name, case, y, expected)
                launcher = getattr(m, f"{name}_8bit")
                for activations, bound in (("INT8", INT8_BOUND), ("FLOAT8", FLOAT8_BOUND)):
                    kind = getattr(m.ExpertActivations, activations)
                    (y,) = sweep.run(launcher, kind, *inputs, output, scratch, shape, tokens)
                    sweep.compare(f"{name}_8bit, {activations}", case, y, expected, bound)
        del w
    sweep.report()


def test_combine(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    hidden, experts, top_k = sweep.model.hidden, sweep.model.experts, sweep.model.top_k
    shape = m.MoeShape(hidden, experts, top_k, sweep.model.intermediate, sweep.model.intermediate)
    for _ in sweep.seeds():
        for tokens in sweep.tokens:
            weights = sweep.rand(tokens, top_k)
            weights /= weights.sum(dim=-1, keepdim=True)
            choices, shared = sweep.randn(tokens, top_k, hidden), sweep.randn(tokens, hidden)
            logit, residual = sweep.randn(tokens, dtype=F32), sweep.randn(tokens, hidden)
            (y,) = sweep.run(
                m.moe_combine, weights, choices, shared, logit, residual, Out((tokens, hidden)), shape, tokens
            )
            routed = (choices.float() * weights[..., None]).sum(dim=1)
            expected = residual.float() + routed + logit.sigmoid()[:, None] * shared.float()
            sweep.compare("moe_combine", tokens, y, expected)
    sweep.report()
