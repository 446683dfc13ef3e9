"""The name map between a checkpoint's files and the model: which tensors there are, and their shapes.

Names are those of transformers' text model, `Qwen3_5MoeForCausalLM`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# What the language model's prefix is in the files: text-only, multimodal.
PREFIX = "model."
FILE_PREFIXES = ("model.", "model.language_model.")
# The vision tower and multi-token prediction take no part in what is exported.
SKIPPED_PREFIXES = ("model.visual.", "visual.", "mtp.")
DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that the model needs.

    name: in a layer, relative to `model.layers.{i}.`.
    shape: what it must have.
    layer_type: the kind of layer that has it; None is both.
    parts: a second layout, one matrix a part and expert (`{expert}` is its number): the parts of an expert
        are concatenated along their rows, the experts stacked.
    """

    name: str
    shape: Callable[[ModelConfig], Shape]
    layer_type: str | None = None
    parts: tuple[str, ...] = ()


MODEL_TENSORS = (
    TensorSpec(EMBEDDING, lambda c: (c.vocab_size, c.hidden_size)),
    TensorSpec(FINAL_NORM, lambda c: (c.hidden_size,)),
    TensorSpec(HEAD, lambda c: (c.vocab_size, c.hidden_size)),
)

LAYER_TENSORS = (
    TensorSpec("input_layernorm.weight", lambda c: (c.hidden_size,)),
    TensorSpec(
        "linear_attn.in_proj_qkv.weight", lambda c: (c.linear_conv_size, c.hidden_size), LINEAR_ATTENTION
    ),
    TensorSpec(
        "linear_attn.in_proj_z.weight", lambda c: (c.linear_value_size, c.hidden_size), LINEAR_ATTENTION
    ),
    TensorSpec(
        "linear_attn.in_proj_b.weight", lambda c: (c.linear_num_value_heads, c.hidden_size), LINEAR_ATTENTION
    ),
    TensorSpec(
        "linear_attn.in_proj_a.weight", lambda c: (c.linear_num_value_heads, c.hidden_size), LINEAR_ATTENTION
    ),
    TensorSpec(
        "linear_attn.conv1d.weight",
        lambda c: (c.linear_conv_size, 1, c.linear_conv_kernel_dim),
        LINEAR_ATTENTION,
    ),
    TensorSpec("linear_attn.A_log", lambda c: (c.linear_num_value_heads,), LINEAR_ATTENTION),
    TensorSpec("linear_attn.dt_bias", lambda c: (c.linear_num_value_heads,), LINEAR_ATTENTION),
    TensorSpec("linear_attn.norm.weight", lambda c: (c.linear_value_head_dim,), LINEAR_ATTENTION),
    TensorSpec(
        "linear_attn.out_proj.weight", lambda c: (c.hidden_size, c.linear_value_size), LINEAR_ATTENTION
    ),
    # Each head's query rows are followed by its output gate's.
    TensorSpec("self_attn.q_proj.weight", lambda c: (2 * c.attention_size, c.hidden_size), FULL_ATTENTION),
    TensorSpec("self_attn.k_proj.weight", lambda c: (c.key_value_size, c.hidden_size), FULL_ATTENTION),
    TensorSpec("self_attn.v_proj.weight", lambda c: (c.key_value_size, c.hidden_size), FULL_ATTENTION),
    TensorSpec("self_attn.q_norm.weight", lambda c: (c.head_dim,), FULL_ATTENTION),
    TensorSpec("self_attn.k_norm.weight", lambda c: (c.head_dim,), FULL_ATTENTION),
    TensorSpec("self_attn.o_proj.weight", lambda c: (c.hidden_size, c.attention_size), FULL_ATTENTION),
    TensorSpec("post_attention_layernorm.weight", lambda c: (c.hidden_size,)),
    TensorSpec("mlp.gate.weight", lambda c: (c.num_experts, c.hidden_size)),
    TensorSpec(
        "mlp.experts.gate_up_proj",
        lambda c: (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size),
        parts=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    TensorSpec(
        "mlp.experts.down_proj",
        lambda c: (c.num_experts, c.hidden_size, c.moe_intermediate_size),
        parts=("mlp.experts.{expert}.down_proj.weight",),
    ),
    TensorSpec(
        "mlp.shared_expert.gate_proj.weight", lambda c: (c.shared_expert_intermediate_size, c.hidden_size)
    ),
    TensorSpec(
        "mlp.shared_expert.up_proj.weight", lambda c: (c.shared_expert_intermediate_size, c.hidden_size)
    ),
    TensorSpec(
        "mlp.shared_expert.down_proj.weight", lambda c: (c.hidden_size, c.shared_expert_intermediate_size)
    ),
    TensorSpec("mlp.shared_expert_gate.weight", lambda c: (1, c.hidden_size)),
)


def layer_prefix(index: int) -> str:
    """What the names of layer `index` begin with."""
    return f"model.layers.{index}."


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shapes of all tensors of the model, by name; of a tied head too."""
    shapes = {spec.name: spec.shape(config) for spec in MODEL_TENSORS}
    for index, layer_type in enumerate(config.layer_types):
        for spec in LAYER_TENSORS:
            if spec.layer_type in (None, layer_type):
                shapes[layer_prefix(index) + spec.name] = spec.shape(config)
    return shapes


def file_names(name: str) -> tuple[str, ...]:
    """What files may call the tensor `name`."""
    if not name.startswith(PREFIX):
        return (name,)
    return tuple(prefix + name.removeprefix(PREFIX) for prefix in FILE_PREFIXES)
