"""Reads the undefined symbols of a shared library, without binutils."""

import struct
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM = 11
_SHN_UNDEF = 0
_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"


def undefined_symbols(library: Path) -> set[str]:
    """The names that the 64-bit little-endian ELF file `library` expects from elsewhere.

    Raises:
        ValueError: the file is not such a library.
    """
    data = library.read_bytes()
    if not data.startswith(_ELF64_LITTLE_ENDIAN):
        raise ValueError(f"{library}: not a 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(data)
    table, entry_size, count = header[6], header[11], header[12]
    sections = [_SECTION.unpack_from(data, table + i * entry_size) for i in range(count)]
    names = set()
    for _, kind, _, _, offset, size, strings, _, _, _ in sections:
        if kind != _SHT_DYNSYM:
            continue
        strings_offset = sections[strings][4]
        for name, _, _, section, _, _ in _SYMBOL.iter_unpack(data[offset : offset + size]):
            if section == _SHN_UNDEF and name:
                start = strings_offset + name
                names.add(data[start : data.index(b"\0", start)].decode())
    return names
