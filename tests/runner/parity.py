"""Runs a program beside Hugging Face's model and compares tokens and logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from qwen_runner import _core
from random_checkpoints import hf_greedy
from transformers import Qwen3_5MoeForCausalLM

GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}


@dataclass(frozen=True)
class Comparison:
    """Of the tokens both models chose and of the logits behind them, step by step."""

    tokens: list[int]
    expected: list[int]
    logit_errors: list[float]
    """Norm of the difference over the norm of the expected logits; only of steps with the same past."""


def greedy_run(program: Path, prompt: list[int], n: int) -> tuple[list[int], torch.Tensor]:
    """`n` greedy tokens of the program and their logits f32 [n, V]."""
    engine = _core.Engine(str(program))
    session = engine.open_session()
    session.keep_logits(True)
    tokens, logits, inputs = [], [], prompt
    for _ in range(n):
        tokens.append(session.run(engine, inputs, GREEDY))
        logits.append(torch.from_numpy(session.logits().copy()))
        inputs = tokens[-1:]
    return tokens, torch.stack(logits)


def compare(model: Qwen3_5MoeForCausalLM, program: Path, prompt: list[int], n: int) -> Comparison:
    """Both models' first `n` greedy tokens after `prompt`."""
    expected, expected_logits = hf_greedy(model, prompt, n)
    tokens, logits = greedy_run(program, prompt, n)
    errors = []
    for step in range(n):
        if tokens[:step] != expected[:step]:
            break
        difference = (logits[step] - expected_logits[step]).norm() / expected_logits[step].norm()
        errors.append(difference.item())
    return Comparison(tokens, expected, errors)
