"""The gated delta rule in chunks, in float64: an oracle that is fast on a GPU, for thousands of tokens."""

import torch
from qwen_runner.kernels.gated_delta import cuda_cases as cases
from qwen_runner.kernels.gated_delta.reference import L2_EPSILON
from torch import Tensor
from torch.nn import functional

_CHUNK = 64

# q and k [T, Hv, Dk], normalized (q not yet scaled), v [T, Hv, Dv], the decay's logarithm and beta [T, Hv]
Prepared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def prepare(heads: cases.Heads, given: cases.Inputs, dtype: torch.dtype = torch.float64) -> Prepared:
    """What the rule takes: after convolution, silu and normalization, a key head repeated for its values'."""
    before = given.conv_state[int(given.slot)].to(dtype)
    history = torch.cat((before.T, given.qkvz[:, : heads.channels].to(dtype)))
    tokens, weight = len(given.qkvz), given.conv_weight.to(dtype)
    mixed = torch.zeros_like(history[:tokens])
    for tap in range(heads.taps):
        mixed += history[tap : tap + tokens] * weight[:, tap]
    key_size = heads.key_heads * heads.key_dim
    q, k, v = functional.silu(mixed).split([key_size, key_size, heads.value_size], dim=-1)
    a, b = given.gates.to(dtype).chunk(2, dim=1)
    decay = -given.a_log.to(dtype).exp() * functional.softplus(a + given.dt_bias.to(dtype))

    def repeated(x: Tensor) -> Tensor:
        x = x.unflatten(1, (heads.key_heads, heads.key_dim))
        x = x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + L2_EPSILON)
        return x.repeat_interleave(heads.value_heads // heads.key_heads, dim=1)

    return repeated(q), repeated(k), v.unflatten(1, (heads.value_heads, -1)), decay, b.sigmoid()


def gated_delta(prepared: Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
    """state [Hv, Dk, Dv] -> (core [T, Hv Dv], the state after the last token), in float64.

    Within a chunk, with A[i, j] = beta_i exp(g_i - g_j) k_i k_j for j < i, what the tokens write are the
    solution d of (1 + A) d = beta (v - exp(g) k state).
    """
    tokens, state = len(prepared[0]), state.double()
    q, k, v = (x.double().transpose(0, 1) for x in prepared[:3])  # [Hv, T, D]
    decay, beta = (x.double().T for x in prepared[3:])
    q = q * q.shape[-1] ** -0.5
    cores = []
    for begin in range(0, tokens, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        qc, kc, vc, bc = q[:, part], k[:, part], v[:, part], beta[:, part, None]
        g = decay[:, part].cumsum(dim=1)
        past = (g[:, :, None] - g[:, None, :]).tril().exp().tril()
        grown = g.exp()[..., None]
        system = (bc * past * (kc @ kc.mT)).tril(-1) + torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        written = torch.linalg.solve_triangular(
            system, bc * (vc - grown * (kc @ state)), upper=False, unitriangular=True
        )
        cores.append(grown * (qc @ state) + (past * (qc @ kc.mT)) @ written)
        left = (g[:, -1:] - g).exp()[..., None]
        state = grown[:, -1:] * state + (left * kc).mT @ written
    return torch.cat(cores, dim=1).transpose(0, 1).flatten(1), state
