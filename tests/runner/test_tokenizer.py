"""The runner's tokenizer gives the ids and the text of Hugging Face `tokenizers`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
from tokenizer_strings import StringGenerator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_core = pytest.importorskip("qwen_runner._core", reason="needs the built extension: pip install -e .")

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("QWEN_SHARED", ROOT.parent / "shared"))
QWEN = SHARED / "qwen" / "tokenizer.json"
DEMO = ROOT / "demo" / "tokenizer.json"

STRINGS = 100_000
STRINGS_FOR_FLAGS = 20_000  # the other tokenizers cover all but the flags
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Pair:
    """Ours and theirs, read from the same file; `plain` is theirs without added tokens."""

    ours: Any
    theirs: Tokenizer
    plain: Tokenizer


def load_pair(spec: dict[str, Any], path: Path) -> Pair:
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    return Pair(_core.Tokenizer(str(path)), Tokenizer.from_file(str(path)), plain)


def small_spec() -> dict[str, Any]:
    """A vocabulary of 600 trained here, with added tokens that use every flag."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.decoder = decoders.ByteLevel()
    text = StringGenerator(7, [])
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.draw().decode("utf-8", "replace") for _ in range(3000)), trainer)
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    flags = ["special", "normalized", "lstrip", "rstrip", "single_word"]
    # The 32 combinations of the flags; contents that are prefixes of each other, change in NFC, are in the
    # vocabulary, or hold spaces and letters outside ASCII. None starts with a space, which makes `tokenizers`
    # panic after a token with rstrip.
    contents = [
        "<a>",
        "<a><a>",
        "e\u0301nd",
        "<b",
        "<b>",
        "the",
        "a",
        "<\u00e9>",
        "[ x ]",
        "\u212b",
        "\u6f22",
        "<c>\n",
    ]
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    next_id = len(vocabulary)
    for i in range(32):
        content = contents[i] if i < len(contents) else f"<t{i}>"
        token: dict[str, Any] = {flag: bool(i >> bit & 1) for bit, flag in enumerate(flags)}
        spec["added_tokens"].append(token | {"id": vocabulary.get(content, next_id), "content": content})
        next_id += content not in vocabulary
    return spec


def read_spec(path: Path) -> dict[str, Any]:
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return spec


@pytest.fixture(scope="module", params=["qwen", "qwen-without-nfc", "demo", "flags"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    if request.param == "flags":
        return load_pair(small_spec(), path)
    if request.param == "demo":
        return load_pair(read_spec(DEMO), path)
    spec = read_spec(QWEN)
    assert spec["normalizer"] == {"type": "NFC"}
    return load_pair(spec if request.param == "qwen" else spec | {"normalizer": None}, path)


def added_contents(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def check_equal(pair: Pair, strings: list[bytes]) -> None:
    """Encodes with and without added tokens, decodes with and without the special ones."""
    texts = [data.decode("utf-8", "replace") for data in strings]
    expected = [e.ids for e in pair.theirs.encode_batch_fast(texts, add_special_tokens=False)]
    for data, ids in zip(strings, expected, strict=True):
        assert pair.ours.encode(data, parse_special=True) == ids, data
    # Where no added token was found, the text is plain either way: `tokenizers` need not encode it again.
    added = pair.theirs.get_added_tokens_decoder().keys()
    special = [i for i, ids in enumerate(expected) if not added.isdisjoint(ids)]
    again = pair.plain.encode_batch_fast([texts[i] for i in special], add_special_tokens=False)
    plain = expected.copy()
    for i, encoding in zip(special, again, strict=True):
        plain[i] = encoding.ids
    for data, ids in zip(strings, plain, strict=True):
        assert pair.ours.encode(data) == ids, data
    for skip_special in (True, False):
        decoded = pair.theirs.decode_batch(expected, skip_special_tokens=skip_special)
        for ids, text in zip(expected, decoded, strict=True):
            assert pair.ours.decode(ids, skip_special=skip_special) == text, (ids, skip_special)


def chunks(strings: Iterator[bytes], size: int = 5000) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for data in strings:
        batch.append(data)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def test_generated_strings(pair: Pair, request: pytest.FixtureRequest) -> None:
    generator = StringGenerator(1, added_contents(pair.theirs))
    count = STRINGS_FOR_FLAGS if "flags" in request.node.callspec.id else STRINGS
    for strings in chunks(generator.draw() for _ in range(count)):
        check_equal(pair, strings)


def test_every_added_token(pair: Pair) -> None:
    tokens = added_contents(pair.theirs)
    check_equal(
        pair,
        [
            f"{before}{token}{after}".encode()
            for token in tokens
            for before in ("", "x", " \n")
            for after in ("", "y", "  ")
        ],
    )


def test_long_inputs(pair: Pair) -> None:
    generator = StringGenerator(2, added_contents(pair.theirs))
    mixed = b"".join(generator.draw() for _ in range(3000))
    runs = [
        unit * (50_000 // len(unit.encode()))
        for unit in (" ", "\n", "é", "漢", "1", "-", "ab ", "e\u0301\u0316")
    ]
    check_equal(pair, [mixed, b"a" * 1_000_000, *(run.encode() for run in runs)])


def test_decoding_each_id(pair: Pair) -> None:
    ids = [[i] for i in range(pair.theirs.get_vocab_size() + 3)]
    for skip_special in (True, False):
        decoded = pair.theirs.decode_batch(ids, skip_special_tokens=skip_special)
        assert [pair.ours.decode(one, skip_special=skip_special) for one in ids] == decoded


def test_decoding_random_ids(pair: Pair) -> None:
    rng = random.Random(3)
    size = pair.theirs.get_vocab_size()
    # Low ids are single bytes: they make every kind of broken UTF-8.
    ids = [
        [
            rng.randrange(256) if rng.random() < 0.6 else rng.randrange(size + 5)
            for _ in range(rng.randrange(20))
        ]
        for _ in range(5000)
    ]
    decoded = pair.theirs.decode_batch(ids, skip_special_tokens=False)
    for one, text in zip(ids, decoded, strict=True):
        assert pair.ours.decode(one, skip_special=False) == text, one


@pytest.fixture(scope="module")
def categories() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "unicode_categories", ROOT / "runner" / "unicode_categories.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def probed(categories: ModuleType) -> list[int]:
    table: list[int] = categories.probe()
    return table


def test_unicode_table_is_that_of_tokenizers(categories: ModuleType, probed: list[int]) -> None:
    """All 1 112 064 code points, measured on the installed `tokenizers`."""
    committed = (ROOT / "runner" / "unicode_categories_data.cpp").read_text(encoding="utf-8")
    expected = categories.source(probed, "")
    assert committed.splitlines()[1:] == expected.splitlines()[1:], "run runner/unicode_categories.py again"


def test_code_points_where_properties_change(
    categories: ModuleType, probed: list[int], tmp_path: Path
) -> None:
    """Each side of each border, between letters, digits, marks, spaces and punctuation."""
    pair = load_pair(small_spec(), tmp_path / "tokenizer.json")
    starts = [start for start, _ in categories.runs(probed)]
    points = sorted({c for start in starts for c in (start - 1, start) if c > 0 and not 0xD800 <= c < 0xE000})
    around = ("a{0}b", "1{0}2", " {0} ", "!{0}!", "'{0}", "\n{0}\n", "e\u0301{0}\u0316", "\u0345{0}\u0334")
    check_equal(pair, ["|".join(form.format(chr(c)) for form in around).encode() for c in points])
