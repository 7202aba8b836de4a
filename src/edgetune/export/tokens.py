"""Tokens as people read them: their text, and what kind of text it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CLASSES = ("word start", "word continuation", "digits", "punctuation", "whitespace", "part of a character", "special")
_SPACES = ("Ġ", "▁", " ")  # how byte-level BPE, SentencePiece and plain vocabularies write a leading space
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Tokens:
    """The texts of a tokenizer's tokens.

    Args:
        tokenizer: of transformers.
        stops: further tokens that are no text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = {*tokenizer.all_special_ids, *stops}
        self._special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """A token's text, with the space before it."""
        if token not in self._texts:
            written = self._tokenizer.convert_ids_to_tokens(token) or ""
            text = self.join([token])
            if written.startswith(_SPACES) and token not in self._special and not text[:1].isspace():
                text = f" {text}"  # SentencePiece drops it where it decodes
            self._texts[token] = text
        return self._texts[token]

    def join(self, ids: Sequence[int]) -> str:
        """The text of several tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def kind(self, before: int, token: int) -> str:
        """Which of `CLASSES` a token is that follows the token `before`."""
        if token in self._special:
            return "special"
        text = self.text(token)
        words = text.strip()
        if not words:
            return "whitespace"
        if _BROKEN in words:
            return "part of a character"
        if all(character.isnumeric() for character in words):
            return "digits"
        if not any(character.isalnum() for character in words):
            return "punctuation"
        joined = before not in self._special and self.text(before)[-1:].isalnum() and not text[:1].isspace()
        return "word continuation" if joined else "word start"
