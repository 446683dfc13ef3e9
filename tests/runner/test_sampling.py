"""Sampling inside a program: the distribution it draws from, its filters, its seeds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_runner import _core
from random_checkpoints import SPECS, random_prompt
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

NAME = "interval"
DRAWS = 20_000
NEUTRAL = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(exported: Callable[..., Path]) -> _core.Engine:
    return _core.Engine(str(exported(NAME)))


def filtered_softmax(logits: torch.Tensor, options: dict[str, float]) -> np.ndarray:
    """The probabilities that transformers' own warpers leave, in the order a program applies the filters."""
    scores = logits[None] / options["temperature"]
    no_ids = torch.zeros(1, 0, dtype=torch.int64)
    if options["top_k"] > 0:
        scores = TopKLogitsWarper(int(options["top_k"]))(no_ids, scores)
    if options["top_p"] < 1:
        scores = TopPLogitsWarper(options["top_p"])(no_ids, scores)
    if options["min_p"] > 0:
        scores = MinPLogitsWarper(options["min_p"])(no_ids, scores)
    return scores[0].double().softmax(-1).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=lambda options: "-".join(options),
)
def test_draws_follow_the_filtered_softmax(engine: _core.Engine, options: dict[str, float]) -> None:
    settings = NEUTRAL | options
    token = random_prompt(SPECS[NAME], 1)
    session = engine.open_session()
    session.keep_logits(True)
    session.run(engine, token, settings | {"seed": 0})
    expected = filtered_softmax(torch.from_numpy(session.logits().copy()), settings)
    session.keep_logits(False)
    counts = np.zeros(len(expected))
    for seed in range(DRAWS):
        session.reset()
        counts[session.run(engine, token, settings | {"seed": seed})] += 1
    assert counts[expected == 0].sum() == 0, "a token that the filters drop was drawn"
    # Chi-square wants at least five draws expected in every bin: the rarest tokens share one.
    common = expected * DRAWS >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * DRAWS
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


def sampled_text(engine: _core.Engine, session: _core.Session, seed: int, n: int) -> list[int]:
    settings = NEUTRAL | {"temperature": 1.0, "seed": seed}
    tokens = [session.run(engine, random_prompt(SPECS[NAME], 9), settings)]
    while len(tokens) < n:
        tokens.append(session.run(engine, tokens[-1:], settings))
    return tokens


def test_the_same_seed_gives_the_same_text_in_any_slot_and_another_seed_another(engine: _core.Engine) -> None:
    first, second = engine.open_session(), engine.open_session()
    text = sampled_text(engine, first, 7, 40)
    assert sampled_text(engine, second, 7, 40) == text
    first.reset()
    assert sampled_text(engine, first, 7, 40) == text
    second.reset()
    assert sampled_text(engine, second, 8, 40) != text


def test_greedy_is_the_arg_max(engine: _core.Engine) -> None:
    session = engine.open_session()
    session.keep_logits(True)
    for length in (1, 5, 20):
        session.reset()
        token = session.run(engine, random_prompt(SPECS[NAME], length), NEUTRAL | {"temperature": 0.0})
        assert token == int(session.logits().argmax())


def test_penalties_change_the_choice_as_documented(engine: _core.Engine) -> None:
    session = engine.open_session()
    session.keep_logits(True)
    prompt = random_prompt(SPECS[NAME], 12)
    settings = NEUTRAL | {"temperature": 0.0, "presence_penalty": 3.0, "repetition_penalty": 1.7}
    session.set_generated_from(len(prompt))
    output: list[int] = []
    inputs = prompt
    for _ in range(30):
        token = session.run(engine, inputs, settings)
        logits = session.logits().astype(np.float64)
        for seen in set(prompt + output):
            logits[seen] = logits[seen] / 1.7 if logits[seen] > 0 else logits[seen] * 1.7
        logits[list(set(output))] -= 3.0
        assert token == int(logits.argmax())
        output.append(token)
        inputs = [token]
