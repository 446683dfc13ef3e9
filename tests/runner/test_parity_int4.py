"""The oracle for int4: a program computes what Hugging Face's model computes with the dequantized weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import fake_quantized_state_dict, load_weights
from parity import compare
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.quantize import QuantizationConfig
from random_checkpoints import SPECS, hf_model, random_prompt

# What differs from the usual: every group size, method and kind of head is in one of the cases.
OPTIONS: dict[str, dict[str, object]] = {
    "group_128": {"group_size": 128},
    "interval": {"head": "int8"},
    "sharded": {"quantize_method": "rtn"},
    "wide_heads": {"group_size": 32, "quantize_method": "rtn", "head": "int8"},
}


@pytest.mark.parametrize("name", SPECS)
def test_int4_program_equals_hugging_face_with_dequantized_weights(
    name: str, random_checkpoint: Callable[[str], Path], exported: Callable[..., Path]
) -> None:
    options = OPTIONS.get(name, {})
    quantization = QuantizationConfig(
        scheme="int4",
        group_size=int(str(options.get("group_size", 32))),
        method=str(options.get("quantize_method", "hqq")),
        head=str(options.get("head", "int8" if SPECS[name].tied else "int4")),
    )
    model = hf_model(random_checkpoint(name))
    with Checkpoint(random_checkpoint(name)) as checkpoint:
        load_weights(
            model, fake_quantized_state_dict(checkpoint, checkpoint.config, quantization, torch.float32)
        )
    program = exported(name, quantize="int4", dtype="float32", **options)
    result = compare(model, program, random_prompt(SPECS[name], 20), 64)
    assert result.tokens == result.expected
    assert max(result.logit_errors) < 1e-4
