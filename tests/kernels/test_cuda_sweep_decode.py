"""Every decode kernel against float32: Qwen3.5-35B-A3B's shapes, ten seeds, 1, 3 and 8 rows, each twice.

Emulated: a tiny model, one seed.
"""

import pytest
import torch
from cuda_sweep import BF16, EPS, F32, GROUPS, THETA, Out, State, Sweep, attend, rms_norm, swiglu
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.gated_delta import reference
from qwen_runner.kernels.linear.reference import dequantize
from torch.nn import functional

groups = pytest.mark.parametrize("group", GROUPS)


@groups
def test_delta_input(gpu: Gpu, group: int) -> None:
    sweep, m = Sweep(gpu, group), gpu.module
    model, name = sweep.model, "delta_input_decode"
    hidden, channels, values = model.hidden, model.channels, model.values
    shape = m.DeltaShape(model.key_heads, model.value_heads, model.delta_dim, model.delta_dim, model.taps)
    for _ in sweep.seeds():
        w = sweep.int4(channels + values, hidden)
        ab = sweep.randn(2 * model.value_heads, hidden, scale=hidden**-0.5)
        taps = sweep.randn(channels, model.taps, scale=0.5)
        weight, norm = sweep.norm(hidden)
        for rows in sweep.rows:
            x, state = sweep.randn(rows, hidden), sweep.randn(rows + 2, channels, model.taps - 1)
            slot, others = sweep.slots(rows)
            after, mixed, z, gates = sweep.run(
                m.delta_input_decode,
                x,
                norm,
                w.struct,
                ab,
                taps,
                State(state),
                slot,
                Out((rows, channels), F32),
                Out((rows, values)),
                Out((rows, 2 * model.value_heads), F32),
                shape,
                rows,
            )
            normed = rms_norm(x, weight)
            projected = normed @ w.dense.T
            history = torch.cat((state[slot].float(), projected[:, :channels, None]), dim=2)
            expected = functional.silu((history * taps.float()).sum(dim=2))
            sweep.compare(f"{name}, mixed", rows, mixed, expected)
            sweep.compare(f"{name}, z", rows, z, projected[:, channels:])
            sweep.compare(f"{name}, gates", rows, gates, normed @ ab.float().T)
            sweep.compare(f"{name}, taps", rows, after[slot], history[:, :, 1:])
            sweep.require(f"{name}: the other slots", rows, torch.equal(after[others], state[others]))
    sweep.report()


def test_delta_step(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model, name = sweep.model, "delta_step_decode"
    sizes = (model.key_heads, model.value_heads, model.delta_dim, model.delta_dim, model.taps)
    for _ in sweep.seeds():
        a_log, dt_bias = sweep.randn(model.value_heads), sweep.randn(model.value_heads)
        for rows in sweep.rows:
            shape = m.DeltaShape(*sizes)
            mixed = functional.silu(sweep.randn(rows, model.channels, dtype=F32))
            gates = sweep.randn(rows, 2 * model.value_heads).float()
            state = (
                sweep.randn(rows + 2, model.value_heads, model.delta_dim, model.delta_dim, dtype=F32) * 0.1
            )
            slot, others = sweep.slots(rows)
            after, core = sweep.run(
                m.delta_step_decode,
                mixed,
                gates,
                a_log,
                dt_bias,
                State(state),
                slot,
                Out((rows, model.values), F32),
                shape,
                rows,
            )
            wanted = state.clone()
            a, b = gates.chunk(2, dim=1)
            decay = (-a_log.float().exp() * functional.softplus(a + dt_bias.float())).exp()
            expected = [
                reference._recur(
                    mixed[row : row + 1],
                    decay[row : row + 1],
                    b[row : row + 1].sigmoid(),
                    wanted[s],
                    model.key_heads,
                )
                for row, s in enumerate(slot.tolist())
            ]
            sweep.compare(name, rows, core, torch.cat(expected))
            sweep.compare(f"{name}, state", rows, after[slot], wanted[slot])
            sweep.require(f"{name}: the other slots", rows, torch.equal(after[others], state[others]))
    sweep.report()


@groups
def test_delta_output(gpu: Gpu, group: int) -> None:
    sweep, m = Sweep(gpu, group), gpu.module
    model, heads = sweep.model, (sweep.model.value_heads, sweep.model.delta_dim)
    shape = m.DeltaShape(model.key_heads, model.value_heads, model.delta_dim, model.delta_dim, model.taps)
    for _ in sweep.seeds():
        w = sweep.int4(model.hidden, model.values)
        weight = 1 + sweep.randn(model.delta_dim, scale=0.3)
        for rows in sweep.rows:
            core, z = sweep.randn(rows, model.values, dtype=F32), sweep.randn(rows, model.values)
            residual = sweep.randn(rows, model.hidden)
            (y,) = sweep.run(
                m.delta_output_decode,
                core,
                z,
                weight,
                EPS,
                w.struct,
                residual,
                Out((rows, model.hidden)),
                shape,
                rows,
            )
            wide = core.unflatten(1, heads)
            normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS) * weight.float()
            mixed = normed.flatten(1) * functional.silu(z.float())
            sweep.compare("delta_output_decode", rows, y, mixed @ w.dense.T + residual.float())
    sweep.report()


@groups
def test_linear(gpu: Gpu, group: int) -> None:
    sweep, m = Sweep(gpu, group), gpu.module
    model = sweep.model
    for _ in sweep.seeds():
        for name, n, k in (
            ("attention_qkv", model.qkv, model.hidden),
            ("attention_out", model.hidden, model.query_heads * model.head_dim),
        ):
            w = sweep.int4(n, k)
            weight, norm = sweep.norm(k)
            for rows in sweep.rows:
                x, residual = sweep.randn(rows, k), sweep.randn(rows, n)
                out = name == "attention_out"
                inputs = (x, m.RmsNorm(0, 0.0) if out else norm, w.struct, residual if out else None)
                (y,) = sweep.run(m.int4_linear_decode, *inputs, Out((rows, n)), rows)
                if out:
                    expected = x.float() @ w.dense.T + residual.float()
                else:
                    expected = rms_norm(x, weight) @ w.dense.T
                sweep.compare(f"int4_linear_decode {name}", rows, y, expected)
    sweep.report()


def test_attention(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model, name = sweep.model, "attention_decode"
    heads, dim = (model.query_heads, model.cache_heads), model.head_dim
    length = 130 if gpu.emulated else 4200
    depths = (0, 1, 63, 64, 129) if gpu.emulated else (0, 1, 63, 64, 500, 1641, 4094, 4199)
    for seed in sweep.seeds():
        norms = sweep.randn(dim, scale=0.3), sweep.randn(dim, scale=0.3)
        shape = m.AttentionShape(*heads, dim, model.rotary_dim, THETA, EPS, length)
        for rows in sweep.rows:
            qkv = sweep.randn(rows, model.qkv)
            slot, _ = sweep.slots(rows)
            positions = [depths[(seed + 3 * row + rows) % len(depths)] for row in range(rows)]
            caches = [sweep.randn(rows + 2, heads[1], length, dim) for _ in range(2)]
            written = torch.zeros(rows + 2, heads[1], length, 1, dtype=torch.bool, device=gpu.device)
            for s, at in zip(slot.tolist(), positions, strict=True):
                written[s, :, at] = True
                for cache in caches:
                    cache[s, :, at:] = torch.nan  # nothing may read it
            position = torch.tensor(positions, device=gpu.device)
            scratch, counters = gpu.scratch(m.attention_decode_scratch(shape, rows)), gpu.counters()
            keys, values, out = sweep.run(
                m.attention_decode,
                qkv,
                *norms,
                *map(State, caches),
                position,
                slot,
                scratch,
                counters,
                Out((rows, heads[0] * dim)),
                shape,
                rows,
            )
            new_values = qkv[:, -heads[1] * dim :].unflatten(1, (heads[1], dim))
            for row, (s, at) in enumerate(zip(slot.tolist(), positions, strict=True)):
                past = caches[0][s, :, :at], caches[1][s, :, :at]
                one = slice(row, row + 1)
                expected, new_keys = attend(model, qkv[one], norms, past, position[one])
                case = f"row {row} of {rows} at {at}"
                sweep.compare(name, case, out[one], expected)
                sweep.compare(f"{name}, keys", case, keys[s, :, at], new_keys[:, 0])
                sweep.require(f"{name}: the values", case, torch.equal(values[s, :, at], new_values[row]))
            for cache, before in ((keys, caches[0]), (values, caches[1])):
                kept = cache.masked_fill(written, 0).view(torch.int16)
                same = torch.equal(kept, before.masked_fill(written, 0).view(torch.int16))
                sweep.require(f"{name}: the rest of the caches", positions, same)
            sweep.require(f"{name}: the counters", positions, not counters.any())
    sweep.report()


def test_router(gpu: Gpu) -> None:
    sweep, m = Sweep(gpu), gpu.module
    model, name = sweep.model, "router_decode"
    hidden = model.hidden
    shape = m.MoeShape(hidden, model.experts, model.top_k, model.intermediate, model.shared_intermediate)
    for _ in sweep.seeds():
        router = sweep.randn(model.experts, hidden, scale=hidden**-0.5)
        gate = sweep.randn(1, hidden, scale=hidden**-0.5)
        weight, norm = sweep.norm(hidden)
        for rows in sweep.rows:
            x = sweep.randn(rows, hidden)
            outputs = Out((rows, model.experts + 1), F32)
            (logits,) = sweep.run(m.router_decode, x, norm, router, gate, outputs, shape, rows)
            sweep.compare(name, rows, logits, rms_norm(x, weight) @ torch.cat((router, gate)).float().T)
            sweep.require(f"{name}: the rounding", rows, torch.equal(logits, logits.bfloat16().float()))
    sweep.report()


@groups
def test_experts(gpu: Gpu, group: int) -> None:
    sweep, m = Sweep(gpu, group), gpu.module
    model, top_k = sweep.model, sweep.model.top_k
    hidden, width, shared_width = model.hidden, model.intermediate, model.shared_intermediate
    shape = m.MoeShape(hidden, model.experts, top_k, width, shared_width)
    for _ in sweep.seeds():
        gate_up, down = (sweep.int4(*size, model.experts) for size in ((2 * width, hidden), (hidden, width)))
        shared_gate_up, shared_down = sweep.int4(2 * shared_width, hidden), sweep.int4(hidden, shared_width)
        weight, norm = sweep.norm(hidden)
        for rows in sweep.rows:
            random = sweep.randn(rows, model.experts + 1).float()
            for routing, logits in (
                ("random", random),
                ("all rows to the same experts", random[:1].repeat(rows, 1)),
            ):
                case = f"{rows}, {routing}"
                x, residual = sweep.randn(rows, hidden), sweep.randn(rows, hidden)
                best, ids = logits[:, :-1].sort(dim=1, descending=True, stable=True)
                ids = ids[:, :top_k]
                (act,) = sweep.run(
                    m.moe_gate_up_decode,
                    x,
                    norm,
                    logits,
                    gate_up.struct,
                    shared_gate_up.struct,
                    Out((rows, top_k * width + shared_width)),
                    shape,
                    rows,
                )
                normed = rms_norm(x, weight)
                routed = torch.stack([gate_up.dense[row] @ normed[i] for i, row in enumerate(ids)])
                shared = swiglu(normed @ shared_gate_up.dense.T)
                expected = torch.cat((swiglu(routed).flatten(1), shared), dim=1)
                sweep.compare("moe_gate_up_decode", case, act, expected)

                (y,) = sweep.run(
                    m.moe_down_decode,
                    act,
                    logits,
                    down.struct,
                    shared_down.struct,
                    residual,
                    Out((rows, hidden)),
                    shape,
                    rows,
                )
                parts = act.float()[:, : top_k * width].unflatten(1, (top_k, width, 1))
                choices = torch.stack([down.dense[row] @ parts[i] for i, row in enumerate(ids)])[..., 0]
                shared = act.float()[:, top_k * width :] @ shared_down.dense.T
                weights = torch.cat((best[:, :top_k].softmax(dim=1), logits[:, -1:].sigmoid()), dim=1)
                expected = (torch.cat((choices, shared[:, None]), dim=1) * weights[..., None]).sum(dim=1)
                sweep.compare("moe_down_decode", case, y, residual.float() + expected)
        del gate_up, down
    sweep.report()


@groups
@pytest.mark.parametrize("kind", ["int4_head", "int8_head"])
def test_head(gpu: Gpu, group: int, kind: str) -> None:
    sweep, m = Sweep(gpu, group), gpu.module
    n, k = sweep.model.vocabulary, sweep.model.hidden
    for _ in sweep.seeds():
        weight, norm = sweep.norm(k)
        if kind == "int4_head":
            int4 = sweep.int4(n, k)
            struct, dense = int4.struct, int4.dense
        else:
            codes, scales = (
                sweep.codes(n, k, dtype=torch.int8),
                (sweep.rand(n, k // group) + 0.5) / (74 * k**0.5),
            )
            scales = scales.to(BF16)
            struct, dense = (
                m.Int8Matrix(gpu.ptr(codes), gpu.ptr(scales), n, k, group),
                dequantize(codes, scales),
            )
        for rows in sweep.rows:
            x = sweep.randn(rows, k)
            (y,) = sweep.run(getattr(m, kind), x, norm, struct, Out((rows, n), F32), rows)
            sweep.compare(kind, rows, y, rms_norm(x, weight) @ dense.T)
            sweep.require(f"{kind}: the rounding", rows, torch.equal(y, y.bfloat16().float()))
    sweep.report()
