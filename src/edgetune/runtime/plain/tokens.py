"""Texts to token ids and back, with the place in the text where each token stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.runtime import checks
from edgetune.runtime.cancel import Cancel
from edgetune.runtime.capi import Interrupted
from edgetune.runtime.plain.artifact import PlainArtifact

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Long = Literal["refuse", "window"]
Text = str | tuple[str, str]  # a tuple is a pair of texts that the model reads together
_SHARED = 4  # a window shares a quarter of its tokens with the one before
_LEAST = 4  # tokens of a text in a window, below which cutting makes no sense
_AT_ONCE = 64  # texts that are tokenized before anybody looks whether it is cancelled


def strings(texts: Any) -> list[str]:
    """What callers give as texts. Raises InputError: it is no list of strings, or a text is not Unicode."""
    return [checks.text(f"texts[{place}]", one) for place, one in enumerate(_listed(texts, "a list of strings"))]


def checked(texts: Any) -> list[Text]:
    """What callers give as texts, or pairs of them. Raises InputError: it is something else, or a text is not Unicode."""
    found: list[Text] = []
    for place, one in enumerate(_listed(texts, "a list of strings, or of pairs of strings")):
        where = f"texts[{place}]"
        if isinstance(one, tuple | list):
            if len(one) != 2:
                raise InputError(f"must be a string or a pair of strings, not {checks.shown(one)}", where=where)
            found.append((checks.text(where, one[0]), checks.text(where, one[1])))
        else:
            found.append(checks.text(where, one))
    return found


def _listed(texts: Any, what: str) -> list[Any]:
    if isinstance(texts, str):
        raise InputError(f"must be {what}, not one string", where="texts", fix=f"give [{checks.shown(texts)}]")
    return checks.items("texts", texts, what)


@dataclass(frozen=True)
class Window:
    """What of a text goes through the model at once: all of it, unless it is over-long.

    Attributes:
        text: number of the text that it is of.
        encoding: ids, type ids, and the place of each token.
    """

    text: int
    encoding: Encoding

    def __len__(self) -> int:
        return len(self.encoding.ids)


class Tokens:
    """An artifact's tokenizer. Safe to use from several threads.

    Args:
        artifact: verified.

    Raises:
        EdgetuneError: the tokenizer cannot be read, or gives other ids than that of the model (golden.json).
    """

    def __init__(self, artifact: PlainArtifact) -> None:
        self._file = artifact.path / "tokenizer.json"
        self._lower, self.max_length = artifact.description.lower_case, artifact.description.max_length
        self._whole = _read(self._file)
        self._cut: dict[tuple[int, bool], Tokenizer] = {}
        for text, wanted in artifact.golden:
            found = tuple(self._encode([text], self._whole)[0].ids)
            if found != wanted:
                raise EdgetuneError(
                    f"the tokenizer gives {text[:40]!r} other ids than the model's: {list(found[:12])}, not {list(wanted[:12])}",
                    where=self._file,
                    fix="export it again; if it stays so, this version of `tokenizers` reads the file differently",
                )

    def windows(
        self, texts: Sequence[Text], long: Long, *, overlap: bool = False, cancel: Cancel | None = None
    ) -> list[Window]:
        """Tokenize texts, or pairs of them, with what the model's tokenizer adds.

        Args:
            texts: as `checked` gives them.
            long: an over-long text is refused, or cut into windows; of a pair the second one is cut.
            overlap: a window begins with the last quarter of the one before, so that each token has some around it.
            cancel: set it from any thread.

        Raises:
            Interrupted: it was cancelled.
            InputError: a text is over-long and refused, or so long that a pair's first one fills a window.
        """
        checks.choice("long", long, ("refuse", "window"))
        found: list[Window] = []
        for number, encoding in enumerate(self._encodings(texts, cancel)):
            if len(encoding.ids) <= self.max_length:
                found.append(Window(number, encoding))
                continue
            if long == "refuse":
                which = f"text {number + 1}" if len(texts) > 1 else "the text"
                raise InputError(
                    f"{which} has {len(encoding.ids):,} tokens; the model reads {self.max_length:,}",
                    fix='shorten it, or let it be read in windows: long="window"',
                )
            found += [Window(number, part) for part in self._parts(texts[number], overlap)]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._whole.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> Decoder:
        """A decoder of one answer's tokens, as they come."""
        return Decoder(self._whole)

    def _encodings(self, texts: Sequence[Text], cancel: Cancel | None) -> Iterator[Encoding]:
        for start in range(0, len(texts), _AT_ONCE):
            if cancel is not None and cancel.is_set():
                raise Interrupted
            yield from self._encode(texts[start : start + _AT_ONCE], self._whole)

    def _encode(self, texts: Sequence[Text], tokenizer: Tokenizer) -> list[Encoding]:
        return list(tokenizer.encode_batch([self._lowered(text) for text in texts]))

    def _lowered(self, text: Text) -> Text:
        if not self._lower:
            return text
        return text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower())

    def _parts(self, text: Text, overlap: bool) -> list[Encoding]:
        """An over-long text in windows."""
        around: Text = "" if isinstance(text, str) else (text[0], "")  # what is in each window beside it
        room = self.max_length - len(self._encode([around], self._whole)[0].ids)
        if room < _LEAST:
            what = f"the first text of a pair leaves room for {max(room, 0)} tokens of the second"
            raise InputError(what, fix="shorten it")
        cutter = self._cut.get((room, overlap))
        if cutter is None:
            cutter = _read(self._file)
            strategy = "longest_first" if isinstance(text, str) else "only_second"
            cutter.enable_truncation(self.max_length, stride=room // _SHARED if overlap else 0, strategy=strategy)
            if isinstance(text, str):
                self._cut[room, overlap] = cutter
        whole = self._encode([text], cutter)[0]
        return [whole, *whole.overflowing]


class Decoder:
    """From an answer's tokens to its text, whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def feed(self, token: int) -> str:
        """Take a token; returns what it adds to the text."""
        return self._stream.step(self._tokenizer, token) or ""


def _read(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:
        if isinstance(error, OSError | MemoryError) or type(error) is not Exception:
            raise
        raise EdgetuneError(
            f"the tokenizer cannot be read: {first_line(error)}", where=file, fix="update `tokenizers`, or export again"
        ) from error
    found.no_padding()
    found.no_truncation()
    return found
