"""The model of the cuda target: each half of a layer is one operator, `qwen::*_block`, norm and all.

What it computes is what `model.py` computes, rounded in the same places. It compiles to a list of calls: all
kernels are behind the blocks. T rows, D hidden size, S slots; other letters as in the blocks' package.
"""

import torch
from torch import Tensor, nn

from .config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from .errors import ExportError
from .linear import Int4Tiles, Int8Embedding, Int8Linear, WeightSource
from .model import LanguageModel
from .tensor_table import HEAD

_HEAD_DIMS = range(16, 257, 16)
_DELTA_KEY_DIMS = (16, 32, 64, 128)
_DELTA_VALUE_DIMS = (8, *_DELTA_KEY_DIMS)
_CONV_TAPS = (2, 3, 4)
_MAX_EXPERTS, _MAX_TOP_K = 1024, 32


def check_cuda_shapes(config: ModelConfig) -> None:
    """Raises ExportError unless the CUDA kernels (`cuda.h` of each operator) take the model's shapes."""
    limits: list[tuple[str, int, range | tuple[int, ...]]] = [
        ("num_experts", config.num_experts, range(1, _MAX_EXPERTS + 1)),
        ("num_experts_per_tok", config.num_experts_per_tok, range(1, _MAX_TOP_K + 1)),
    ]
    if FULL_ATTENTION in config.layer_types:
        limits.append(("head_dim", config.head_dim, _HEAD_DIMS))
    if LINEAR_ATTENTION in config.layer_types:
        limits += [
            ("linear_key_head_dim", config.linear_key_head_dim, _DELTA_KEY_DIMS),
            ("linear_value_head_dim", config.linear_value_head_dim, _DELTA_VALUE_DIMS),
            ("linear_conv_kernel_dim", config.linear_conv_kernel_dim, _CONV_TAPS),
        ]
    for name, value, supported in limits:
        if value not in supported:
            raise ExportError(f"--target cuda: the model has {name} {value}; supported: {_range(supported)}")


def _range(values: range | tuple[int, ...]) -> str:
    if isinstance(values, tuple):
        return ", ".join(map(str, values))
    multiple = f", a multiple of {values.step}" if values.step > 1 else ""
    return f"{values[0]} to {values[-1]}{multiple}"


class DeltaNetBlock(nn.Module):
    """x [T, D] -> [T, D]. State: conv_state [S, C, W-1] and recurrent_state f32 [S, Hv, Dk, Dv]."""

    def __init__(
        self, config: ModelConfig, norm: nn.Parameter, source: WeightSource, *, slots: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_key_heads, self.eps = config.linear_num_key_heads, config.rms_norm_eps
        self.input_norm = norm
        self.qkvz = source.tiles("in_proj_qkv.weight", "in_proj_z.weight")
        self.ab = source.linear("in_proj_a.weight", "in_proj_b.weight").weight
        self.conv_weight = source.parameter("conv1d.weight", shape=(config.linear_conv_size, -1))
        self.A_log = source.parameter("A_log")
        self.dt_bias = source.parameter("dt_bias")
        self.gated_norm = source.parameter("norm.weight")
        self.out = source.tiles("out_proj.weight")
        taps, heads = config.linear_conv_kernel_dim, config.linear_num_value_heads
        self.conv_state = nn.Buffer(torch.zeros(slots, config.linear_conv_size, taps - 1, dtype=dtype))
        self.recurrent_state = nn.Buffer(
            torch.zeros(slots, heads, config.linear_key_head_dim, config.linear_value_head_dim)
        )

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        return torch.ops.qwen.deltanet_block(
            x,
            self.input_norm,
            self.qkvz.tiles,
            self.qkvz.scales,
            self.ab,
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            self.conv_state,
            self.recurrent_state,
            self.gated_norm,
            self.out.tiles,
            self.out.scales,
            slot,
            self.num_key_heads,
            self.eps,
        )


class AttentionBlock(nn.Module):
    """x [T, D] -> [T, D]. State: key_cache and value_cache, [S, Hkv, L, Dh]."""

    def __init__(
        self,
        config: ModelConfig,
        norm: nn.Parameter,
        source: WeightSource,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.input_norm = norm
        self.qkv = source.tiles("q_proj.weight", "k_proj.weight", "v_proj.weight")
        self.q_norm = source.parameter("q_norm.weight")
        self.k_norm = source.parameter("k_norm.weight")
        self.out = source.tiles("o_proj.weight")
        cache = (slots, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.key_cache = nn.Buffer(torch.zeros(cache, dtype=dtype))
        self.value_cache = nn.Buffer(torch.zeros(cache, dtype=dtype))

    def forward(self, x: Tensor, position: Tensor, slot: Tensor) -> Tensor:
        return torch.ops.qwen.attention_block(
            x,
            self.input_norm,
            self.qkv.tiles,
            self.qkv.scales,
            self.q_norm,
            self.k_norm,
            self.key_cache,
            self.value_cache,
            self.out.tiles,
            self.out.scales,
            position,
            slot,
            self.config.num_attention_heads,
            self.config.rotary_dim,
            self.config.rope_theta,
            self.config.rms_norm_eps,
        )


class MoeBlock(nn.Module):
    """x [T, D] -> [T, D]: each token's top experts, and the shared expert behind its own gate."""

    def __init__(self, config: ModelConfig, norm: nn.Parameter, source: WeightSource) -> None:
        super().__init__()
        self.top_k, self.eps = config.num_experts_per_tok, config.rms_norm_eps
        self.input_norm = norm
        self.router = source.parameter("gate.weight")
        self.shared_gate = source.parameter("shared_expert_gate.weight")
        self.gate_up = source.gate_up_tiles("experts.gate_up_proj")
        self.down = source.tiles("experts.down_proj")
        self.shared_gate_up = source.gate_up_tiles(
            "shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"
        )
        self.shared_down = source.tiles("shared_expert.down_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qwen.moe_block(
            x,
            self.input_norm,
            self.router,
            self.shared_gate,
            self.gate_up.tiles,
            self.gate_up.scales,
            self.down.tiles,
            self.down.scales,
            self.shared_gate_up.tiles,
            self.shared_gate_up.scales,
            self.shared_down.tiles,
            self.shared_down.scales,
            self.top_k,
            self.eps,
        )


class BlockLayer(nn.Module):
    """x [T, D] -> [T, D]. The token mixer's name, and so its state's, is that of the cpu's model."""

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        source: WeightSource,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.kind = kind
        norm = source.parameter("input_layernorm.weight")
        if kind == FULL_ATTENTION:
            self.self_attn = AttentionBlock(
                config, norm, source.scope("self_attn."), slots=slots, max_seq_len=max_seq_len, dtype=dtype
            )
        else:
            self.linear_attn = DeltaNetBlock(
                config, norm, source.scope("linear_attn."), slots=slots, dtype=dtype
            )
        self.mlp = MoeBlock(config, source.parameter("post_attention_layernorm.weight"), source.scope("mlp."))

    def forward(self, x: Tensor, position: Tensor, slot: Tensor) -> Tensor:
        if self.kind == FULL_ATTENTION:
            return self.mlp(self.self_attn(x, position, slot))
        return self.mlp(self.linear_attn(x, slot))


class CudaModel(LanguageModel):
    """int4 in tiles, everything else bfloat16."""

    @staticmethod
    def _layer(
        config: ModelConfig,
        kind: str,
        source: WeightSource,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> BlockLayer:
        return BlockLayer(config, kind, source, slots=slots, max_seq_len=max_seq_len, dtype=dtype)

    @staticmethod
    def _head(source: WeightSource) -> nn.Module:
        return source.head(HEAD)

    def _logits(self, ids: Tensor, position: Tensor, slot: Tensor, is_prefill: bool) -> Tensor:
        table, head = self.embed_tokens, self.lm_head or self.embed_tokens
        assert isinstance(table, Int8Embedding) and isinstance(head, Int4Tiles | Int8Linear | Int8Embedding)
        x = torch.ops.qwen.embedding_block(ids, table.qweight, table.scales)
        for layer in self.layers:
            x = layer(x, position, slot)
        return torch.ops.qwen.head_block(
            x[-1:] if is_prefill else x,
            self.norm,
            head.tiles if isinstance(head, Int4Tiles) else head.qweight,
            head.scales,
            self.config.vocab_size,
            self.config.rms_norm_eps,
        )
