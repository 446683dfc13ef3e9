"""Copies of a program with another manifest, whose own digest is made right again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIGEST = re.compile(rb'("manifest_sha256": ")[0-9a-f]{64}')


def link_program(program: Path, copy: Path) -> Path:
    """Makes the folder `copy` with symbolic links to the files of `program`."""
    copy.mkdir()
    for file in program.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    return copy


def with_manifest(program: Path, copy: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """`link_program`, with the manifest that `edit` leaves, valid but for what it says."""
    link_program(program, copy)
    manifest = json.loads((program / "manifest.json").read_text(encoding="utf-8"))
    edit(manifest)
    manifest.pop("manifest_sha256")
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64}).encode()
    text = DIGEST.sub(rb"\g<1>" + hashlib.sha256(text).hexdigest().encode(), text)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_bytes(text)
    return copy
