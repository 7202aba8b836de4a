"""What each token stands for, from tokenizer.json: its bytes, and which tokens are special."""

from __future__ import annotations

import re
from pathlib import Path

from edgetune.files import read_json

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Bytes of tokens.

    Byte-level vocabularies (GPT-2's) write a byte as a printable character, SentencePiece's write a space as U+2581 and
    a lone byte as `<0x0A>`; which of them it is, tokenizer.json's decoder says.

    Args:
        path: tokenizer.json.

    Attributes:
        added: text of the tokens that are no pieces of words, by id.
        special: those of them that stand for no text.
    """

    def __init__(self, path: Path) -> None:
        found = read_json(path)
        vocabulary = found["model"]["vocab"]
        entries = vocabulary.items() if isinstance(vocabulary, dict) else [(e[0], i) for i, e in enumerate(vocabulary)]
        self._texts: dict[int, str] = {int(number): text for text, number in entries}
        added = {int(token["id"]): token for token in found.get("added_tokens", [])}
        self.special = {number: str(token["content"]) for number, token in added.items() if token.get("special")}
        self.added = {number: str(token["content"]) for number, token in added.items()}
        self._byte_level = "ByteLevel" in str(found.get("decoder"))
        self._letters = _letters() if self._byte_level else {}

    def bytes(self, token: int) -> bytes | None:
        """The token's bytes; None for a special token, and for an id that stands for nothing."""
        if token in self.special:
            return None
        if token in self.added:
            return self.added[token].encode()
        text = self._texts.get(token)
        if text is None:
            return None
        if self._byte_level:
            return b"".join(self._letters.get(letter, letter.encode()) for letter in text)
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()

    def text(self, token: int) -> str:
        """The token's text; half a character is U+FFFD, a special token its name."""
        found = self.bytes(token)
        return self.special.get(token, "") if found is None else found.decode("utf-8", "replace")


def _letters() -> dict[str, bytes]:
    """GPT-2's printable character of each byte: bytes that are no printable Latin-1 are moved behind U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(256 + place): bytes([byte]) for place, byte in enumerate(moved)
    }
