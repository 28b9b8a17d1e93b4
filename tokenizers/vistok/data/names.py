"""Names of files as text: a file system allows any bytes, a message is one printable line."""

from __future__ import annotations

from pathlib import PurePath


def key_text(key: bytes) -> str:
    r"""Return a key as text: as it is if it is UTF-8, else with `\xe9` for bytes that are not."""
    return key.decode("utf-8", "backslashreplace")


def shown(name: str | bytes | PurePath) -> str:
    r"""Return a name as one line that can be printed, logged and written anywhere.

    Bytes that are not UTF-8, line ends and other characters that do not print become `\xe9`, `\n`
    and the like.
    """
    text = key_text(name) if isinstance(name, bytes) else str(name)
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python names files
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
