"""A fast training forward over the modules of transformers' Qwen3_5MoeForCausalLM: its weights, its
function.

Every expert runs on every token and routing masks the result: with 16 tiny experts two large matrix
products beat sixteen gathers. The gated delta rule runs in chunks, one triangular solve each. No caches:
not for inference.

Dimensions: B sequences, T tokens, H heads, D head size, N chunks, C tokens a chunk, E experts, I expert
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
GROUP = 32
Step = Callable[..., tuple[Tensor, Tensor]]


def noisy(weight: Tensor, rate: float) -> Tensor:
    """`weight` with a random share `rate` of its int4 groups (32 values along the last axis) replaced by what
    round-to-nearest quantization makes of them; the gradient passes straight through."""
    if rate == 0.0:
        return weight
    groups = weight.detach().float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7
    rounded = (groups / scale).round().clamp(-8, 7) * scale
    chosen = torch.rand_like(scale) < rate
    return weight + torch.where(chosen, rounded - groups, 0.0).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm over the last axis in float32, scaled by `weight`."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """`x` scaled to length 1 along the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule from a zero state. q, k, v: [B, H, T, D] float32, k of unit length; log_decay, beta:
    [B, H, T]; T a multiple of CHUNK. Returns [B, H, T, Dv]."""
    q, k, v, log_decay, beta = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v, log_decay, beta))
    total = log_decay.cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~causal, -torch.inf).exp()
    k_beta = k * beta.unsqueeze(-1)
    system = (k_beta @ k.mT) * decay
    right = torch.cat((v * beta.unsqueeze(-1), k_beta * total.exp().unsqueeze(-1)), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    value, key = solved.split((v.shape[-1], k.shape[-1]), -1)
    scores = (q @ k.mT) * decay
    q = q * total.exp().unsqueeze(-1)
    k = k * (total[..., -1:] - total).exp().unsqueeze(-1)
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for n in range(q.shape[2]):
        fresh = value[:, :, n] - key[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + scores[:, :, n] @ fresh)
        state = state * total[:, :, n, -1].exp()[..., None, None] + k[:, :, n].mT @ fresh
    return torch.cat(outputs, 2)


def delta_net(net: Any, x: Tensor, rate: float) -> Tensor:
    """The DeltaNet token mixer. x: [B, T, hidden]."""
    batch, length, _ = x.shape
    mixed = F.linear(x, noisy(net.in_proj_qkv.weight, rate))
    taps = net.conv1d.weight[:, 0]  # [channels, width]
    padded = F.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    mixed = F.silu(sum(padded[:, i : i + length] * taps[:, i] for i in range(taps.shape[1])))
    q, k, v = mixed.float().split((net.key_dim, net.key_dim, net.value_dim), -1)
    q, k = (unit(t.unflatten(-1, (-1, net.head_k_dim))) for t in (q, k))
    ratio = net.num_v_heads // net.num_k_heads
    q, k = (t.repeat_interleave(ratio, 2).transpose(1, 2) for t in (q, k))
    v = v.unflatten(-1, (-1, net.head_v_dim)).transpose(1, 2)
    beta = F.linear(x, net.in_proj_b.weight).float().sigmoid().mT
    step = F.softplus(F.linear(x, net.in_proj_a.weight).float() + net.dt_bias)
    log_decay = (-net.A_log.exp() * step).mT
    with torch.autocast(x.device.type, enabled=False):
        out = gated_delta_rule(q * net.head_k_dim**-0.5, k, v, log_decay, beta).transpose(1, 2).to(x.dtype)
    gate = F.linear(x, noisy(net.in_proj_z.weight, rate)).unflatten(-1, (-1, net.head_v_dim))
    out = rms_norm(out, net.norm.weight) * F.silu(gate)
    return F.linear(out.reshape(batch, length, -1), noisy(net.out_proj.weight, rate))


def attention(net: Any, x: Tensor, cos: Tensor, sin: Tensor, rate: float) -> Tensor:
    """Grouped-query attention with output gate and partial RoPE. x: [B, T, hidden]; cos, sin: [T, rotary]."""
    q, gate = F.linear(x, noisy(net.q_proj.weight, rate)).unflatten(-1, (-1, 2 * net.head_dim)).chunk(2, -1)
    k = F.linear(x, noisy(net.k_proj.weight, rate)).unflatten(-1, (-1, net.head_dim))
    v = F.linear(x, noisy(net.v_proj.weight, rate)).unflatten(-1, (-1, net.head_dim))

    def rotated(t: Tensor, weight: Tensor) -> Tensor:
        t = rms_norm(t, 1 + weight).transpose(1, 2)
        turn, keep = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
        low, high = turn.chunk(2, -1)
        return torch.cat((turn * cos + torch.cat((-high, low), -1) * sin, keep), -1).to(x.dtype)

    q, k = rotated(q, net.q_norm.weight), rotated(k, net.k_norm.weight)
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True).transpose(
        1, 2
    )
    return F.linear((out * gate.sigmoid()).flatten(-2), noisy(net.o_proj.weight, rate))


def experts(net: Any, x: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Routed and shared experts. x: [B, T, hidden]. Returns (output, load-balancing loss, 1 when even)."""
    router, routed, shared = net.gate, net.experts, net.shared_expert
    probabilities = F.linear(x, router.weight).float().softmax(-1)  # [B, T, E]
    top, index = probabilities.topk(router.top_k, -1)
    weights = torch.zeros_like(probabilities).scatter(-1, index, top / top.sum(-1, keepdim=True))
    load = (weights.detach() > 0).float().mean((0, 1)) / router.top_k
    balance = router.num_experts * (load * probabilities.mean((0, 1))).sum()

    hidden = F.linear(x, noisy(routed.gate_up_proj, rate).flatten(0, 1)).unflatten(
        -1, (router.num_experts, -1)
    )
    gate, up = hidden.chunk(2, -1)  # [B, T, E, I]
    hidden = (F.silu(gate) * up * weights.unsqueeze(-1).to(x.dtype)).flatten(-2)
    out = F.linear(hidden, noisy(routed.down_proj, rate).transpose(0, 1).flatten(1))
    gate, up = (F.linear(x, noisy(part.weight, rate)) for part in (shared.gate_proj, shared.up_proj))
    extra = F.linear(F.silu(gate) * up, noisy(shared.down_proj.weight, rate))
    return out + F.linear(x, net.shared_expert_gate.weight).sigmoid() * extra, balance


def layer(
    net: Any, x: Tensor, cos: Tensor, sin: Tensor, dropout: float, rate: float
) -> tuple[Tensor, Tensor]:
    """One decoder layer. Returns (x, load-balancing loss)."""
    normed = rms_norm(x, 1 + net.input_layernorm.weight)
    mixed = (
        delta_net(net.linear_attn, normed, rate)
        if hasattr(net, "linear_attn")
        else attention(net.self_attn, normed, cos, sin, rate)
    )
    x = x + F.dropout(mixed, dropout)
    mixed, balance = experts(net.mlp, rms_norm(x, 1 + net.post_attention_layernorm.weight), rate)
    return x + F.dropout(mixed, dropout), balance


def rotary(config: Any, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [length, rotary], for text, whose three position axes are equal."""
    parameters = config.rope_parameters
    size = int(config.head_dim * parameters["partial_rotary_factor"])
    frequency = parameters["rope_theta"] ** (-torch.arange(0, size, 2, device=device) / size)
    angle = torch.arange(length, device=device)[:, None] * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def loss(
    model: Any, tokens: Tensor, dropout: float = 0.0, rate: float = 0.0, step: Step = layer
) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats over tokens [B, T + 1], and the mean load-balancing loss.

    `step` is `layer` or a compiled `layer`. `dropout` falls on the embedding and every branch, `rate` is the
    share that `noisy` rounds.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    cos, sin = rotary(model.config, inputs.shape[1], tokens.device)
    x = F.dropout(model.model.embed_tokens(inputs), dropout)
    balances = []
    for net in model.model.layers:
        x, balance = step(net, x, cos, sin, dropout, rate)
        balances.append(balance)
    logits = F.linear(rms_norm(x, 1 + model.model.norm.weight), model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), torch.stack(balances).mean()
