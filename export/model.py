"""The Qwen3.5-MoE language model as it is exported: for prefill and decode, state and sampling included.

B rows of a decode step, T tokens of a prefill chunk, D hidden size, S state slots, V vocabulary. Rounding
follows transformers' Qwen3_5MoeForCausalLM, whose logits are the oracle. In eager mode the operators run
their references.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from qwen_runner.kernels.norm import rms_norm
from torch import Tensor, nn

from .attention import Attention
from .config import FULL_ATTENTION, ModelConfig
from .deltanet import GatedDeltaNet
from .linear import Embedding, WeightSource
from .moe import SparseMoe
from .tensor_table import EMBEDDING, FINAL_NORM, HEAD, layer_prefix

LAYERS = "layers."  # what the names of the layers' weights and state begin with


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


class LanguageModel(nn.Module, ABC):
    """Tokens in, next token and logits out. Weights are parameters, state is buffers; slots start zeroed.

    A subclass is the model of one target: it says what a layer is and how logits come about.
    """

    embed_tokens: Embedding
    norm: nn.Parameter
    lm_head: nn.Module | None

    def __init__(
        self, config: ModelConfig, source: WeightSource, *, slots: int, max_seq_len: int, dtype: torch.dtype
    ) -> None:
        """Takes the weights out of `source`."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        self.lm_head = None
        for name, part in self.parts(config, source, slots=slots, max_seq_len=max_seq_len, dtype=dtype):
            if name.startswith(LAYERS) and isinstance(part, nn.Module):
                self.layers.append(part)
            else:
                setattr(self, name, part)
        self.seen = nn.Buffer(torch.zeros(slots, config.vocab_size, dtype=torch.uint8))

    @classmethod
    def parts(
        cls, config: ModelConfig, source: WeightSource, *, slots: int, max_seq_len: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """What has weights, by name, made one after the other: nobody needs them all in memory at a time."""
        yield "embed_tokens", source.embedding(EMBEDDING)
        for index, kind in enumerate(config.layer_types):
            scope = source.scope(layer_prefix(index))
            layer = cls._layer(config, kind, scope, slots=slots, max_seq_len=max_seq_len, dtype=dtype)
            yield f"{LAYERS}{index}", layer
        yield "norm", source.parameter(FINAL_NORM)
        if not config.tie_word_embeddings:
            yield "lm_head", cls._head(source)

    @staticmethod
    @abstractmethod
    def _layer(
        config: ModelConfig,
        kind: str,
        source: WeightSource,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> nn.Module:
        """A layer of this kind, its state zeroed."""

    @staticmethod
    @abstractmethod
    def _head(source: WeightSource) -> nn.Module:
        """The weights of a head that is not the embedding."""

    @abstractmethod
    def _logits(self, ids: Tensor, position: Tensor, slot: Tensor, is_prefill: bool) -> Tensor:
        """ids i64 [T] -> f32 [B, V]; advances the layers' state."""

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
        ids = tokens.flatten()
        logits = self._logits(ids, position, slot, is_prefill=tokens.shape[1] > 1)
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


class Model(LanguageModel):
    """The model of the cpu: small operators, and what Inductor makes of the rest."""

    @staticmethod
    def _layer(
        config: ModelConfig,
        kind: str,
        source: WeightSource,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> DecoderLayer:
        return DecoderLayer(config, kind, source, slots=slots, max_seq_len=max_seq_len, dtype=dtype)

    @staticmethod
    def _head(source: WeightSource) -> nn.Module:
        return source.linear(HEAD)

    def _logits(self, ids: Tensor, position: Tensor, slot: Tensor, is_prefill: bool) -> Tensor:
        positions = position + torch.arange(ids.shape[0]) if is_prefill else position
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, positions, position, slot)
        x = rms_norm(x[-1:] if is_prefill else x, self.norm, self.config.rms_norm_eps)
        return (self.embed_tokens.project(x) if self.lm_head is None else self.lm_head(x)).float()
