"""What goes into an answer and what comes out."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, TypedDict

FinishReason = Literal["stop", "length", "cancelled"]


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of a generation; what is left out is the program's default.

    The runner's own table of options (`qwen_runner --help` prints it) is what these mirror; a test holds the
    two equal.
    """

    max_new_tokens: int
    """At most this many tokens are generated."""
    temperature: float
    """0 is greedy: exactly the most likely token."""
    top_k: int
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float
    """Keep the smallest set of tokens with at least this probability; 1 keeps all."""
    min_p: float
    """Drop tokens under this fraction of the most likely one's probability; 0 drops none."""
    presence_penalty: float
    """Subtracted once from the logit of every token generated before; 0 is off."""
    repetition_penalty: float
    """Divides the logits of tokens seen before (multiplies negative ones); 1 is off."""
    seed: int
    """The same seed, prompt and program give the same text; random if left out."""
    stop: str | Sequence[str]
    """The answer ends before any of these texts."""
    ignore_eos: bool
    """Go on after an end-of-sequence token."""
    echo: bool
    """Begin the text with the prompt's."""
    logprobs: bool
    """Return the log-probability of every generated token."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds and tokens per second of one answer; 0 where there was nothing to measure."""

    load_ms: float
    """Of the program, once."""
    ttft_ms: float
    """From the call to the first token."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    """Of the tokens after the first."""


@dataclass(frozen=True)
class Generation:
    """One answer."""

    text: str
    tokens: list[int]
    """Generated token ids, without an ending end-of-sequence token."""
    prompt_tokens: int
    finish_reason: FinishReason
    seed: int
    """The seed that was used."""
    timings: Timings
    logprobs: list[float] | None = None
    """Natural logarithms, one a token, if asked for: of the softmax before temperature, penalties and
    filters.
    """


def token_ids(tokens: Iterable[SupportsIndex], expected: str) -> list[int]:
    """`tokens` [n], any integers (NumPy's and PyTorch's too), as the runner takes them.

    Raises TypeError, which begins with `expected`, for anything else and ValueError for an id that no
    vocabulary has.
    """
    bad: object = tokens
    try:
        ids = [operator.index(bad := token) for token in tokens]
    except TypeError:
        raise TypeError(f"{expected}, not {bad!r:.60}") from None
    for token in ids:
        if not 0 <= token < 2**63:
            raise ValueError(f"token id {token} is not in the vocabulary")
    return ids
