"""Reads and validates a checkpoint's `config.json` and, if it is there, `generation_config.json`.

Only what the exported model implements is accepted. Keys that change nothing here (initializers, dropout,
vision, multi-token prediction) are ignored, as transformers ignores keys it does not know.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ExportError
from .json_file import JsonObject, is_integer, read_json_object

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"

_TEXT_MODEL_TYPE = "qwen3_5_moe_text"
_MULTIMODAL_MODEL_TYPE = "qwen3_5_moe"
_ARCHITECTURES = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")

# transformers' own defaults for keys a file may leave out.
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_PARTIAL_ROTARY_FACTOR = 0.25
_DEFAULT_MAX_POSITION_EMBEDDINGS = 32768
_DEFAULT_FULL_ATTENTION_INTERVAL = 4
_DEFAULT_TOP_K = 50

# Key, the values this model implements (an absent key is the first), what the first means.
_FIXED_KEYS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("hidden_act", ("silu",), "the SiLU activation"),
    ("attention_bias", (False, None), "attention without biases"),
    ("attn_output_gate", (True, None), "gated attention outputs"),
    ("norm_topk_prob", (True, None), "normalized routing weights"),
    ("decoder_sparse_step", (1, None), "a mixture of experts in every layer"),
    ("mlp_only_layers", ([], None), "a mixture of experts in every layer"),
    ("sliding_window", (None,), "attention over the whole context"),
    ("use_sliding_window", (False, None), "attention over the whole context"),
    ("quantization_config", (None,), "checkpoints in float32, bfloat16 or float16"),
)


@dataclass(frozen=True)
class SamplingDefaults:
    """How the checkpoint's authors sample; the neutral value of each field turns it off."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    min_p: float = 0.0  # 0: all
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen3.5-MoE language model. Sizes are counts of elements; every field is validated."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]  # LINEAR_ATTENTION or FULL_ATTENTION, one a layer
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # the first components of a head that are rotated; even
    rope_theta: float
    rms_norm_eps: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()  # any of them ends an answer
    sampling: SamplingDefaults = SamplingDefaults()

    @property
    def attention_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Columns of all key heads together, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def linear_key_size(self) -> int:
        """Columns of all DeltaNet keys together."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_size(self) -> int:
        """Columns of all DeltaNet values together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_size(self) -> int:
        """Channels of the DeltaNet convolution: queries, keys and values."""
        return 2 * self.linear_key_size + self.linear_value_size


def load_config(checkpoint: Path) -> ModelConfig:
    """The configuration of the checkpoint folder `checkpoint`.

    Raises:
        ExportError: no such folder or file, not JSON, a missing, mistyped or unsupported value.
    """
    if not checkpoint.is_dir():
        raise ExportError(f"{checkpoint}: no such folder; give the folder of a Hugging Face checkpoint")
    top = read_json_object(checkpoint / CONFIG_FILE)
    text = _text_section(top)
    for section in (top, text):
        _check_fixed_keys(section)
    generation_path = checkpoint / GENERATION_CONFIG_FILE
    generation = read_json_object(generation_path) if generation_path.exists() else None

    vocab_size = text.integer("vocab_size", 1)
    num_hidden_layers = text.integer("num_hidden_layers", 1)
    head_dim = text.integer("head_dim", 2)
    num_experts = text.integer("num_experts", 1)
    rope_theta, rotary_dim = _rope(text, head_dim)
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=text.integer("hidden_size", 1),
        num_hidden_layers=num_hidden_layers,
        layer_types=_layer_types(text, num_hidden_layers),
        num_attention_heads=text.integer("num_attention_heads", 1),
        num_key_value_heads=text.integer("num_key_value_heads", 1),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        rms_norm_eps=text.positive("rms_norm_eps"),
        linear_num_key_heads=text.integer("linear_num_key_heads", 1),
        linear_num_value_heads=text.integer("linear_num_value_heads", 1),
        linear_key_head_dim=text.integer("linear_key_head_dim", 1),
        linear_value_head_dim=text.integer("linear_value_head_dim", 1),
        linear_conv_kernel_dim=text.integer("linear_conv_kernel_dim", 2),
        num_experts=num_experts,
        num_experts_per_tok=text.integer("num_experts_per_tok", 1),
        moe_intermediate_size=text.integer("moe_intermediate_size", 1),
        shared_expert_intermediate_size=text.integer("shared_expert_intermediate_size", 1),
        # A multimodal checkpoint says it beside text_config: that is where its own class looks.
        tie_word_embeddings=top.boolean("tie_word_embeddings", text.boolean("tie_word_embeddings", False)),
        max_position_embeddings=text.integer("max_position_embeddings", 1, _DEFAULT_MAX_POSITION_EMBEDDINGS),
        eos_token_ids=_eos_token_ids([s for s in (generation, text, top) if s is not None], vocab_size),
        sampling=_sampling_defaults(generation) if generation is not None else SamplingDefaults(),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise text.error("num_attention_heads", _multiple_of(text, "num_key_value_heads"))
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise text.error("linear_num_value_heads", _multiple_of(text, "linear_num_key_heads"))
    if config.num_experts_per_tok > num_experts:
        raise text.error("num_experts_per_tok", f"it must be at most num_experts, {num_experts}")
    return config


def _multiple_of(section: JsonObject, key: str) -> str:
    return f"it must be a multiple of {key}, {section.values[key]}"


def _text_section(top: JsonObject) -> JsonObject:
    """The language model's part of config.json, its type and architecture checked."""
    supported = f"supported: {_TEXT_MODEL_TYPE} and {_MULTIMODAL_MODEL_TYPE}"
    if top.values.get("model_type") not in (_TEXT_MODEL_TYPE, _MULTIMODAL_MODEL_TYPE):
        raise top.error("model_type", supported)
    architectures = top.values.get("architectures")
    known = isinstance(architectures, list) and all(name in _ARCHITECTURES for name in architectures)
    if architectures is not None and not known:
        raise top.error("architectures", f"supported: {' and '.join(_ARCHITECTURES)}")
    if "text_config" not in top.values and top.values["model_type"] == _TEXT_MODEL_TYPE:
        return top
    text = top.section("text_config")
    if text.values.get("model_type", _TEXT_MODEL_TYPE) != _TEXT_MODEL_TYPE:
        raise text.error("model_type", f"supported: {_TEXT_MODEL_TYPE}")
    return text


def _check_fixed_keys(section: JsonObject) -> None:
    for key, values, meaning in _FIXED_KEYS:
        if key in section.values and not any(_same(section.values[key], value) for value in values):
            raise section.error(key, f"supported: {json.dumps(values[0])}, {meaning}")


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


def _layer_types(text: JsonObject, num_hidden_layers: int) -> tuple[str, ...]:
    kinds = text.values.get("layer_types")
    if kinds is None:
        interval = text.integer("full_attention_interval", 1, _DEFAULT_FULL_ATTENTION_INTERVAL)
        return tuple(
            LINEAR_ATTENTION if (layer + 1) % interval else FULL_ATTENTION
            for layer in range(num_hidden_layers)
        )
    if not isinstance(kinds, list) or any(kind not in (LINEAR_ATTENTION, FULL_ATTENTION) for kind in kinds):
        raise text.error("layer_types", f"supported: a list of {LINEAR_ATTENTION} and {FULL_ATTENTION}")
    if len(kinds) != num_hidden_layers:
        raise text.error("layer_types", f"it must have num_hidden_layers = {num_hidden_layers} entries")
    return tuple(kinds)


def _rope(text: JsonObject, head_dim: int) -> tuple[float, int]:
    """(rope_theta, rotary_dim) from `rope_parameters` (in older files `rope_scaling`) or beside it."""
    key = "rope_scaling" if text.values.get("rope_scaling") else "rope_parameters"
    rope = text.section(key) if text.values.get(key) is not None else JsonObject({}, text.path)
    for name in ("rope_type", "type"):
        if rope.values.get(name, "default") != "default":
            raise rope.error(name, 'supported: "default"')
    for kind in (LINEAR_ATTENTION, FULL_ATTENTION):
        if kind in rope.values:
            raise rope.error(kind, "supported: one set of parameters for all layers")
    theta = rope.positive("rope_theta", text.positive("rope_theta", _DEFAULT_ROPE_THETA))
    beside = text.number("partial_rotary_factor", 0.0, 1.0, _DEFAULT_PARTIAL_ROTARY_FACTOR)
    factor = rope.number("partial_rotary_factor", 0.0, 1.0, beside)
    rotary_dim = int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        problem = f"partial_rotary_factor {factor:g} of it is {rotary_dim}; supported: an even number from 2"
        raise text.error("head_dim", problem)
    return theta, rotary_dim


def _eos_token_ids(sections: list[JsonObject], vocab_size: int) -> tuple[int, ...]:
    """The end-of-text ids of the first of `sections` that gives any."""
    for section in sections:
        value = section.values.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(is_integer(token) and 0 <= token < vocab_size for token in ids):
            raise section.error("eos_token_id", f"it must be token ids below vocab_size, {vocab_size}")
        return tuple(dict.fromkeys(ids))
    return ()


def _sampling_defaults(generation: JsonObject) -> SamplingDefaults:
    presence_penalty = generation.number("presence_penalty", -2.0, 2.0, 0.0)
    repetition_penalty = generation.positive("repetition_penalty", 1.0)
    # Read also when greedy, so that a mistyped value is found, and dropped: they do not change an argmax.
    temperature = generation.number("temperature", 0.0, math.inf, 1.0)
    top_k = generation.integer("top_k", 0, _DEFAULT_TOP_K)
    top_p = generation.number("top_p", 0.0, 1.0, 1.0)
    min_p = generation.number("min_p", 0.0, 1.0, 0.0)
    greedy = SamplingDefaults(presence_penalty=presence_penalty, repetition_penalty=repetition_penalty)
    if not generation.boolean("do_sample", False):
        return greedy
    return replace(greedy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
