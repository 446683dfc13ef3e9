"""Strings a tokenizer may stumble over: every script, marks, emoji, runs, added tokens, broken UTF-8."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

WORDS = "the of and to a in that it is was I you don't we'll they're I'm he'd I've CAN'T".split()  # noqa: SIM905
SPACES = " |  |\n|\n\n|\r\n|\t| \n|\n |   \n\n  |\u00a0|\u3000|\u2028|\x85|\x1c|\u200b".split("|")  # noqa: SIM905
PUNCTUATION = [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~–’«¿。؟।\0\ufeff\ufffd", "..."]
# What folds to ASCII or to two letters when case is ignored, and what NFC takes apart or leaves alone.
TRAPS = (
    "'ſ 'S 'K 'K 'lL 'ﬆ ß ﬁ İ ı Å Ω 가 \u0340 \u0344 क़ שּׁ 豈 𝅗𝅥 ⫝̸ \u0f73 \u1e9b\u0323".split(" ")  # noqa: SIM905
)
EMOJI = "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 1️⃣ ❤️ 🧑🏿‍🚀 ☕ \U0001fae8".split(" ")  # noqa: SIM905
MARKS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)).startswith("M")]
# Assigned in Unicode 10 to 17: tables of different ages differ on these.
NEW = (
    "\u0897\u1acf\u1add\u1ae0\u088f\u1c89\ua7cb\U00010d4a\U00010ec2\U00011380\U000113b8\U00016d40"
    "\U0001e5d0\U00011f00\U0001e4d0\U00031350\U00011935\U00011930\U000105d2\u0307"
)
BLOCKS = [*range(0, 0x3000, 0x80), *range(0x3000, 0x110000, 0x1000)]


class StringGenerator:
    """Draws strings from `seed`; `added` are token texts to mix in."""

    def __init__(self, seed: int, added: list[str]) -> None:
        self._random = random.Random(seed)
        self._added = added
        self._kinds: list[Callable[[], str]] = [
            self._prose, self._prose, self._script, self._script, self._marked, self._hangul, self._emoji,
            self._run, self._added_tokens, self._traps, self._anything,
        ]  # fmt: skip

    def draw(self) -> bytes:
        """One string of 0 to about 300 bytes; one in eight is not valid UTF-8."""
        r = self._random
        data = "".join(r.choice(self._kinds)() for _ in range(r.randint(0, 4))).encode(
            "utf-8", "surrogatepass"
        )
        return self._broken(data) if r.random() < 0.125 else data

    def _broken(self, data: bytes) -> bytes:
        r = self._random
        out = bytearray(data)
        for _ in range(r.randint(1, 4)):
            at = r.randint(0, len(out))
            kind = r.randrange(4)
            if kind == 0:
                out[at : at + r.randint(1, 2)] = b""
            elif kind == 1:
                out[at:at] = r.randbytes(r.randint(1, 6))
            elif kind == 2:
                out[at:at] = r.choice(
                    [b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xe0\x80\x80", b"\xf0\x9f\x98"]
                )
            else:
                out = out[:at]
        return bytes(out)

    def _prose(self) -> str:
        r = self._random
        parts: list[str] = []
        for _ in range(r.randint(1, 8)):
            parts.append(r.choice(WORDS) if r.random() < 0.7 else str(r.randrange(10 ** r.randint(1, 8))))
            parts.append(r.choice(SPACES) if r.random() < 0.3 else " ")
            if r.random() < 0.25:
                parts.append(r.choice(PUNCTUATION) * r.randint(1, 3))
        return "".join(parts)

    def _script(self) -> str:
        r = self._random
        start = r.choice(BLOCKS) + r.randrange(0x60)
        points = (start + r.randrange(0x40) for _ in range(r.randint(1, 12)))
        text = "".join(chr(c) for c in points if c < 0x110000 and not 0xD800 <= c < 0xE000)
        return text + (r.choice(SPACES) if r.random() < 0.5 else "")

    def _marked(self) -> str:
        r = self._random
        marks = MARKS + list(NEW)
        bases = [
            "a",
            "e",
            "o",
            "A",
            "ά",
            "й",
            "か",
            "ক",
            "é",
            "ệ",
            " ",
            "'",
            "7",
            r.choice(NEW),
            chr(r.randrange(0x600, 0x1200)),
        ]
        return "".join(
            r.choice(bases)
            + "".join(r.choice(marks[:120] if r.random() < 0.6 else marks) for _ in range(r.randint(0, 4)))
            for _ in range(r.randint(1, 5))
        )

    def _hangul(self) -> str:
        r = self._random
        pools = ((0x1100, 0x1113), (0x1161, 0x1176), (0x11A7, 0x11C3), (0xAC00, 0xD7A4))
        return "".join(chr(r.randrange(*r.choice(pools))) for _ in range(r.randint(1, 8)))

    def _emoji(self) -> str:
        return "".join(self._random.choice(EMOJI) for _ in range(self._random.randint(1, 4)))

    def _run(self) -> str:
        r = self._random
        unit = r.choice(
            [
                *SPACES,
                "a",
                "A",
                "0",
                "-",
                "=",
                "é",
                "e\u0301",
                "漢",
                "😀",
                "ab",
                " \n",
                "\u0301\u0316",
                "'s",
                " a",
            ]
        )
        return unit * r.choice([2, 3, 7, 16, 17, 33, 64, 100])

    def _added_tokens(self) -> str:
        r = self._random
        parts: list[str] = []
        for _ in range(r.randint(1, 3)):
            token = r.choice(self._added) if self._added else "<x>"
            if r.random() < 0.2:
                token = token[: r.randint(0, len(token))]
            parts += [
                r.choice(["", "", " ", "\n  ", "a", "é", "_", "①", "\u0301"]),
                token,
                r.choice(["", " ", "\u3000\n", "b", "\u0301"]),
            ]
        return "".join(parts)

    def _traps(self) -> str:
        return "".join(self._random.choice(TRAPS + WORDS) for _ in range(self._random.randint(1, 5)))

    def _anything(self) -> str:
        r = self._random
        points = (
            r.randrange(0x110000) if r.random() < 0.5 else r.randrange(0x3000)
            for _ in range(r.randint(1, 10))
        )
        return "".join(chr(c) for c in points if not 0xD800 <= c < 0xE000)
