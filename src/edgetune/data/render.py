"""Rows to token ids with the model's own chat template, and the proof that the loss falls where it should.

The conversation is rendered once as a whole, and once up to each answer as the runtime will send it
(`add_generation_prompt`). What follows is the answer, so that no `{% generation %}` marks are needed. How the
template ends an answer is learned from a conversation whose answer is a known word (`Turn`).

    rendered:  … <|user|>What is 1+1?<|end|> <|assistant|> It is 2. <|end|> …
               └────────── prompt, only read ────────────┘└── learned ──┘
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from edgetune.data.problems import RowProblem, quoted
from edgetune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]

_WORD = "edgetuneprobe"
_OTHER_TEMPLATE = (
    "give another template: `model.chat_template=FILE.jinja` in a recipe, or chat_template.jinja in the model's folder"
)
_CHANGE_ROW = f"change the row, or {_OTHER_TEMPLATE}"

# Notes: what is true of a row without being wrong with it.
SPACE_LOST = "the tokenizer drops white space at an edge of the answer"
NORMALIZED = "the tokenizer normalizes Unicode in the answer"
NO_OPENING = "an earlier answer is rendered without the opening that the template puts before the last one"
SPECIAL_IN_TEXT = "the text holds special tokens"


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Attributes:
        ids: the tokens, with the template's beginning and end marks.
        learned: for each token, whether the loss falls on it, that is whether it is to be predicted.
        notes: what is worth counting in a report.
    """

    ids: list[int]
    learned: list[bool]
    notes: frozenset[str] = frozenset()


def cut(row: Encoded, limit: int) -> Encoded:
    """The row's first `limit` tokens."""
    return row if len(row.ids) <= limit else Encoded(row.ids[:limit], row.learned[:limit], row.notes)


@dataclass(frozen=True)
class Turn:
    """How the template renders an answer: `before`, the words, `after`.

    Attributes:
        before: what stands between the prompt that the runtime sends and the words; mostly nothing.
        after: from the words' end through the end-of-turn token.
        stop, stop_id: the end-of-turn token.
    """

    before: str
    after: str
    stop: str
    stop_id: int


class Renderer:
    """Encodes rows for one tokenizer.

    Args:
        tokenizer: with its chat template. Rows of plain text need none.
        stop_ids: the tokens at which the model's generation stops, where they are known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int] | None = None) -> None:
        self.tokenizer: Any = tokenizer
        self.stop_ids = stop_ids or set()
        self._added = {int(i): token for i, token in self.tokenizer.added_tokens_decoder.items()}
        self._special = {i: token.content for i, token in self._added.items() if token.special}
        ends = {*self.stop_ids, self.tokenizer.eos_token_id} & self._added.keys()
        self._special.update({i: self._added[i].content for i in ends})
        by_length = sorted(self._special.values(), key=len, reverse=True)
        self._rendered: dict[str, bool] = {}
        self._special_text = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    def encode(self, row: dict[str, Any], train_on: TrainOn) -> Encoded:
        """Encode a row and prove it.

        Args:
            row: `{"messages": [...]}` that ends with an answer, or `{"text": ...}`: all of it is learned.
            train_on: where the loss falls: every answer, the last one, or every token but the first.

        Returns:
            the row through its last end-of-turn token. The learned tokens of an answer decode to the
            answer as the template renders it, and its end-of-turn token; those before are the prompt's own.

        Raises:
            RowProblem: the row cannot be encoded so.
            InputError: the tokenizer has no chat template, or one that no row can be learned with.
        """
        return self._text(row["text"]) if "text" in row else self._chat(row["messages"], train_on)

    @cached_property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return max([*self.tokenizer.get_vocab().values(), *self._added], default=0) + 1

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that the runtime sends to get an answer to `messages`. Raises RowProblem."""
        return self._render(messages, ask=True)

    def pieces(self, row: Encoded) -> list[tuple[str, bool]]:
        """The row's text in pieces that are wholly learned or wholly only read."""
        found: list[tuple[str, bool]] = []
        start = 0
        for end in range(1, len(row.ids) + 1):
            if end == len(row.ids) or row.learned[end] != row.learned[start]:
                found.append((self._decode(row.ids[start:end]), row.learned[start]))
                start = end
        return found

    @cached_property
    def turn(self) -> Turn:
        """How the template renders an answer. Raises InputError where no answer can be learned with it."""
        if not self.tokenizer.chat_template:
            raise InputError(
                "the model has no chat template",
                where="model.id",
                fix=f"take a chat model, or {_OTHER_TEMPLATE}",
            )
        question = [{"role": "user", "content": "Hello"}]
        try:
            asked = self._render(question, ask=True)
            whole = self._render([*question, {"role": "assistant", "content": _WORD}])
        except RowProblem as problem:
            _bad_template(f"fails on a question and its answer: {problem.what}")
        if _WORD not in whole:
            _bad_template("leaves the answer out")
        if not whole.startswith(asked):
            ask, rest = _difference(asked, whole)
            _bad_template(f"asks for an answer with {quoted(ask)}, but renders an answer with {quoted(rest)} there")
        before, _, tail = whole[len(asked) :].partition(_WORD)
        for token in self._ids(tail):
            if token in self._special:
                stop = self._special[token]
                return Turn(before, tail[: tail.index(stop) + len(stop)], stop, token)
        _bad_template(f"ends an answer with {quoted(tail)}, which is no special token: the model would never stop")

    def _text(self, text: str) -> Encoded:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        note = self._prove(self._ids(text), 0, text, "text")
        notes = note | ({SPECIAL_IN_TEXT} if self._special_text.search(text) else set())
        return Encoded(ids, _all_but_first(ids), frozenset(notes))

    def _chat(self, messages: list[dict[str, str]], train_on: TrainOn) -> Encoded:
        turn = self.turn
        self._check_special_text(messages)
        whole = self._render(messages)
        self._check_nothing_left_out(messages, whole)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on != "assistant":
            answers = answers[-1:]
        spans = [self._answer(messages, i, whole, turn) for i in answers]
        ids = self._ids(whole[: spans[-1][1]])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RowProblem(f"the row begins with {self._special.get(bos, bos)} twice", _CHANGE_ROW)
        learned = [False] * len(ids)
        notes: set[str] = set()
        for number, (start, end) in zip(answers, spans, strict=True):
            first = self._boundary(ids, whole[:start], number + 1)
            last = len(ids) if end == spans[-1][1] else self._boundary(ids, whole[:end], number + 1)
            notes |= self._prove(ids[:last], first, whole[start:end], f"answer (turn {number + 1})")
            if ids[last - 1] != turn.stop_id or turn.stop_id in ids[first : last - 1]:
                raise RowProblem(f"turn {number + 1} does not end with its first {turn.stop}", _CHANGE_ROW)
            learned[first:last] = [True] * (last - first)
            if not whole[start:].startswith(turn.before):
                notes.add(NO_OPENING)
        return Encoded(ids, _all_but_first(ids) if train_on == "all" else learned, frozenset(notes))

    def _answer(self, messages: list[dict[str, str]], index: int, whole: str, turn: Turn) -> tuple[int, int]:
        """Where the answer stands in the rendered row, its end-of-turn token included."""
        asked = self._render(messages[:index], ask=True)
        earlier = index < len(messages) - 1
        fix = f"set data.train_on=last, or {_OTHER_TEMPLATE}" if earlier else _CHANGE_ROW
        if not whole.startswith(asked):
            ask, rest = _difference(asked, whole)
            raise RowProblem(
                f"turn {index + 1}: the template asks for the answer with {quoted(ask)}, "
                f"but renders the row with {quoted(rest)} there",
                fix,
            )
        content = messages[index]["content"]
        for words in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip(), content.strip("\n"))):
            for before in dict.fromkeys((turn.before, "")):
                if whole.startswith(before + words + turn.after, len(asked)):
                    return len(asked), len(asked) + len(before + words + turn.after)
        shown = whole[len(asked) : len(asked) + len(turn.before) + len(content) + len(turn.after)]
        raise RowProblem(
            f"turn {index + 1}: the template changes the answer or its end: "
            f"{quoted(turn.before + content + turn.after)} becomes {quoted(shown)}",
            fix,
        )

    def _render(self, messages: list[dict[str, str]], *, ask: bool = False) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise RowProblem(f"the model's chat template refuses the row: {message}", _CHANGE_ROW) from error

    def _ids(self, text: str) -> list[int]:
        # the template has written the special tokens, so the tokenizer must not add its own
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _boundary(self, ids: list[int], text: str, number: int) -> int:
        """How many of the row's tokens `text`, its beginning, makes up when it is tokenized alone."""
        alone = self._ids(text)
        if ids[: len(alone)] == alone:
            return len(alone)
        at = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(ids) - 1)
        raise RowProblem(
            f"turn {number}: the answer's first characters merge with the prompt into one token "
            f"({quoted(self._decode(ids[at : at + 1]))}), which the runtime never sends",
            "remove line breaks and spaces at the start of the answer",
        )

    def _prove(self, ids: list[int], first: int, text: str, what: str) -> set[str]:
        """Show that the tokens from `first` on decode to `text`; returns what was lost that does no harm."""
        alone = self._decode(ids[first:])
        found = {alone}
        left = first > 0 and self._takes_space(ids[first - 1], "rstrip")
        if first and not left and alone != text:
            # SentencePiece drops a leading space when it decodes; with the prompt before it, it is kept
            head, both = self._decode(ids[:first]), self._decode(ids)
            found |= {both[len(head) :]} if both.startswith(head) else set()
        if text in found:
            return set()
        right = first > 0 and self._takes_space(ids[-1], "lstrip")
        lost = text.lstrip() if left else text
        if right and (stop := self._special.get(ids[-1], "")) and lost.endswith(stop):
            lost = lost.removesuffix(stop).rstrip() + stop
        if lost in found:
            return {SPACE_LOST}
        if getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None) is not None:
            for form in ("NFC", "NFKC"):
                if unicodedata.normalize(form, lost) in found:
                    return {NORMALIZED} | ({SPACE_LOST} if lost != text else set())
        given, got = _difference(text, alone)
        raise RowProblem(
            f"the tokens of the {what} decode to {quoted(got)} where the row has {quoted(given)}",
            "the tokenizer has no token for these characters: replace them, or remove the row",
        )

    def _takes_space(self, token: int, side: str) -> bool:
        return token in self._added and bool(getattr(self._added[token], side))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _check_nothing_left_out(self, messages: list[dict[str, str]], whole: str) -> None:
        for number, message in enumerate(messages, 1):
            role = message["role"]
            if role != "assistant" and not (message["content"].strip() in whole and self._renders(role)):
                what = f"turn {number}: the model's chat template leaves out or changes the {role} turn"
                raise RowProblem(what, f"remove the turn, or {_OTHER_TEMPLATE}")

    def _renders(self, role: str) -> bool:
        """Whether the template puts out turns of a role at all: some pass over system or tool in silence."""
        if role not in self._rendered:
            turn = [{"role": role, "content": _WORD}]
            rest = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
            probe = turn + rest if role == "system" else rest + turn + rest[1:]
            try:
                self._rendered[role] = _WORD in self._render(probe)
            except RowProblem:  # such a probe is refused; what it says about the row is found with the row
                self._rendered[role] = True
        return self._rendered[role]

    def _check_special_text(self, messages: list[dict[str, str]]) -> None:
        for number, message in enumerate(messages, 1):
            if found := self._special_text.search(message["content"]):
                raise RowProblem(
                    f"turn {number} holds {found.group()}, which the tokenizer reads as a special token",
                    "write it in another way, or remove the row",
                )


def _bad_template(what: str) -> NoReturn:
    raise InputError(f"the model's chat template {what}", where="model.chat_template", fix=_OTHER_TEMPLATE)


def _difference(one: str, other: str) -> tuple[str, str]:
    """Both texts from a little before the place where they part."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    at = max(0, at - 8)
    return one[at : at + 40], other[at : at + 40]


def _all_but_first(ids: list[int]) -> list[bool]:
    return [False] * min(1, len(ids)) + [True] * (len(ids) - 1)
