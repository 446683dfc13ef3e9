"""The committed demo checkpoint: transformers loads it as it is, it has its features, it reads its text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"


def demo_module(name: str) -> Any:
    """Imports one of the demo's scripts, which are no package."""
    sys.path.insert(0, str(DEMO))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    return transformers.Qwen3_5MoeForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, output_loading_info=True
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def test_every_tensor_of_the_file_is_used_and_none_is_missing(loaded: tuple[Any, dict[str, Any]]) -> None:
    info = loaded[1]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_checkpoint_stays_under_20_megabytes() -> None:
    listed = subprocess.run(["git", "ls-files", "demo"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split()] or [p for p in DEMO.iterdir() if p.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000


def test_config_has_every_feature_of_the_large_model() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert config["model_type"] == "qwen3_5_moe_text"
    assert config["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["linear_num_key_heads"] < config["linear_num_value_heads"]
    assert config["num_experts"] >= 16
    assert config["num_experts_per_tok"] == 4
    assert config["shared_expert_intermediate_size"] > 0
    assert config["max_position_embeddings"] >= 2048
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "default"
    assert 0 < rope["partial_rotary_factor"] < 1
    assert 2 * sum(rope["mrope_section"]) == config["head_dim"] * rope["partial_rotary_factor"]
    inputs = {
        "hidden": config["hidden_size"],
        "expert": config["moe_intermediate_size"],
        "shared expert": config["shared_expert_intermediate_size"],
        "attention": config["num_attention_heads"] * config["head_dim"],
        "DeltaNet value": config["linear_num_value_heads"] * config["linear_value_head_dim"],
    }
    assert {name: size % 32 for name, size in inputs.items()} == dict.fromkeys(inputs, 0)


def test_every_expert_is_chosen(loaded: tuple[Any, dict[str, Any]], tokenizer: Tokenizer) -> None:
    model = loaded[0]
    tokens = torch.tensor([tokenizer.encode((DEMO / "heldout.txt").read_text()[:1500]).ids])
    with torch.no_grad():
        routers = model(tokens, use_cache=False, output_router_logits=True).router_logits
    assert len(routers) == model.config.num_hidden_layers
    for logits in routers:
        assert (
            logits.topk(model.config.num_experts_per_tok).indices.unique().numel() == model.config.num_experts
        )


def test_perplexity_of_the_first_4_kilobytes_is_what_the_readme_says(
    loaded: tuple[Any, dict[str, Any]], tokenizer: Tokenizer
) -> None:
    row = re.search(r"first 4 KB[^|]*\|\s*([\d.]+)\s*\|", (DEMO / "README.md").read_text())
    assert row, "demo/README.md has no row for the first 4 KB"
    text = (DEMO / "heldout.txt").read_bytes()[:4096].decode("utf-8", "ignore")
    result = demo_module("perplexity").score(loaded[0], tokenizer, text)
    assert result.perplexity == pytest.approx(float(row.group(1)), rel=0.005)


def test_training_forward_is_the_function_that_transformers_computes(
    loaded: tuple[Any, dict[str, Any]],
) -> None:
    model = loaded[0]
    tokens = torch.randint(0, model.config.vocab_size, (2, 129), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        actual, _ = demo_module("forward").loss(model, tokens)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "It is a truth universally acknowledged, that 1813 isn't 2024.",
        "  spaces\t\ttabs\r\n\r\nlines \n",
        "e\u0301 \u0928\u093f \u0e01\u0e33 \u6f22\u5b57 \u0627\u0644\u0639 \U0001f600\u200d\U0001f525",
        "<|im_start|>user\nHello<|im_end|>\n<think>\n\n</think>",
    ],
)
def test_tokenizer_round_trip_and_transformers_agreement(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    assert transformers.AutoTokenizer.from_pretrained(DEMO)(text).input_ids == ids


def test_end_tokens_and_vocabulary_agree_across_files(tokenizer: Tokenizer) -> None:
    config, generation = (
        json.loads((DEMO / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert config["eos_token_id"] == generation["eos_token_id"] == ends
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_chat_template_opens_and_closes_thinking() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Hello! "}]
    history = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )
    for thinking, opening in ((True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert rendered == history + opening
    with pytest.raises(Exception, match="first"):
        tokenizer.apply_chat_template(messages[::-1], tokenize=False)
