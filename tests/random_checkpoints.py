"""Small random Qwen3.5-MoE checkpoints in every layout of real ones, and what transformers makes of them.

The weights are scaled so that the logits are well spread (a standard deviation of about 3) and greedy text
does not repeat: an arg-max then survives float32 rounding, and comparing tokens means something.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER_SIZE, tokenizer_json
from safetensors.torch import save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5MoeVisionConfig

LOGIT_DEVIATION = 3.0


@dataclass(frozen=True)
class Spec:
    """What one checkpoint is. Every matrix has a multiple of 32 columns, so that int4 groups fit."""

    seed: int
    layers: str  # a letter a layer: L linear attention, F full attention
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    partial_rotary: float = 0.25
    rope_theta: float = 10_000.0
    linear_key_heads: int = 2
    linear_value_heads: int = 4
    linear_key_dim: int = 16
    linear_value_dim: int = 16
    conv_width: int = 4
    experts: int = 8
    top_k: int = 2
    expert_width: int = 32
    shared_width: int = 32
    vocab: int = 320
    tied: bool = False
    per_expert: bool = False  # experts stored matrix by matrix, not fused
    nested: bool = False  # a multimodal checkpoint: text_config, vision tower, multi-token prediction
    old_rope: bool = False  # rope_theta and partial_rotary_factor at the top level
    stored_tied_head: bool = False  # the files hold a copy of the tied head
    shards: int = 1
    dtype: torch.dtype = torch.float32
    chat: bool = False


SPECS: dict[str, Spec] = {
    "smallest": Spec(
        1, "LF", hidden=32, heads=1, kv_heads=1, experts=4, linear_key_heads=1, linear_value_heads=2
    ),
    "interval": Spec(2, "LLLF", chat=True),
    "linear_only": Spec(
        3, "LL", hidden=96, linear_key_heads=4, linear_value_heads=4, linear_value_dim=8, conv_width=2
    ),
    "full_only": Spec(4, "FF", heads=6, kv_heads=3, head_dim=16, partial_rotary=1.0, experts=16, top_k=4),
    "one_layer": Spec(5, "L", conv_width=3, linear_key_dim=32, experts=32, top_k=8, vocab=512),
    "tied": Spec(6, "LLF", tied=True, shared_width=96, top_k=1),
    "tied_stored": Spec(
        7, "FL", tied=True, stored_tied_head=True, hidden=128, vocab=333, dtype=torch.bfloat16
    ),
    "per_expert": Spec(8, "LFLF", per_expert=True, experts=12, top_k=3, expert_width=64),
    "nested": Spec(
        9, "LLLF", nested=True, heads=8, kv_heads=1, linear_value_heads=8, rope_theta=1e6, chat=True
    ),
    "nested_per_expert": Spec(
        10, "LFL", nested=True, per_expert=True, tied=True, experts=6, top_k=6, shards=3
    ),
    "sharded": Spec(11, "LLFLLF", shards=4, hidden=128, vocab=1000, linear_value_dim=32, conv_width=3),
    "wide_heads": Spec(
        12, "LF", heads=2, head_dim=64, partial_rotary=0.5, linear_key_dim=64, linear_value_dim=64
    ),
    "old_rope": Spec(13, "FLF", old_rope=True, partial_rotary=0.75, rope_theta=5e5, heads=4, kv_heads=4),
    "bfloat16": Spec(
        14, "LLLF", dtype=torch.bfloat16, linear_key_heads=1, linear_value_heads=6, shared_width=128
    ),
    "group_128": Spec(
        16, "LF", hidden=128, head_dim=64, linear_value_dim=32, expert_width=128, shared_width=128, experts=4
    ),
}


def make_checkpoint(path: Path, name: str) -> Spec:
    """Writes the checkpoint `SPECS[name]` into the new folder `path`: the same bytes at every call."""
    spec = SPECS[name]
    path.mkdir(parents=True)
    config = text_config(spec)
    weights = {key: tensor.to(spec.dtype) for key, tensor in _random_weights(config, spec).items()}
    _write_json(path / "config.json", _config_json(config, spec))
    _write_weights(path, _stored(weights, spec), spec.shards)
    _write_tokenizer(path, spec)
    return spec


def text_config(spec: Spec) -> Qwen3_5MoeTextConfig:
    kinds = {"L": "linear_attention", "F": "full_attention"}
    return Qwen3_5MoeTextConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        num_hidden_layers=len(spec.layers),
        layer_types=[kinds[letter] for letter in spec.layers],
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": spec.partial_rotary,
        },
        linear_num_key_heads=spec.linear_key_heads,
        linear_num_value_heads=spec.linear_value_heads,
        linear_key_head_dim=spec.linear_key_dim,
        linear_value_head_dim=spec.linear_value_dim,
        linear_conv_kernel_dim=spec.conv_width,
        num_experts=spec.experts,
        num_experts_per_tok=spec.top_k,
        moe_intermediate_size=spec.expert_width,
        shared_expert_intermediate_size=spec.shared_width,
        tie_word_embeddings=spec.tied,
        max_position_embeddings=512,
        eos_token_id=TOKENIZER_SIZE - 1,
    )


def hf_model(path: Path, dtype: torch.dtype = torch.float32) -> Qwen3_5MoeForCausalLM:
    """transformers' own reading of the checkpoint `path`, its weights converted to `dtype`, on the CPU.

    Raises:
        AssertionError: transformers left a parameter uninitialized or a tensor unused.
    """
    model, loading = Qwen3_5MoeForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not loading["missing_keys"], loading
    assert not loading["mismatched_keys"], loading
    unexpected = [key for key in loading["unexpected_keys"] if not key.startswith(("mtp.", "model.visual."))]
    assert not unexpected, unexpected
    return model.eval()


@torch.no_grad()
def hf_greedy(model: Qwen3_5MoeForCausalLM, prompt_ids: list[int], n: int) -> tuple[list[int], torch.Tensor]:
    """The `n` tokens that greedy decoding adds to the prompt, none ending it, and their logits f32 [n, V]."""
    # transformers has no cache for a model without a full attention layer: every step gets the whole text.
    cached = "full_attention" in model.config.layer_types
    tokens: list[int] = []
    logits = torch.empty(n, model.config.vocab_size)
    inputs, cache = prompt_ids, None
    for step in range(n):
        output = model(torch.tensor([inputs]), past_key_values=cache, use_cache=cached, logits_to_keep=1)
        logits[step] = output.logits[0, -1]
        tokens.append(int(logits[step].argmax()))
        inputs, cache = (tokens[-1:], output.past_key_values) if cached else (prompt_ids + tokens, None)
    return tokens, logits


def random_prompt(spec: Spec, length: int) -> list[int]:
    """`length` token ids, the same at every call; a shorter prompt is a prefix of a longer one."""
    generator = torch.Generator().manual_seed(spec.seed)
    return [
        int(torch.randint(TOKENIZER_SIZE - len(SPECIAL_TOKENS), (), generator=generator))
        for _ in range(length)
    ]


def _random_weights(config: Qwen3_5MoeTextConfig, spec: Spec) -> dict[str, torch.Tensor]:
    """float32 weights by the names of transformers' text model."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3_5MoeForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(shape: torch.Size, deviation: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * deviation + mean

    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" or (spec.tied and name == "model.embed_tokens.weight"):
            weights[name] = normal(shape, LOGIT_DEVIATION / math.sqrt(spec.hidden))
        elif name == "model.embed_tokens.weight":
            weights[name] = normal(shape, 1.0)
        elif name.endswith("linear_attn.norm.weight"):  # a factor; the other norms' weights are added to 1
            weights[name] = normal(shape, 0.2, 1.0)
        elif name.endswith("norm.weight"):
            weights[name] = normal(shape, 0.2)
        elif name.endswith("A_log"):  # a forgetting rate from 1 % to 70 % a token
            weights[name] = normal(shape, 1.0, -1.5)
        elif name.endswith("dt_bias"):
            weights[name] = normal(shape, 1.0, -0.5)
        elif name.endswith("conv1d.weight"):
            weights[name] = normal(shape, 1.0 / math.sqrt(spec.conv_width))
        else:  # a matrix: outputs as large as inputs, or larger where a product of gates makes them small
            gain = (
                2.0
                if name.endswith(("down_proj.weight", "down_proj", "out_proj.weight", "o_proj.weight"))
                else 1.5
            )
            weights[name] = normal(shape, gain / math.sqrt(shape[-1]))
    return weights


def _stored(weights: dict[str, torch.Tensor], spec: Spec) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` by the names and in the layout of the files."""
    for name, tensor in weights.items():
        stored_name = name.replace("model.", "model.language_model.", 1) if spec.nested else name
        if spec.per_expert and ".experts." in name:
            prefix, projection = stored_name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for expert, matrix in enumerate(tensor):
                for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                    yield f"{prefix}.{expert}.{part}.weight", rows.clone()
        else:
            yield stored_name, tensor
    if spec.stored_tied_head:
        yield "lm_head.weight", weights["model.embed_tokens.weight"].clone()
    if spec.nested:
        yield "model.visual.patch_embed.proj.weight", torch.ones(8, 3, 2, 2)
        yield "model.visual.blocks.0.attn.qkv.bias", torch.ones(24)
        yield "mtp.fc.weight", torch.ones(spec.hidden, 2 * spec.hidden)
        yield "mtp.layers.0.mlp.experts.0.up_proj.weight", torch.ones(spec.expert_width, spec.hidden)


def _write_weights(path: Path, tensors: Iterator[tuple[str, torch.Tensor]], shards: int) -> None:
    named = dict(tensors)
    if shards == 1:
        save_file(named, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):  # round robin, so that a layer's experts lie in several files
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(named.items()) if index % shards == shard}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in named.values())
    _write_json(
        path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _config_json(config: Qwen3_5MoeTextConfig, spec: Spec) -> dict[str, Any]:
    text = config.to_dict()
    text["dtype"] = str(spec.dtype).removeprefix("torch.")
    if spec.old_rope:
        rope = text.pop("rope_parameters")
        text |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    if not spec.nested:
        return text | {"architectures": ["Qwen3_5MoeForCausalLM"]}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": spec.tied,
        "text_config": text,
        "vision_config": Qwen3_5MoeVisionConfig(depth=1, hidden_size=8, num_heads=1).to_dict(),
    }


def _write_tokenizer(path: Path, spec: Spec) -> None:
    (path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    end_of_text, end_of_turn = TOKENIZER_SIZE - len(SPECIAL_TOKENS), TOKENIZER_SIZE - 1
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
    }
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    generation_config = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
    }
    _write_json(path / "generation_config.json", generation_config)
    if spec.chat:
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
