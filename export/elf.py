"""Reads which symbols a shared library expects of whoever loads it, without binutils."""

import struct
from pathlib import Path

_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM, _SHT_VERSIONS = 11, 0x6FFFFFFF
_UNDEFINED = 0
_WEAK = 2
_LAST_UNVERSIONED = 1


def undefined_symbols(library: Path) -> set[str]:
    """The names that the 64-bit little-endian ELF file `library` needs and no library it links to promises.

    The linker gives a symbol that it found in a linked library that library's version (`GLIBC_2.14`): system
    libraries all have versions. Weak symbols may stay undefined.

    Raises:
        ValueError: the file is not such a library.
    """
    data = library.read_bytes()
    if not data.startswith(_ELF64_LITTLE_ENDIAN):
        raise ValueError(f"{library}: not a 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(data)
    table, entry_size, count = header[6], header[11], header[12]
    sections = {}
    by_index = []
    for index in range(count):
        _, kind, _, _, offset, size, link, _, _, _ = _SECTION.unpack_from(data, table + index * entry_size)
        by_index.append(offset)
        sections[kind] = (offset, size, link)
    offset, size, link = sections[_SHT_DYNSYM]
    symbols = list(_SYMBOL.iter_unpack(data[offset : offset + size]))
    if _SHT_VERSIONS in sections:
        versions = struct.unpack_from(f"<{len(symbols)}H", data, sections[_SHT_VERSIONS][0])
    else:
        versions = (0,) * len(symbols)
    names = set()
    for (name, info, _, section, _, _), version in zip(symbols, versions, strict=True):
        is_needed = section == _UNDEFINED and info >> 4 != _WEAK and name
        if is_needed and version & 0x7FFF <= _LAST_UNVERSIONED:
            start = by_index[link] + name
            names.add(data[start : data.index(b"\0", start)].decode())
    return names
