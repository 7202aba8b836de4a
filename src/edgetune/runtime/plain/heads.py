"""Encoders with a head: labels of texts and of their words, and answers that stand in a text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.errors import InputError
from edgetune.runtime import checks
from edgetune.runtime.plain.encoder import Encoder, Floats, softmax
from edgetune.runtime.plain.tokens import Long, Text, Window, checked, strings

_OUTSIDE = "O"  # the label of a word that is no part of a span


@dataclass(frozen=True)
class Classification:
    """What a text is.

    Attributes:
        label: the one with the largest score.
        score: its score.
        scores: of each label: probabilities where one holds (they add up to 1) or several may, else the logits.
    """

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Span:
    """Words of a text that belong together.

    Attributes:
        label: without the `B-` or `I-` of its words' labels.
        text: as it stands in the text.
        start, end: where, in characters, the end excluded.
        score: mean probability of the words' labels.
    """

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class FoundAnswer:
    """A piece of a text that answers a question.

    Attributes:
        text: as it stands there.
        start, end: where, in characters, the end excluded.
        score: its probability, of all pieces of the window where it stands.
        unanswerable: the probability that the text holds no answer, by the window where that is least. It says something
            of models only that were trained on questions without an answer.
    """

    text: str
    start: int
    end: int
    score: float
    unanswerable: float


class Classifier(Encoder):
    """Texts, or pairs of texts, to labels."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the model's order."""
        return self.artifact.description.labels

    def classify(
        self, texts: Sequence[Text], *, long: Long = "refuse", cancel: threading.Event | None = None
    ) -> list[Classification]:
        """The label of each text.

        Args:
            texts: strings, or pairs of strings for a model that compares two.
            long: over-long texts are refused, or read in windows, whose scores are averaged.
            cancel: set it from any thread, and reading ends at once, with an EdgetuneError.

        Raises:
            InputError: a text is not Unicode, or over-long and refused.
            EdgetuneError: cancelled, closed, or the runtime failed.
        """
        texts = checked(texts)
        sums, counts = np.zeros((len(texts), len(self.labels))), np.zeros(len(texts))
        for window, (logits,) in self._read(texts, long, cancel):
            sums[window.text] += self._scores(logits)
            counts[window.text] += 1
        return [self._told(row) for row in sums / np.maximum(counts, 1)[:, None]]

    def _scores(self, logits: Floats) -> np.ndarray:
        kind = self.artifact.description.scores
        if kind == "softmax":
            return softmax(logits)
        wide = logits.astype(np.float64)
        return 1 / (1 + np.exp(-wide)) if kind == "sigmoid" else wide

    def _told(self, scores: np.ndarray) -> Classification:
        best = int(scores.argmax())
        named = {label: float(score) for label, score in zip(self.labels, scores, strict=True)}
        return Classification(self.labels[best], float(scores[best]), named)


class Tagger(Encoder):
    """Texts to spans with labels, such as names of people and places."""

    _by_token = True

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of words, in the model's order."""
        return self.artifact.description.labels

    def tag(
        self, texts: Sequence[str], *, long: Long = "refuse", cancel: threading.Event | None = None
    ) -> list[list[Span]]:
        """The spans of each text, in order.

        A word has the label of its first token. Words side by side make a span while their labels agree and none begins a
        new one (`B-`); words labelled `O` are in none.

        Args:
            texts: any number.
            long: over-long texts are refused, or read in windows that share a quarter; a word's label is then that of the
                window where most stands on both its sides.
            cancel: set it from any thread, and reading ends at once, with an EdgetuneError.

        Raises:
            InputError: a text is not Unicode, or over-long and refused.
            EdgetuneError: cancelled, closed, or the runtime failed.
        """
        texts = strings(texts)
        words: list[dict[int, _Word]] = [{} for _ in texts]  # by a word's number in the text
        for window, (logits,) in self._read(texts, long, cancel, overlap=True):
            _add_words(words[window.text], window, logits)
        return [
            self._spans(text, sorted(found.values(), key=lambda word: word.start))
            for text, found in zip(texts, words, strict=True)
        ]

    def _spans(self, text: str, words: list[_Word]) -> list[Span]:
        spans: list[Span] = []
        before, count = "", 0
        for word in words:
            scores = softmax(word.logits)
            label = self.labels[int(scores.argmax())]
            begins, _, kind = label.rpartition("-") if label[:2] in ("B-", "I-") else ("I", "", label)
            score, joined = float(scores.max()), before == kind and begins != "B"
            before = "" if label == _OUTSIDE else kind
            if label == _OUTSIDE:
                continue
            if joined:
                last = spans.pop()
                start, score, count = last.start, (last.score * count + score) / (count + 1), count + 1
            else:
                start, count = word.start, 1
            start, end = trimmed(text, start, word.end)
            spans.append(Span(kind, text[start:end], start, end, score))
        return spans


@dataclass
class _Word:
    """A word of a text: its place, the logits of its first token, and how far that is from its window's edge."""

    start: int
    end: int
    logits: Floats
    inside: int


def _add_words(words: dict[int, _Word], window: Window, logits: Floats) -> None:
    """Take what a window says of its words, by their numbers: that of where most stands around a word's first token."""
    encoding, first = window.encoding, {}
    for place, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if word is None or start == end:
            continue
        if word not in first:
            first[word] = _Word(start, end, logits[place], min(place, len(window) - 1 - place))
        first[word].end = end
    for word, found in first.items():
        known = words.get(word)
        # A window may begin amid a word, whose first token is in the one before.
        if known is None or (found.start, -found.inside) < (known.start, -known.inside):
            found.end = max(found.end, known.end if known else 0)
            words[word] = found
        else:
            known.end = max(known.end, found.end)


class Answerer(Encoder):
    """Finds the answer to a question in a text."""

    _by_token = True

    def answer(
        self,
        question: str,
        context: str,
        *,
        max_tokens: int = 30,
        long: Long = "refuse",
        cancel: threading.Event | None = None,
    ) -> FoundAnswer:
        """The likeliest answer.

        Args:
            question: what is asked.
            context: the text that holds the answer.
            max_tokens: most tokens of an answer.
            long: an over-long text is refused, or read in windows that share a quarter; the likeliest answer of all counts.
            cancel: set it from any thread, and reading ends at once, with an EdgetuneError.

        Raises:
            InputError: a text is not Unicode, empty, or over-long and refused.
            EdgetuneError: cancelled, closed, or the runtime failed.
        """
        if not checks.text("question", question).strip() or not checks.text("context", context).strip():
            raise InputError("question or text is empty", fix="give both")
        most = checks.whole("max_tokens", max_tokens, 1)
        read = self._read([(question, context)], long, cancel, overlap=True)
        found = [_best(window, logits[0], logits[1], most) for window, logits in read]
        score, (start, end) = max(((one[0], one[1]) for one in found), key=lambda one: one[0])
        start, end = trimmed(context, start, end)
        return FoundAnswer(context[start:end], start, end, score, min(none for _, _, none in found))


def _best(window: Window, begins: Floats, ends: Floats, most: int) -> tuple[float, tuple[int, int], float]:
    """The likeliest answer of a window: its probability and place; and the probability that there is none.

    As transformers' pipeline has it: of the text's tokens, and the first of all, which stands for no answer.
    """
    inside = np.array([part == 1 for part in window.encoding.sequence_ids])
    allowed = inside.copy()
    allowed[0] = True
    start, end = (softmax(np.where(allowed, one, -np.inf)) for one in (begins, ends))
    none = float(start[0] * end[0])
    start, end = start * inside, end * inside
    pairs = np.triu(np.outer(start, end)) - np.triu(np.outer(start, end), most)
    first, last = np.unravel_index(int(pairs.argmax()), pairs.shape)
    offsets = window.encoding.offsets
    return float(pairs[first, last]), (offsets[first][0], offsets[last][1]), none


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A place without white space at its ends: some tokenizers count the space before a word to it."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
