"""Chat pieces equal the Jinja template they come from, or say why there are none."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from qwen_runner.chat_jinja import ChatTemplate, ChatTemplateError
from qwen_runner.export.chat_conversations import SPACES, generate_conversations
from qwen_runner.export.chat_pieces import ChatPieces, ChatUnsupported, Markers, render_pieces
from qwen_runner.export.chat_template import _InexpressibleError, _Probe, _prove, derive_chat_pieces

REPOSITORY = Path(__file__).parents[2]
TEMPLATES = REPOSITORY / "tests" / "chat_templates"
QWEN = Path(os.environ.get("QWEN_SHARED", REPOSITORY.parent / "shared")) / "qwen"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SPECIAL = {"bos_token": "<|endoftext|>"}


def template(name: str) -> str:
    if name == "qwen" and not QWEN.is_dir():
        pytest.skip(f"no {QWEN}: set QWEN_SHARED to the folder that holds qwen/chat_template.jinja")
    files = {"qwen": QWEN / "chat_template.jinja", "demo": REPOSITORY / "demo" / "chat_template.jinja"}
    return files.get(name, TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def derive(text: str, **options: int) -> ChatPieces:
    pieces = derive_chat_pieces(text, added_tokens=TOKENS, special_tokens=SPECIAL, **options)
    assert isinstance(pieces, ChatPieces), pieces.reason
    return pieces


def reason(text: str) -> str:
    found = derive_chat_pieces(text, added_tokens=TOKENS, special_tokens=SPECIAL)
    assert isinstance(found, ChatUnsupported), "pieces were found for a template that has none"
    assert found.to_json() == {"supported": False, "reason": found.reason}
    assert "\n" not in found.reason
    return found.reason


@pytest.mark.parametrize("name", ["qwen", "demo", "thinking", "thinking_if_any", "default_system"])
@pytest.mark.parametrize("seed", [0, 1])
def test_pieces_equal_jinja_on_500_conversations(name: str, seed: int) -> None:
    # Written out here too, so that the claim does not rest on the proof inside derive_chat_pieces.
    jinja, pieces = ChatTemplate(template(name), SPECIAL), derive(template(name))
    tags = {role: ["think", "tool_response", "result"] for role in ("system", "user", "assistant")}
    rendered = 0
    for messages in generate_conversations(500, 1000 + seed, tags=tags, tokens=TOKENS):
        chat = [{"role": role, "content": content} for role, content in messages]
        for thinking in (True, False, None):
            for prompt in (True, False):
                on = pieces.thinking_by_default if thinking is None else thinking
                try:
                    segments = render_pieces(pieces, messages, thinking=on, add_generation_prompt=prompt)
                except ValueError:
                    if name in ("qwen", "thinking"):  # these refuse the very same conversations
                        with pytest.raises(ChatTemplateError):
                            jinja.render(chat, enable_thinking=thinking, add_generation_prompt=prompt)
                    continue
                text = jinja.render(chat, enable_thinking=thinking, add_generation_prompt=prompt)
                assert "".join(segment.text for segment in segments) == text, messages
                rendered += 1
    assert rendered > 0.85 * 500 * 6


def test_pieces_of_the_thinking_template() -> None:
    found = derive(template("thinking")).to_json()
    proof = found.pop("proof")
    assert proof["conversations"] == proof["rendered"] + proof["refused"] == 500
    assert found == {
        "supported": True,
        "special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        "start": "",
        "system": {"before": "<|im_start|>system\n", "after": "<|im_end|>\n", "trim": True},
        "user": {"before": "<|im_start|>user\n", "after": "<|im_end|>\n", "trim": True},
        "assistant": {"before": "<|im_start|>assistant\n", "after": "<|im_end|>\n", "trim": True},
        "tool_response": {"open": "<result>", "close": "</result>"},
        "reasoning": {
            "open": "<think>",
            "close": "</think>",
            "before": "<think>\n",
            "after": "\n</think>\n\n",
            "trim": "whitespace",
            "answer_trim": "newlines",
            "show": "after_last_query",
            "show_empty": "always",
        },
        "generation_prompt": {
            "thinking": "<|im_start|>assistant\n<think>\n",
            "no_thinking": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        },
        "thinking_by_default": True,
    }
    assert json.loads(json.dumps(found)) == found


def test_pieces_of_the_other_templates() -> None:
    if_any = derive(template("thinking_if_any"))
    assert if_any.reasoning is not None
    assert (if_any.reasoning.trim, if_any.reasoning.show_empty) == ("newlines", "last")
    assert if_any.tool_response == Markers("<result>", "</result>")
    assert not if_any.thinking_by_default
    default = derive(template("default_system"))
    assert default.start == "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n"
    assert default.system.before == "<|endoftext|><|im_start|>system\n"
    assert default.reasoning is None


def test_the_proof_notices_every_field() -> None:
    """Pieces with any one field changed are not equal to the template any more, and the proof says so."""
    jinja = ChatTemplate(template("thinking"))
    pieces = derive(jinja.text)
    reasoning = pieces.reasoning
    assert reasoning is not None
    changed = [
        dataclasses.replace(pieces, start=" "),
        dataclasses.replace(pieces, tool_response=None),
        dataclasses.replace(pieces, tool_response=Markers("<result>", "result>")),
        dataclasses.replace(pieces, tool_response=Markers("<result", "</result>")),
        dataclasses.replace(pieces, reasoning=None),
        dataclasses.replace(pieces, thinking_by_default=False),
    ]
    for role in ("system", "user", "assistant"):
        piece = getattr(pieces, role)
        for change in ({"before": ""}, {"after": ""}, {"trim": False}):
            changed.append(dataclasses.replace(pieces, **{role: dataclasses.replace(piece, **change)}))
    for prompt in ("thinking", "no_thinking"):
        prompts = dataclasses.replace(pieces.generation_prompt, **{prompt: "<|im_start|>assistant\n"})
        changed.append(dataclasses.replace(pieces, generation_prompt=prompts))
    for name, values in {
        "open": ["<thin"],
        "close": ["</think"],
        "before": ["<think>"],
        "after": ["</think>"],
        "trim": ["none", "newlines"],
        "answer_trim": ["none", "whitespace"],
        "show": ["always", "never"],
        "show_empty": ["last", "never"],
    }.items():
        for value in values:
            form = dataclasses.replace(reasoning, **{name: value})  # type: ignore[arg-type]
            changed.append(dataclasses.replace(pieces, reasoning=form))
    for wrong in changed:
        with pytest.raises(_InexpressibleError):
            _prove(_Probe(jinja), wrong, 500, 0)


BODY = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
LIMIT = "{% if messages | length > 6 %}{{ raise_exception('Too long.') }}{% endif %}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ strftime_now('%Y') }}" + BODY.replace("CONTENT", "m.content"), "current date"),
        ("{{ '\\ud800' }}" + BODY.replace("CONTENT", "m.content"), "half a surrogate pair"),
        (BODY.replace("CONTENT", "m.content | upper"), "in order, once each"),
        (BODY.replace("CONTENT", "m.content[:40]"), "as no pieces can"),
        (BODY.replace("CONTENT", "m.content.lstrip()"), "as no pieces can"),
        (BODY.replace("CONTENT", "m.content.replace('<b>', '')"), "as no pieces can"),
        (BODY.replace("CONTENT", "loop.index ~ m.content"), "between a system and a user message"),
        (BODY.replace("CONTENT", "m.content ~ enable_thinking"), "as no pieces can"),
        (BODY.replace("CONTENT", "m.content.split('<think>')[0]"), "in order, once each"),
        (
            BODY.replace("CONTENT", "m.content.replace('<i>', '[' if loop.last else '(')"),
            "moves what stands in <i>",
        ),
        (LIMIT + BODY.replace("CONTENT", "m.content"), "Too long., which pieces do not refuse"),
        ("{{ messages[5].content }}", "refused the conversation"),
        ("{% for m in messages %}", "not valid Jinja"),
        ("", "in order, once each"),
    ],
)
def test_says_why_a_template_has_no_pieces(text: str, words: str) -> None:
    assert words in reason(text)


def test_templates_that_fold_or_alternate_have_no_pieces() -> None:
    folded = (
        "{% for m in messages %}{% if m.role != 'system' %}("
        "{% if not loop.first and loop.previtem.role == 'system' %}{{ loop.previtem.content }}{% endif %}"
        "{{ m.content }}){% endif %}{% endfor %}"
    )
    assert "'' between a system and a user message, not '(' last" in reason(folded)
    strict = (
        "{% for m in messages %}{% if not loop.first and m.role == loop.previtem.role %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}{% endfor %}"
    )
    assert "Roles must alternate" in reason(strict + BODY.replace("CONTENT", "m.content"))


def test_a_checkpoint_without_a_template_has_no_pieces() -> None:
    found = derive_chat_pieces(None, added_tokens=TOKENS)
    assert found == ChatUnsupported("the checkpoint has no chat template")


def test_conversations_are_reproducible_and_varied() -> None:
    tags = {role: ["think"] for role in ("system", "user", "assistant")}
    first, again = (generate_conversations(500, 3, tags=tags, tokens=TOKENS) for _ in range(2))
    assert first == again
    assert {len(messages) for messages in first} == set(range(1, 9))
    assert {messages[-1][0] for messages in first} >= {"user", "assistant"}
    contents = [content for messages in first for _, content in messages]
    assert all(any(space and space in content for content in contents) for space in SPACES if space)
    for part in ("<think>", "</think>", "<|im_end|>", "日本語"):
        assert any(part in content for content in contents)
    assert any(content == "" for content in contents)


@pytest.mark.parametrize("name", ["qwen", "demo"])
def test_segments_encode_to_the_tokens_of_the_whole_prompt(name: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = template(name)
    file = (QWEN if name == "qwen" else REPOSITORY / "demo") / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    added = [token["content"] for token in description["added_tokens"]]
    whole = tokenizers.Tokenizer.from_file(str(file))
    plain = tokenizers.Tokenizer.from_str(json.dumps(description | {"added_tokens": []}))
    pieces = derive_chat_pieces(text, added_tokens=added)
    assert isinstance(pieces, ChatPieces)
    tags = {role: ["think", "tool_response"] for role in ("system", "user", "assistant")}
    equal = guarded = 0
    for messages in generate_conversations(500, 7, tags=tags, tokens=added[:3]):
        for thinking in (True, False):
            try:
                segments = render_pieces(pieces, messages, thinking=thinking, add_generation_prompt=True)
            except ValueError:
                continue
            ids: list[int] = []
            for segment in segments:
                if segment.is_template:
                    assert segment.text in added
                    ids.append(whole.token_to_id(segment.text))
                else:
                    ids += plain.encode(segment.text, add_special_tokens=False).ids
            prompt = "".join(segment.text for segment in segments)
            if any(
                token in segment.text for segment in segments if not segment.is_template for token in added
            ):
                special = {whole.token_to_id(token) for token in added}
                assert sum(i in special for i in ids) == sum(segment.is_template for segment in segments)
                guarded += 1
            else:
                assert ids == whole.encode(prompt, add_special_tokens=False).ids, messages
                equal += 1
    assert equal > 200
    assert guarded > 100
