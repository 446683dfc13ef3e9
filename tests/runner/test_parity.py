"""The oracle: an exported program computes what Hugging Face's own model computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from parity import compare
from random_checkpoints import SPECS, hf_model, random_prompt


@pytest.mark.parametrize("name", SPECS)
def test_float32_program_equals_hugging_face(
    name: str, random_checkpoint: Callable[[str], Path], exported: Callable[..., Path]
) -> None:
    model = hf_model(random_checkpoint(name))
    # 20 tokens: a whole chunk of 16 and a part of one.
    result = compare(model, exported(name), random_prompt(SPECS[name], 20), 64)
    assert result.tokens == result.expected
    assert max(result.logit_errors) < 1e-4
