"""Chat pieces: what a chat template writes, as data that C++ can render without Jinja.

They are the object "chat" of a program's manifest. `runner/chat.h` renders the same.

    {"supported": false, "reason": TEXT}      no pieces: --chat refuses and gives the reason

    {"supported": true,
     "special_tokens": [TEXT...],             the added tokens that occur in the pieces
     "start": TEXT,                           begins a conversation that has no system message
     "system": ROLE,                          begins one that has (so "before" holds what "start" would)
     "user": ROLE, "assistant": ROLE,         each is {"before": TEXT, "after": TEXT, "trim": BOOL}
     "tool_response": MARKERS | null,         {"open": TEXT, "close": TEXT}
     "reasoning": REASONING | null,
     "generation_prompt": {"thinking": TEXT, "no_thinking": TEXT},
     "thinking_by_default": BOOL,
     "proof": {"conversations": N, "rendered": N, "refused": N}}    for information

    REASONING = {"open": TEXT, "close": TEXT, "before": TEXT, "after": TEXT,
                 "trim": STRIP, "answer_trim": STRIP,
                 "show": "always" | "after_last_query" | "never",
                 "show_empty": "always" | "last" | "never"}
    STRIP = "none" | "newlines" | "whitespace"

A conversation is an optional system message, then user and assistant messages in any order. A *query* is a
user message that is not a tool's response, that is, does not begin with `tool_response.open` and end with its
`close`. Refused are: another role, a system message that is not the first, and a conversation without a
query.

A message is `before`, its content (if `trim`, without the white space around it, as Python's `str.strip` cuts
it) and `after`. An assistant's content that holds `reasoning.close` is split. Its reasoning is what stands
before the first `close` and after the last `open` before that, both ends stripped by `trim`; its answer is
what stands after the last `close`, the left end stripped by `answer_trim`. `reasoning.before`, the reasoning
and `reasoning.after` precede the answer (now stripped by `answer_trim`, split or not) if `show` says so:
always, after the last query, or never. Where there is no reasoning, `show_empty` must agree: always, in the
last message, or never.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Strip = Literal["none", "newlines", "whitespace"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt: one special token of the template, or text to be encoded as plain text."""

    text: str
    is_template: bool


@dataclass(frozen=True)
class Role:
    before: str
    after: str
    trim: bool


@dataclass(frozen=True)
class Markers:
    open: str
    close: str


@dataclass(frozen=True)
class Reasoning:
    open: str
    close: str
    before: str
    after: str
    trim: Strip
    answer_trim: Strip
    show: Literal["always", "after_last_query", "never"]
    show_empty: Literal["always", "last", "never"]


@dataclass(frozen=True)
class GenerationPrompt:
    thinking: str
    no_thinking: str


@dataclass(frozen=True)
class Proof:
    """Generated conversations that pieces and Jinja rendered alike, and those that the pieces refuse."""

    conversations: int
    rendered: int
    refused: int


@dataclass(frozen=True)
class ChatUnsupported:
    """A template that pieces cannot express, and why."""

    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"supported": False, "reason": self.reason}


@dataclass(frozen=True)
class ChatPieces:
    """A template as pieces; the fields are those of the module's schema."""

    special_tokens: tuple[str, ...]
    start: str
    system: Role
    user: Role
    assistant: Role
    tool_response: Markers | None
    reasoning: Reasoning | None
    generation_prompt: GenerationPrompt
    thinking_by_default: bool
    proof: Proof

    def template_texts(self) -> list[str]:
        """Every text that the template itself writes."""
        texts = [self.start, self.generation_prompt.thinking, self.generation_prompt.no_thinking]
        for piece in (self.system, self.user, self.assistant, self.reasoning):
            texts += [] if piece is None else [piece.before, piece.after]
        return texts

    def to_json(self) -> dict[str, Any]:
        return {"supported": True} | asdict(self) | {"special_tokens": list(self.special_tokens)}


def render_pieces(
    pieces: ChatPieces, messages: Sequence[tuple[str, str]], *, thinking: bool, add_generation_prompt: bool
) -> list[Segment]:
    """The prompt of `messages`, (role, content) each: the reference that C++ must equal.

    Raises ValueError for a conversation that the pieces refuse.
    """
    parts: list[Segment] = []

    def write(template: str) -> None:
        parts.extend(_split(template, pieces.special_tokens))

    last_query = _last_query(pieces, messages)
    if messages[0][0] != "system":
        write(pieces.start)
    for index, (name, content) in enumerate(messages):
        role: Role = getattr(pieces, name)
        write(role.before)
        content = content.strip() if role.trim else content
        if name == "assistant" and pieces.reasoning is not None:
            form = pieces.reasoning
            thought, answer = _split_reasoning(form, content)
            if _shows(form, thought, after_query=index > last_query, is_last=index == len(messages) - 1):
                write(form.before)
                parts.append(Segment(thought, False))
                write(form.after)
                answer = _lstrip(answer, form.answer_trim)
            content = answer
        parts.append(Segment(content, False))
        write(role.after)
    if add_generation_prompt:
        write(pieces.generation_prompt.thinking if thinking else pieces.generation_prompt.no_thinking)
    return _merged(parts)


def _last_query(pieces: ChatPieces, messages: Sequence[tuple[str, str]]) -> int:
    last = -1
    for index, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise ValueError(
                f"chat message {index + 1} has role {role!r}; roles are system, user and assistant"
            )
        if role == "system" and index > 0:
            raise ValueError(f"chat message {index + 1} is a system message; only the first may be one")
        if role == "user":
            text = content.strip() if pieces.user.trim else content
            tool = pieces.tool_response
            if tool is None or not (text.startswith(tool.open) and text.endswith(tool.close)):
                last = index
    if last < 0:
        raise ValueError("the conversation has no user message that asks something")
    return last


def _split_reasoning(form: Reasoning, content: str) -> tuple[str, str]:
    if form.close not in content:
        return "", content
    thought = content.split(form.close)[0].split(form.open)[-1]
    answer = content.split(form.close)[-1]
    return _rstrip(_lstrip(thought, form.trim), form.trim), _lstrip(answer, form.answer_trim)


def _shows(form: Reasoning, thought: str, *, after_query: bool, is_last: bool) -> bool:
    if form.show == "never" or (form.show == "after_last_query" and not after_query):
        return False
    return bool(thought) or form.show_empty == "always" or (form.show_empty == "last" and is_last)


def _lstrip(text: str, strip: Strip) -> str:
    return {"none": text, "newlines": text.lstrip("\n"), "whitespace": text.lstrip()}[strip]


def _rstrip(text: str, strip: Strip) -> str:
    return {"none": text, "newlines": text.rstrip("\n"), "whitespace": text.rstrip()}[strip]


def _split(template: str, special_tokens: Sequence[str]) -> list[Segment]:
    """Cuts a piece at its special tokens, taking the longest where several begin."""
    if not special_tokens:
        return [Segment(template, False)]
    pattern = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
    return [Segment(text, text in special_tokens) for text in re.split(f"({pattern})", template)]


def _merged(parts: Sequence[Segment]) -> list[Segment]:
    """Joins neighbouring plain text: the tokenizer must split it as it splits the whole prompt."""
    merged: list[Segment] = []
    for part in parts:
        if not part.text:
            continue
        if merged and not part.is_template and not merged[-1].is_template:
            merged[-1] = Segment(merged[-1].text + part.text, False)
        else:
            merged.append(part)
    return merged
