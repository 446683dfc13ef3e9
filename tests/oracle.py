"""What transformers computes with the weights that a quantized program has."""

from collections.abc import Mapping

import torch
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.config import ModelConfig
from qwen_runner.export.quantize import (
    QuantizationConfig,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    weight_kind,
)
from transformers import Qwen3_5MoeForCausalLM


def fake_quantized_state_dict(
    checkpoint: Checkpoint, config: ModelConfig, quantization: QuantizationConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every weight by transformers' name, quantized as `weight_kind` says and back, in `dtype`."""
    group_size = quantization.group_size
    state: dict[str, torch.Tensor] = {}
    for name in checkpoint.names():
        weight = checkpoint.tensor(name)
        match weight_kind(name, quantization):
            case "int4":
                weight = dequantize_int4(*quantize_int4(weight, group_size, quantization.method))
            case "int8":
                weight = dequantize_int8(*quantize_int8(weight, group_size))
            case "keep":
                pass
        state[name] = weight.to(dtype, copy=True)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def load_weights(model: Qwen3_5MoeForCausalLM, state: Mapping[str, torch.Tensor]) -> None:
    """Replaces all weights of `model` by those of `state`."""
    model.load_state_dict(state, strict=True)
