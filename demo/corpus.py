"""The demo model's text: books that Debian packages, read straight from the packages' own data files.

    python demo/corpus.py OUT          # needs apt-get and dpkg-deb, nothing is installed

writes OUT/train.json (a list of {"book", "text"}, one entry a chapter), OUT/definitions.json (word ->
definition), OUT/validation.txt (chooses the checkpoint) and OUT/heldout.txt (seen by neither training nor
that choice; committed here).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGES = ("r-cran-janeaustenr", "r-cran-tokenizers", "sword-text-web", "dict-devil")
# Every 35th chapter is held out, the one after next chooses the checkpoint: 64 KB of short chapters each.
HELDOUT_STRIDE, HELDOUT_PHASE, VALIDATION_PHASE = 35, 11, 13
SPLIT_BYTES = 64 * 1024
# Bierce's jokes about peoples and faiths have not aged well.
SKIPPED = {
    "aboriginies",
    "allah",
    "female",
    "hag",
    "heathen",
    "hebrew",
    "infidel",
    "koran",
    "mulatto",
    "negro",
    "woman",
}


@dataclass(frozen=True)
class Chapter:
    """One chapter: paragraphs on one line each, separated by an empty line."""

    book: str
    text: str


def fetch(folder: Path) -> Path:
    """Downloads and unpacks PACKAGES below `folder` with apt-get and dpkg-deb; returns the unpacked root."""
    root = folder / "root"
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def r_strings(path: Path) -> Iterator[list[str]]:
    """Yields each character vector of an R lazy-load database (`Rdata.rdb`), zlib blocks of XDR objects."""
    data = path.read_bytes()
    while data:
        block = zlib.decompressobj()
        payload = block.decompress(data[4:])  # 4 bytes: the uncompressed length
        data = block.unused_data
        assert payload[:2] == b"X\n" and struct.unpack(">i", payload[2:6])[0] == 3, (
            f"{path}: not R serialization 3"
        )
        cursor = 14 + 4 + struct.unpack(">i", payload[14:18])[0]
        flags, count = struct.unpack(">ii", payload[cursor : cursor + 8])
        assert flags & 0xFF == 16, f"{path}: not a character vector"
        cursor += 8
        strings = []
        for _ in range(count):
            length = max(struct.unpack(">i", payload[cursor + 4 : cursor + 8])[0], 0)  # -1 is NA
            strings.append(payload[cursor + 8 : cursor + 8 + length].decode("utf-8"))
            cursor += 8 + length
        yield strings


def sword_books(folder: Path) -> Iterator[str]:
    """Yields each book of a SWORD zText module compressed by book: OSIS XML of one book, verses in order."""
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        blocks = (folder / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            yield zlib.decompress(blocks[offset : offset + size]).decode("utf-8")


def plain(text: str) -> str:
    """One typography for all sources: straight quotes, em dashes, no italics marks, single spaces."""
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"", "\ufeff"))
    text = re.sub(r"\s*-{2,}\s*", "\u2014", text.replace("_", ""))
    text = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", text)
    return re.sub(r" +(?=[,.;:?!])", "", re.sub(r"\s+", " ", text)).strip()


def paragraphs(lines: list[str]) -> list[str]:
    """Joins hard-wrapped lines into paragraphs."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    return [paragraph for block in blocks if (paragraph := plain(block))]


def split_chapters(book: str, lines: list[str], heading: str) -> Iterator[Chapter]:
    """Cuts a novel at lines that match `heading`; what stands before the first one is dropped."""
    starts = [i for i, line in enumerate(lines) if re.match(heading, line.strip())]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        text = [
            p
            for p in paragraphs(lines[start + 1 : end])
            if not re.fullmatch(r"(VOLUME|Volume) \w+|THE END|Finis", p)
        ]
        if sum(map(len, text)) > 1000:  # shorter ones are entries of a table of contents
            yield Chapter(book, "\n\n".join(text))


def austen(root: Path) -> Iterator[Chapter]:
    """Jane Austen's six novels (1811-1818)."""
    for lines in r_strings(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"):
        yield from split_chapters(lines[0].title(), lines, r"(?i)chapter\s+([ivxlc]+|\d+)\.?$")


def moby_dick(root: Path) -> Iterator[Chapter]:
    """Herman Melville's Moby-Dick (1851), without the distributor's header and licence."""
    ((text,),) = r_strings(root / "usr/lib/R/site-library/tokenizers/data/Rdata.rdb")
    body = re.split(r"\*\*\* ?(?:START|END) OF TH.*\n", text)[1]
    lines = [line for line in body.splitlines() if not line.startswith("End of Project Gutenberg")]
    yield from split_chapters("Moby-Dick", lines, r"CHAPTER \d+")


def bible(root: Path) -> Iterator[Chapter]:
    """The World English Bible: a modern English translation that its translators put in the public domain."""
    for osis in sword_books(root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"):
        name = re.search(r'<milestone n="([^"]*)" type="x-usfm-h"', osis)
        osis = re.sub(r"<note.*?</note>|<title.*?</title>|<l [se]ID[^>]*>", " ", osis, flags=re.S)
        for chapter in re.split(r"<chapter [^>]*sID[^>]*>", osis)[1:]:
            chapter = re.sub(r'<div eID="[^"]*" type="x-p"/>|<lg [se]ID[^>]*>', "\n\n", chapter)
            text = "\n\n".join(paragraphs(re.sub(r"<[^>]*>", "", chapter).splitlines()))
            if len(text) > 200:
                yield Chapter(name.group(1) if name else "Bible", text)


def definitions(root: Path) -> dict[str, str]:
    """Ambrose Bierce's The Devil's Dictionary (1911): word -> the prose of its definition."""
    packed = (root / "usr/share/dictd/devil.dict.dz").read_bytes()
    text = gzip.decompress(packed).decode("utf-8", "replace")
    found = {}
    for match in re.finditer(r"^([A-Z][A-Z' -]+), (?:n|adj|v\.[it]|adv)\.(.*(?:\n.+)*)", text, flags=re.M):
        prose = plain(match.group(2))
        word = match.group(1).lower()
        if 40 < len(prose) < 900 and word not in SKIPPED:
            found[word] = prose
    return found


def split(chapters: list[Chapter]) -> tuple[list[Chapter], str, str]:
    """Returns (training chapters, validation text, held-out text); whole chapters, spread over all books."""
    parts: dict[int, list[str]] = {HELDOUT_PHASE: [], VALIDATION_PHASE: []}
    train = []
    for i, chapter in enumerate(chapters):
        part = parts.get(i % HELDOUT_STRIDE)
        size = len(chapter.text.encode())
        if part is None or size > 12_000 or sum(len(text.encode()) for text in part) + size > SPLIT_BYTES:
            train.append(chapter)
        else:
            part.append(chapter.text)
    return train, "\n\n".join(parts[VALIDATION_PHASE]), "\n\n".join(parts[HELDOUT_PHASE])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write, created when missing")
    out: Path = parser.parse_args().out
    root = fetch(out / "packages")
    chapters = [*austen(root), *moby_dick(root), *bible(root)]
    train, validation, heldout = split(chapters)
    (out / "train.json").write_text(json.dumps([asdict(chapter) for chapter in train], ensure_ascii=False))
    (out / "definitions.json").write_text(json.dumps(definitions(root), ensure_ascii=False))
    (out / "validation.txt").write_text(validation)
    (out / "heldout.txt").write_text(heldout)
    books = {chapter.book for chapter in train}
    size = sum(len(chapter.text.encode()) for chapter in train)
    print(
        f"{len(train)} chapters of {len(books)} books, {size / 1e6:.1f} MB; "
        f"validation {len(validation.encode())} B; held out {len(heldout.encode())} B"
    )


if __name__ == "__main__":
    main()
