"""How fast the runner's tokenizer encodes, beside Hugging Face `tokenizers`, on one core.

    python benchmarks/tokenizer.py [tokenizer.json] [--repetitions 5]

Checks first that both give the same ids, then times. Prints megabytes of UTF-8 per second of CPU time (the
best repetition), so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from qwen_runner import _core
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1_000_000
# First letter and count: Latin, with accents, Greek, Cyrillic, Arabic, Devanagari, kana, Han, Hangul.
SCRIPTS = [
    (97, 26),
    (0xE0, 32),
    (0x3B1, 24),
    (0x430, 32),
    (0x627, 36),
    (0x904, 54),
    (0x3041, 80),
    (0x4E00, 3000),
    (0xAC00, 2000),
]


def english() -> str:
    """The demo model's held-out text, repeated to 1 MB."""
    text = (ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")
    return (text * (MEGABYTE // len(text) + 1))[:MEGABYTE]


def mixed() -> str:
    """1 MB of random words of nine scripts, digits, punctuation, emoji, line ends: few words come twice."""
    rng = random.Random(1)
    parts: list[str] = []
    size = 0
    while size < MEGABYTE:
        first, count = rng.choice(SCRIPTS)
        word = "".join(chr(first + rng.randrange(count)) for _ in range(rng.randint(1, 9)))
        end = rng.choice(
            [" "] * 8 + [", ", ".\n", " 😀 ", f" {rng.randrange(10000)} ", "();\n    ", "\u0301 "]
        )
        parts.append(word + end)
        size += len(parts[-1].encode())
    return "".join(parts)


def rate(text: str, encode: Callable[[str], object], repetitions: int) -> float:
    """Megabytes of UTF-8 per second of CPU time."""
    best = float("inf")
    for _ in range(repetitions):
        start = time.process_time()
        encode(text)
        best = min(best, time.process_time() - start)
    return len(text.encode()) / MEGABYTE / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", nargs="?", type=Path, default=ROOT / "demo" / "tokenizer.json")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()

    start = time.process_time()
    ours = _core.Tokenizer(str(options.tokenizer))
    print(f"{options.tokenizer}: loaded in {time.process_time() - start:.3f} s of CPU time")
    theirs = Tokenizer.from_file(str(options.tokenizer))
    texts = {
        "English": english(),
        "mixed scripts": mixed(),
        "one letter": "a" * MEGABYTE,
        "spaces": " " * MEGABYTE,
    }
    print(f"{'1 MB of':16}{'ours MB/s':>12}{'tokenizers MB/s':>18}")
    for name, text in texts.items():
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_special=True) == expected, f"{name}: ids differ"
        mine = rate(text, lambda t: ours.encode(t, parse_special=True), options.repetitions)
        other = rate(text, lambda t: theirs.encode(t, add_special_tokens=False), options.repetitions)
        print(f"{name:16}{mine:12.1f}{other:18.1f}")


if __name__ == "__main__":
    main()
