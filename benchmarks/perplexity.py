"""Perplexity of exported programs on a text, through the runner: token by token, or through prefill.

    python benchmarks/perplexity.py PROGRAM [PROGRAM ...] [--text FILE] [--limit TOKENS]
    python benchmarks/perplexity.py PROGRAM --prefill [--expert-activations bfloat16 int8 float8]

The text is cut into windows of 1024 tokens; each starts from an empty state and is scored from its second
token on, as demo/perplexity.py does with Hugging Face's model. With --prefill the windows have 256 tokens,
and what comes before each scored token, from the 17th on, is one prefill: prefill's kernels, and types of
activations that decoding does not have, are what is measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qwen_runner import _core

WINDOW = 1024
PREFILL_WINDOW, PREFILL_FROM = 256, 16  # fewer tokens than that may be taken for rows of a decode step
GREEDY = {"temperature": 0.0}
EXPERT_ACTIVATIONS = ("bfloat16", "int8", "float8")


def predictions(engine: Any, tokens: list[int], prefill: bool) -> Iterator[tuple[NDArray[np.float32], int]]:
    """(logits [V], the token that came) for each scored token."""
    session = engine.open_session()
    session.keep_logits(True)
    length = PREFILL_WINDOW if prefill else WINDOW
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length]
        session.reset()
        for i in range(PREFILL_FROM if prefill else 1, len(window)):
            if prefill:
                session.reset()
            session.run(engine, window[:i] if prefill else window[i - 1 : i], GREEDY)
            yield session.logits(), window[i]


def perplexity(engine: Any, tokens: list[int], prefill: bool = False) -> tuple[float, int]:
    """Perplexity a token, and how many tokens were scored."""
    nats, count = 0.0, 0
    for rounded, target in predictions(engine, tokens, prefill):
        logits = rounded.astype(np.float64)
        largest = logits.max()
        nats += largest + math.log(np.exp(logits - largest).sum()) - logits[target]
        count += 1
    return math.exp(nats / count), count


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", type=Path, nargs="+", metavar="PROGRAM")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "demo" / "heldout.txt")
    parser.add_argument("--limit", type=int, default=None, help="tokens of the text to score")
    parser.add_argument("--prefill", action="store_true", help="predict each token after a prefill")
    parser.add_argument(
        "--expert-activations",
        nargs="+",
        choices=EXPERT_ACTIVATIONS,
        default=["bfloat16"],
        metavar="TYPE",
        help="what prefill on a GPU rounds the routed experts' inputs to, one after the other",
    )
    arguments = parser.parse_args()
    if arguments.expert_activations != ["bfloat16"] and not arguments.prefill:
        parser.error("--expert-activations is for --prefill: decoding is always bfloat16")
    text = arguments.text.read_text(encoding="utf-8")
    for program in arguments.programs:
        for kind in arguments.expert_activations:
            engine = _core.Engine(str(program), None, kind)
            tokens = engine.tokenize(text, False)[: arguments.limit]
            value, count = perplexity(engine, tokens, arguments.prefill)
            how = f", prefilled, experts in {kind}" if arguments.prefill else ""
            print(f"{program}{how}: perplexity {value:.4f} on {count} tokens", flush=True)


if __name__ == "__main__":
    main()
