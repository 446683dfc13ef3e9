"""Derives chat pieces from a checkpoint's Jinja template, and proves them on generated conversations.

The template is never recognised by its text. It is rendered on conversations whose contents are sentinels,
and the pieces (`chat_pieces.py`) are what stands between them. The tags that it may read in a message
(`<think>`) are those that its source names. Then both renderings of generated conversations are compared,
character by character: there, at the latest, fails a template that the pieces cannot express, with the
conversation that told.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qwen_runner.chat_jinja import ChatTemplate, ChatTemplateError
from qwen_runner.export.chat_conversations import generate_conversations
from qwen_runner.export.chat_pieces import (
    ChatPieces,
    ChatUnsupported,
    GenerationPrompt,
    Markers,
    Proof,
    Reasoning,
    Role,
    Strip,
    render_pieces,
)

Conversation = Sequence[tuple[str, str]]

# Contents that no template writes by itself.
SYSTEM, USER, ASSISTANT, SECOND_USER, THOUGHT = (
    f"Zq{name}Zq" for name in ("sys", "ask", "say", "more", "muse")
)
HISTORY: Conversation = (("user", USER), ("assistant", ASSISTANT), ("user", SECOND_USER))


def derive_chat_pieces(
    template: str | None,
    *,
    added_tokens: Sequence[str],
    special_tokens: Mapping[str, str] | None = None,
    conversations: int = 500,
    seed: int = 0,
) -> ChatPieces | ChatUnsupported:
    """The pieces of `template`, proven on `conversations` generated ones, or why there are none.

    `added_tokens` are the texts of the tokenizer's added tokens; `special_tokens` what the template may name
    (`bos_token`, ...: `ChatTemplate.special_tokens`). Every conversation is rendered with thinking on, off
    and not said, with and without the generation prompt. Raises ImportError where jinja2 is missing.
    """
    if template is None:
        return ChatUnsupported("the checkpoint has no chat template")
    probe = _Probe(ChatTemplate(template, special_tokens or {}))
    try:
        pieces = _derive(probe, added_tokens)
        return replace(pieces, proof=_prove(probe, pieces, conversations, seed))
    except (_InexpressibleError, ChatTemplateError) as error:
        return ChatUnsupported(" ".join(str(error).split()))  # one line, whatever the template raised


class _InexpressibleError(Exception):
    """The template writes something that the pieces have no words for."""


class _Probe:
    """The template, rendered on chosen conversations."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        # "think" for <think> or </think>, wherever the source names it, in order.
        self.tags = list(dict.fromkeys(re.findall(r"</?([A-Za-z][\w-]*)>", template.text)))

    def render(self, messages: Conversation, *, thinking: bool | None = None, prompt: bool = False) -> str:
        asked_for_date = False

        def strftime_now(_: str) -> str:
            nonlocal asked_for_date
            asked_for_date = True
            return ""

        text = self._template.render(
            [{"role": role, "content": content} for role, content in messages],
            enable_thinking=thinking,
            add_generation_prompt=prompt,
            strftime_now=strftime_now,
        )
        if asked_for_date:
            raise _InexpressibleError("the chat template writes the current date")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _InexpressibleError("the chat template writes half a surrogate pair")
        return text

    def around(self, messages: Conversation, *sentinels: str) -> list[str]:
        """The text before, between and after the sentinels; each must be written once, in this order."""
        rest, parts = self.render(messages), []
        for sentinel in sentinels:
            before, found, rest = rest.partition(sentinel)
            if not found or sentinel in rest:
                raise _InexpressibleError(
                    f"the chat template does not write {_show(messages)} in order, once each"
                )
            parts.append(before)
        return [*parts, rest]

    def before_answer(self, *messages: tuple[str, str]) -> str:
        """The text between USER and ASSISTANT, the first two of `messages`."""
        return self.around(messages, USER, ASSISTANT)[1]


def _derive(probe: _Probe, added_tokens: Sequence[str]) -> ChatPieces:
    to_user, to_assistant, to_second_user, user_after = probe.around(HISTORY, USER, ASSISTANT, SECOND_USER)
    assistant_before = _cut_start(to_assistant, user_after, "a user and an assistant message")
    *_, assistant_after = probe.around(HISTORY[:2], USER, ASSISTANT)
    user_before = _cut_start(to_second_user, assistant_after, "an assistant and a user message")
    system_before, system_to_user, _ = probe.around((("system", SYSTEM), *HISTORY[:1]), SYSTEM, USER)
    system_after = _cut_end(system_to_user, user_before, "a system and a user message")
    reasoning = _reasoning(probe, plain=to_assistant)
    with_thinking = _generation_prompt(probe, True)
    pieces = ChatPieces(
        special_tokens=(),
        start=_cut_end(to_user, user_before, "the start and a user message"),
        system=Role(system_before, system_after, _trims(probe, 0, SYSTEM)),
        user=Role(user_before, user_after, _trims(probe, 1, USER)),
        assistant=Role(assistant_before, assistant_after, _trims(probe, 2, ASSISTANT)),
        tool_response=_tool_response(probe, reasoning),
        reasoning=reasoning,
        generation_prompt=GenerationPrompt(with_thinking, _generation_prompt(probe, False)),
        thinking_by_default=_generation_prompt(probe, None) == with_thinking,
        proof=Proof(0, 0, 0),
    )
    texts = pieces.template_texts()
    return replace(pieces, special_tokens=tuple(t for t in added_tokens if any(t in text for text in texts)))


def _cut_start(text: str, start: str, where: str) -> str:
    if not text.startswith(start):
        raise _InexpressibleError(f"the chat template writes {text!r} between {where}, not {start!r} first")
    return text.removeprefix(start)


def _cut_end(text: str, end: str, where: str) -> str:
    if not text.endswith(end):
        raise _InexpressibleError(f"the chat template writes {text!r} between {where}, not {end!r} last")
    return text.removesuffix(end)


def _generation_prompt(probe: _Probe, thinking: bool | None) -> str:
    asked = probe.render(HISTORY, thinking=thinking, prompt=True)
    return _cut_start(asked, probe.render(HISTORY, thinking=thinking), "the messages and the answer to come")


def _trims(probe: _Probe, index: int, sentinel: str) -> bool:
    """Whether white space around the content of message `index` is cut."""
    spaced = f"\n \u2003\t\n{sentinel}\n \u2003\t\n"
    messages = [("system", SYSTEM), *HISTORY]
    messages[index] = (messages[index][0], spaced)
    return spaced not in probe.render(messages)


def _reasoning(probe: _Probe, plain: str) -> Reasoning | None:
    """How an assistant's reasoning is written; `plain` stands before one in history that has none."""
    user, answer, second_user = HISTORY
    plain_last = probe.before_answer(user, answer)
    for tag in probe.tags:
        opening, closing = f"<{tag}>", f"</{tag}>"

        def written(content: str, *later: tuple[str, str]) -> str:
            return probe.before_answer(user, ("assistant", f"{content}{ASSISTANT}"), *later)

        thought = f"{opening}{THOUGHT}{closing}"
        last, history = written(thought), written(thought, second_user)
        if last == plain_last + thought and history == plain + thought:
            continue  # to this template the tag is text
        if not last.startswith(plain) or history not in (plain, last):
            raise _InexpressibleError(
                f"the chat template moves what stands in {opening} of an assistant's message"
            )
        spaced_answer = _cut_start(written(f"{thought}\n \n"), last, "reasoning and its answer")
        form = Reasoning(opening, closing, "", "", "none", _strip_of(spaced_answer), "never", "never")
        if THOUGHT not in last:
            return form
        before, _, after = last.removeprefix(plain).partition(THOUGHT)
        spaced = written(f"{opening}\n \n{THOUGHT}{closing}").partition(THOUGHT)[0]
        empty_earlier = probe.before_answer(user, answer, ("assistant", THOUGHT))
        return replace(
            form,
            before=before,
            after=after,
            trim=_strip_of(_cut_start(spaced, plain + before, "a user message and reasoning")),
            show="always" if history == last else "after_last_query",
            show_empty="always" if empty_earlier != plain else "last" if plain_last != plain else "never",
        )
    return None


def _tool_response(probe: _Probe, reasoning: Reasoning | None) -> Markers | None:
    """The tag that makes a user message no query: refused alone, or earlier reasoning stays shown."""
    user, answer, second_user = HISTORY
    if reasoning is not None:
        answer = ("assistant", f"{reasoning.open}{THOUGHT}{reasoning.close}{ASSISTANT}")
    for tag in probe.tags:
        response = ("user", f"<{tag}>{SECOND_USER}</{tag}>")
        try:
            probe.render([response])
        except ChatTemplateError:
            return Markers(f"<{tag}>", f"</{tag}>")
        if probe.before_answer(user, answer, response) != probe.before_answer(user, answer, second_user):
            return Markers(f"<{tag}>", f"</{tag}>")
    return None


def _strip_of(left: str) -> Strip:
    """The strip that leaves `left` of a newline, a space and a newline."""
    strips: dict[str, Strip] = {"\n \n": "none", " \n": "newlines", "": "whitespace"}
    if left not in strips:
        raise _InexpressibleError(f"the chat template writes {left!r} for white space around reasoning")
    return strips[left]


def _prove(probe: _Probe, pieces: ChatPieces, count: int, seed: int) -> Proof:
    """Compares both renderings; what Jinja refuses the pieces must refuse too (they may refuse more)."""
    # In a role's messages: every tag that the template names and, as often, the one that it reads there.
    read = {"system": None, "user": pieces.tool_response, "assistant": pieces.reasoning}
    tags = {
        role: probe.tags + ([marks.open.strip("<>")] * len(probe.tags) if marks else [])
        for role, marks in read.items()
    }
    refused = 0
    for messages in generate_conversations(count, seed, tags=tags, tokens=pieces.special_tokens):
        for thinking, prompt in itertools.product((True, False, None), (True, False)):
            on = pieces.thinking_by_default if thinking is None else thinking
            try:
                segments = render_pieces(pieces, messages, thinking=on, add_generation_prompt=prompt)
            except ValueError:
                refused += 1
                break  # neither thinking nor the prompt has a part in it
            try:
                expected = probe.render(messages, thinking=thinking, prompt=prompt)
            except ChatTemplateError as error:
                raise _InexpressibleError(
                    f"{error}, which pieces do not refuse: {_show(messages)}"
                ) from error
            if "".join(segment.text for segment in segments) != expected:
                raise _InexpressibleError(
                    f"the chat template writes this as no pieces can: {_show(messages)}"
                )
    return Proof(count, count - refused, refused)


def _show(messages: Conversation) -> str:
    text = json.dumps(messages)
    return text if len(text) <= 300 else text[:300] + "..."
