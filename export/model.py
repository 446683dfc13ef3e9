"""The Qwen3.5-MoE language model as it is exported: for prefill and decode, state and sampling included.

B rows of a decode step, T tokens of a prefill chunk, D hidden size, S state slots, V vocabulary. Rounding
follows transformers' Qwen3_5MoeForCausalLM, whose logits are the oracle. In eager mode the operators run
their references.
"""

from collections.abc import Callable

import torch
from qwen_runner.kernels.norm import rms_norm
from torch import Tensor, nn

from .attention import Attention
from .config import FULL_ATTENTION, ModelConfig
from .deltanet import GatedDeltaNet
from .linear import WeightSource
from .moe import SparseMoe


class DecoderLayer(nn.Module):
    """x [T, D] -> [T, D]: a token mixer, then a mixture of experts, each behind a norm, beside a residual."""

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
        self.eps = config.rms_norm_eps
        self.input_layernorm = source.parameter("input_layernorm.weight")
        if kind == FULL_ATTENTION:
            self.self_attn = Attention(
                config, source.scope("self_attn."), slots=slots, max_seq_len=max_seq_len, dtype=dtype
            )
        else:
            self.linear_attn = GatedDeltaNet(config, source.scope("linear_attn."), slots=slots, dtype=dtype)
        self.kind = kind
        self.post_attention_layernorm = source.parameter("post_attention_layernorm.weight")
        self.mlp = SparseMoe(config, source.scope("mlp."))

    def forward(self, x: Tensor, positions: Tensor, position: Tensor, slot: Tensor) -> Tensor:
        normed = rms_norm(x, self.input_layernorm, self.eps)
        if self.kind == FULL_ATTENTION:
            x = x + self.self_attn(normed, positions, position, slot)
        else:
            x = x + self.linear_attn(normed, slot)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps))


class Model(nn.Module):
    """Tokens in, next token and logits out. Weights are parameters, state is buffers; slots start zeroed."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """Takes the weights out of `source`, calling `on_layer` with the index of each layer as it begins."""
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embed_tokens = source.embedding("model.embed_tokens.weight")
        self.layers = nn.ModuleList()
        for index, kind in enumerate(config.layer_types):
            on_layer(index)
            scope = source.scope(f"model.layers.{index}.")
            self.layers.append(
                DecoderLayer(config, kind, scope, slots=slots, max_seq_len=max_seq_len, dtype=dtype)
            )
        self.norm = source.parameter("model.norm.weight")
        self.lm_head = None if config.tie_word_embeddings else source.linear("lm_head.weight")
        self.seen = nn.Buffer(torch.zeros(slots, config.vocab_size, dtype=torch.uint8))

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        slot: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        presence_penalty: Tensor,
        repetition_penalty: Tensor,
        seed: Tensor,
        generated_from: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Advances state and samples.

        Args:
            tokens: i64 [1, T] with T >= 2 (prefill: consecutive tokens of one slot) or [B, 1] (decode).
            position: i64 [B], of the first token (B = 1 in prefill).
            slot: i64 [B].
            temperature, top_p, min_p, presence_penalty, repetition_penalty: f32 [B]; see `sample`.
            top_k, seed, generated_from: i64 [B].

        Returns:
            (next_token i64 [B], logits f32 [B, V]), after the last token of each slot.
        """
        is_prefill = tokens.shape[1] > 1
        ids = tokens.flatten()
        positions = position + torch.arange(tokens.shape[1]) if is_prefill else position
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, positions, position, slot)
        x = rms_norm(x[-1:] if is_prefill else x, self.norm, self.eps)
        logits = (self.embed_tokens.project(x) if self.lm_head is None else self.lm_head(x)).float()
        next_token = torch.ops.qwen.sample(
            logits,
            ids,
            position,
            slot,
            self.seen,
            temperature,
            top_k,
            top_p,
            min_p,
            presence_penalty,
            repetition_penalty,
            seed,
            generated_from,
        )
        return next_token, logits
