"""A checkpoint's Jinja chat template, rendered as `transformers` renders it.

Templates come with checkpoints and are foreign programs, so they run in Jinja's immutable sandbox. Python's
`chat` renders with this module, tools included; export renders with it to derive the pieces that C++ uses
instead.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """The template is not valid Jinja, or refused the conversation; the message says which and why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a folder: its `chat_template.jinja`, else `tokenizer_config.json`'s; None without.

        Raises ValueError, naming the file, where one of them is not what `transformers` writes.
        """
        config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_config(config_file) if config_file.is_file() else {}
        if template_file.is_file():
            try:
                text: str | None = template_file.read_text(encoding="utf-8")
            except ValueError as error:
                raise ValueError(f"{template_file}: not UTF-8 ({error}); restore the file") from error
        else:
            text = _configured_template(config.get("chat_template"), config_file)
        return None if text is None else cls(text, _special_tokens(config))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> str:
        """`render_jinja` of this template; `options` are its keyword arguments."""
        return render_jinja(self.text, messages, tools, **{**self.special_tokens, **options})

    def render_segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        added_tokens: Sequence[str],
        **options: Any,
    ) -> list[tuple[str, bool]]:
        """The rendered text in order, as (text, is_token): the added tokens that the template wrote, and all
        else.

        Encoding the first as tokens and the rest as plain text gives what encoding the whole gives, except
        that an added token's text inside a message stays text. Only where the template itself looks for such
        a token in a message (`</think>` in an assistant's) is it taken for the template's.
        """

        def render(chat: Sequence[Message]) -> str:
            return self.render(chat, tools, **options)

        return _segments(render, messages, added_tokens)


def render_jinja(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt of `messages` (dictionaries with `role` and `content`) and `tools` (JSON schemas).

    `enable_thinking=None` leaves the variable undefined: the template's own default. `variables` are further
    names for the template, special tokens first of all. Raises ChatTemplateError, and ImportError where
    jinja2 is missing.
    """
    if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
        raise TypeError("tools must be JSON schemas (dictionaries); describe each function as one")
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    compiled = _compile(template)
    try:
        text: str = compiled.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except Exception as error:  # a template is a foreign program: it can raise anything
        raise ChatTemplateError(f"the chat template refused the conversation: {error}") from error
    return text


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    environment = jinja_environment()
    try:
        return environment.from_string(template)
    except Exception as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja: {error}") from error


@functools.cache
def jinja_environment() -> Any:
    """The sandboxed `jinja2.Environment` of chat templates. Raises ImportError where jinja2 is missing."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(
            "chat renders the checkpoint's Jinja template and needs jinja2: run `pip install 'jinja2>=3.1.6'`"
        ) from error

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model wrote, for training; when rendering it is only its body."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # Jinja's own tojson escapes HTML and sorts keys; templates written for transformers expect neither.
    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        # JSON's escapes can spell half a character, which no text file and no tokenizer takes.
        json.dumps(config, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); restore the file") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: a JSON object was expected; restore the file")
    return config


def _configured_template(value: Any, file: Path) -> str | None:
    """What `chat_template` says. Of several named templates `transformers` uses the one named "default"."""
    try:
        text = (
            {entry["name"]: entry["template"] for entry in value}.get("default")
            if isinstance(value, list)
            else value
        )
    except (KeyError, TypeError):
        text = value
    if text is None or isinstance(text, str):
        return text
    raise ValueError(f"{file}: chat_template must be text, or a list of names and texts; restore the file")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like of a `tokenizer_config.json`, each text or {"content": text, ...}."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _segments(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], added_tokens: Sequence[str]
) -> list[tuple[str, bool]]:
    """Hides the added tokens that stand in messages behind names no one can guess, renders, and splits what
    is left.

    A token stays hidden only if the rendering, names replaced back, is the same: so templates that read a
    message's markers still see them.
    """
    text = render(messages)
    if not added_tokens:
        return [(text, False)] if text else []
    nonce = secrets.token_hex(8)
    names = {token: f"{nonce}x{index}x" for index, token in enumerate(added_tokens)}
    originals = {name: token for token, name in names.items()}
    any_name = re.compile(f"{nonce}x[0-9]+x")

    def restore(hidden: str) -> str:
        return any_name.sub(lambda match: originals[match.group()], hidden)

    kept = list(messages)
    for index, message in enumerate(messages):
        present = [token for token in added_tokens if _contains(message, token)]
        for tokens in [present, *([token] for token in present)] if present else []:
            trial = [
                *kept[:index],
                _replace(kept[index], {token: names[token] for token in tokens}),
                *kept[index + 1 :],
            ]
            try:
                same = restore(render(trial)) == text
            except ChatTemplateError:
                same = False
            if same:
                kept = trial
                if tokens == present:
                    break
    pattern = _any_of(added_tokens)
    parts = ((part, bool(pattern.fullmatch(part))) for part in re.split(f"({pattern.pattern})", render(kept)))
    return [(restore(part), is_token) for part, is_token in parts if part]


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest where several begin."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _contains(value: Any, token: str) -> bool:
    if isinstance(value, str):
        return token in value
    if isinstance(value, Mapping):
        return any(_contains(item, token) for item in value.values())
    return isinstance(value, Sequence) and any(_contains(item, token) for item in value)


def _replace(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _any_of(list(names)).sub(lambda match: names[match.group()], value)
    if isinstance(value, Mapping):
        return {key: _replace(item, names) for key, item in value.items()}
    return [_replace(item, names) for item in value] if isinstance(value, Sequence) else value
