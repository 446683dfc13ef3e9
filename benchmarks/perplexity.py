"""Perplexity of exported programs on a text, token by token through the runner.

    python benchmarks/perplexity.py PROGRAM [PROGRAM ...] [--text FILE] [--limit TOKENS]

The text is cut into windows of 1024 tokens; each starts from an empty state and is scored from its second
token on, as demo/perplexity.py does with Hugging Face's model.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from qwen_runner import _core

WINDOW = 1024
GREEDY = {"temperature": 0.0}


def perplexity(program: Path, text: str, limit: int | None = None) -> tuple[float, int]:
    """Perplexity a token on the first `limit` tokens of `text`, and how many tokens were scored."""
    engine = _core.Engine(str(program))
    session = engine.open_session()
    session.keep_logits(True)
    tokens = engine.tokenize(text, False)[:limit]
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - 1, WINDOW):
        session.reset()
        window = tokens[start : start + WINDOW]
        for token, target in zip(window, window[1:], strict=False):
            session.run(engine, [token], GREEDY)
            logits = session.logits().astype(np.float64)
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
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    for program in arguments.programs:
        value, count = perplexity(program, text, arguments.limit)
        print(f"{program}: perplexity {value:.4f} on {count} tokens", flush=True)


if __name__ == "__main__":
    main()
