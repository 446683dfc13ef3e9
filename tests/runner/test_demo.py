"""The demo model's programs against Hugging Face's model: tokens, logits, and what int4 costs."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import fake_quantized_state_dict, load_weights
from parity import compare
from qwen_runner import _core
from qwen_runner.export import export_program
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.quantize import QuantizationConfig
from random_checkpoints import hf_model
from transformers import Qwen3_5MoeForCausalLM

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
HELDOUT = DEMO / "heldout.txt"
SCORED_TOKENS = 4096


@pytest.fixture(scope="module")
def prompt(demo_program: Path) -> list[int]:
    return _core.Engine(str(demo_program)).tokenize(HELDOUT.read_text(encoding="utf-8")[:1500], False)


def program_perplexity(program: Path) -> float:
    output = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "perplexity.py", program, "--limit", str(SCORED_TOKENS)],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    found = re.search(r"perplexity ([\d.]+) on", output)
    assert found is not None
    return float(found[1])


def hf_perplexity(model: Qwen3_5MoeForCausalLM, tokens: list[int]) -> float:
    nats, count = 0.0, 0
    with torch.no_grad():
        for window in torch.tensor(tokens[:SCORED_TOKENS]).split(1024):
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    return float(torch.tensor(nats / count).exp())


def test_float32_program_equals_hugging_face(prompt: list[int], tmp_path: Path) -> None:
    program = export_program(DEMO, tmp_path / "demo", quantize="none", dtype="float32")
    result = compare(hf_model(DEMO), program, prompt, 64)
    assert result.tokens == result.expected
    assert max(result.logit_errors) < 1e-4


def test_int4_program_equals_hugging_face_with_dequantized_weights(
    prompt: list[int], demo_program: Path
) -> None:
    model = hf_model(DEMO)
    head = "int8" if model.config.tie_word_embeddings else "int4"
    quantization = QuantizationConfig(scheme="int4", group_size=32, method="hqq", head=head)
    with Checkpoint(DEMO) as checkpoint:
        load_weights(
            model, fake_quantized_state_dict(checkpoint, checkpoint.config, quantization, torch.float32)
        )
    result = compare(model, demo_program, prompt, 64)
    assert result.tokens == result.expected
    assert max(result.logit_errors) < 1e-4


def test_bfloat16_program_stays_near_hugging_face(
    prompt: list[int], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    program = export_program(DEMO, tmp_path / "demo", quantize="none", dtype="bfloat16")
    result = compare(hf_model(DEMO, torch.bfloat16), program, prompt, 64)
    # bfloat16 has 8 bits: the order of two near logits may turn, after which the texts differ.
    agreed = len(result.logit_errors) - (result.tokens != result.expected)
    record_property("agreeing_tokens", agreed)
    record_property("largest_logit_error", max(result.logit_errors))
    print(f"bfloat16: {agreed} of 64 greedy tokens agree, logits within {max(result.logit_errors):.4f}")
    assert max(result.logit_errors) < 5e-2


def test_int4_costs_at_most_4_percent_of_perplexity(demo_program: Path) -> None:
    tokens = _core.Engine(str(demo_program)).tokenize(HELDOUT.read_text(encoding="utf-8"), False)
    baseline = hf_perplexity(hf_model(DEMO, torch.bfloat16), tokens)
    assert program_perplexity(demo_program) <= 1.04 * baseline
