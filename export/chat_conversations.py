"""Generated conversations, on which chat pieces are compared with Jinja."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

# Python's str.strip cuts all of these but the last two, which look like white space and are none.
WHITE = " \n\t\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
SPACES = ("", *WHITE, "\n\n", "\r\n", " \n ", "\n \n")
WORDS = (
    "Hello",
    "2 + 2?",
    "naïve",
    "e\u0301",
    "日本語",
    "🙂",
    "שלום",
    "'s",
    "{{ x }}",
    "{% if %}",
    "<b>",
    "\0",
)
MAX_MESSAGES = 8


def generate_conversations(
    count: int, seed: int, *, tags: Mapping[str, Sequence[str]], tokens: Sequence[str]
) -> list[list[tuple[str, str]]]:
    """`count` conversations of 1 to 8 (role, content), the same for the same seed; some break a rule.

    Contents mix words of many scripts and white space of every kind; some are empty, some hold a role's
    `tags` (whole, torn, nested: "think" for <think>), a few one of `tokens`. The roles are system, user and
    assistant.
    """
    writer = _Writer(random.Random(seed), tags, tokens)
    return [writer.conversation() for _ in range(count)]


class _Writer:
    def __init__(self, rng: random.Random, tags: Mapping[str, Sequence[str]], tokens: Sequence[str]) -> None:
        self._rng, self._tags, self._tokens = rng, tags, tokens

    def conversation(self) -> list[tuple[str, str]]:
        rng = self._rng
        roles = ["system"] if rng.random() < 0.4 else []
        turn = "user" if rng.random() < 0.95 else "assistant"
        for _ in range(rng.randint(1, MAX_MESSAGES - len(roles))):
            roles.append(turn)
            if rng.random() < 0.85:  # else the same side speaks again
                turn = "assistant" if turn == "user" else "user"
        if rng.random() < 0.03:
            roles[rng.randrange(len(roles))] = "system"
        return [(role, self._content(role)) for role in roles]

    def _content(self, role: str) -> str:
        rng, kind = self._rng, self._rng.random()
        if kind < 0.1:
            return self._space()
        if self._tags[role] and kind < (0.6 if role == "assistant" else 0.25):
            return self._tagged(rng.choice(self._tags[role]))
        text = self._space() + self._words() + self._space()
        return text + rng.choice(self._tokens) + self._words() if self._tokens and kind > 0.95 else text

    def _tagged(self, tag: str) -> str:
        rng = self._rng
        inner = self._space() + self._words() + self._space()
        whole = f"{self._space()}<{tag}>{inner}</{tag}>{self._space()}"
        if rng.random() < 0.5:
            return whole + (self._words() if rng.random() < 0.5 else "")
        torn = (f"<{tag}>", f"</{tag}>", f"{inner}</{tag}>", whole, f"<{tag}{inner}>")
        return "".join(rng.choice(torn) + rng.choice(("", self._words())) for _ in range(rng.randint(1, 3)))

    def _space(self) -> str:
        rng = self._rng
        return rng.choice(SPACES) + rng.choice(SPACES) if rng.random() < 0.5 else ""

    def _words(self) -> str:
        rng = self._rng
        ends = (" ", "", "\n", "\n\n", "  ")
        return "".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(rng.randrange(5)))
