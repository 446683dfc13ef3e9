"""The files that a program takes along for its text: tokenizer and template, checked; chat pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_runner import _core
from qwen_runner.chat_jinja import ChatTemplate

from . import contract
from .chat_template import derive_chat_pieces
from .errors import ExportError
from .json_file import read_json_object

# All that is read of a folder.
NAMES = (contract.TOKENIZER_FILE, contract.TOKENIZER_CONFIG_FILE, contract.CHAT_TEMPLATE_FILE)


@dataclass(frozen=True)
class TokenizerFiles:
    """files: bytes by name, tokenizer.json among them."""

    files: dict[str, bytes]
    template: ChatTemplate | None

    def chat(self) -> dict[str, Any]:
        """What the manifest says of chats."""
        added_tokens = json.loads(self.files[contract.TOKENIZER_FILE]).get("added_tokens") or []
        template, special = (
            (None, None) if self.template is None else (self.template.text, self.template.special_tokens)
        )
        pieces = derive_chat_pieces(
            template, added_tokens=[str(token["content"]) for token in added_tokens], special_tokens=special
        )
        return pieces.to_json()


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Those of a checkpoint, a program, or any folder with a tokenizer.json.

    Raises:
        ExportError: there is no tokenizer.json, the runner cannot load it, or another file is not what
            transformers writes.
    """
    path = folder / contract.TOKENIZER_FILE
    try:
        template = ChatTemplate.load(folder)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if not path.is_file():
        raise ExportError(f"{path}: no such file; a fast tokenizer (tokenizers' own format) is needed")
    read_json_object(path)
    try:
        _core.Tokenizer(str(path))
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    files = {contract.TOKENIZER_FILE: path.read_bytes()}
    config = folder / contract.TOKENIZER_CONFIG_FILE
    if config.is_file():
        files[contract.TOKENIZER_CONFIG_FILE] = config.read_bytes()
    if template is not None:
        files[contract.CHAT_TEMPLATE_FILE] = template.text.encode()
    return TokenizerFiles(files, template)


def byte_tokenizer() -> TokenizerFiles:
    """A tokenizer of 256 tokens, one a byte, without a template: for a model whose text means nothing."""
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": dict(zip(_byte_alphabet(), range(256), strict=True)), "merges": []},
    }
    text = json.dumps(tokenizer, ensure_ascii=False)
    return TokenizerFiles({contract.TOKENIZER_FILE: text.encode()}, template=None)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE: its own if visible, else one from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
