"""A folder with a model as lm-evaluation-harness knows models. Imported only where `lm_eval` is installed.

Artifact and merged model go through the same code (see `readers`), so that what differs between their results is the
models. The harness' own onnxruntime-genai backend reads each continuation anew, also where only its last token differs,
and generates on after the texts that end an answer; and what it prints beside transformers would come of two codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgetune.errors import InputError
from edgetune.export.readers import adapter_of, ends, longest, open_reader, pieces, provider_of
from edgetune.models import load_tokenizer
from edgetune.progress import Task
from edgetune.runtime.artifact import adapter_file

_STEP = 512  # tokens that are fed at once: bounds the logits in memory
_MOST_NEW = 256  # tokens of an answer where the task does not say


class Folder(TemplateLM):
    """The model in a folder: an artifact, or a transformers folder in float32.

    Args:
        folder: the model.
        bar: told of each request that is done.
        provider: where an artifact runs; what it was made for when None.
        adapter: which of its adapters is on; `none`: the base; its only one when None.

    Raises:
        InputError: the provider is missing here, there is no such adapter, or the folder holds no model that can be read.
    """

    def __init__(self, folder: Path, bar: Task, provider: str | None = None, adapter: str | None = None) -> None:
        super().__init__()
        self.tokenizer: Any = load_tokenizer(folder)
        self.max_length, self._ends = longest(folder), ends(folder)
        self.adapter = adapter_of(folder, adapter)
        switched = None if self.adapter is None else adapter_file(self.adapter)
        self._reader = open_reader(folder, provider=provider_of(folder, provider), adapter=switched)
        self._bar, self._requests = bar, 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which every token is scored."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """A name under which the harness may keep requests; it keeps none here."""
        return "folder"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with what the tokenizer itself puts in front; not where it stands there already."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that the model's template makes of a conversation."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _expect(self, requests: int) -> None:
        self._requests += requests
        self._bar.total(self._requests)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of the continuation, and whether it is what greedy search would say."""
        self._expect(len(requests))
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        fed: tuple[Sequence[int], int] | None = None
        scores: Any = None
        # Those that read the same are neighbours: four answers of one token are one pass.
        for at in sorted(range(len(rows)), key=lambda at: (rows[at][0][:-1], rows[at][1])):
            ids, count = rows[at]
            if fed != (ids[:-1], count):
                fed, scores = (ids[:-1], count), self._scores(ids[:-1], count)
            found[at] = _score(scores, ids[-count:])
            self._bar.advance(1)
        return found

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """What is read, the end of it where it is too long, and how many of its last tokens are scored."""
        if not continuation:
            raise InputError("a task has an empty answer to score", fix="check its doc_to_choice and doc_to_target")
        ids = (context + continuation)[-(self.max_length + 1) :]
        return ids, min(len(continuation), len(ids) - 1)

    def _scores(self, ids: Sequence[int], count: int) -> Any:
        """Log-probabilities (count, V), float32, after each of the last `count` tokens."""
        import torch

        first, at, kept = len(ids) - count, 0, []
        for logits in pieces(self._reader, ids, _STEP):
            if at + len(logits) > first:
                kept.append(logits[max(first - at, 0) :].log_softmax(-1))
            at += len(logits)
        return torch.cat(kept)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows as long as the context."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each prompt, up to the first text that ends it."""
        self._expect(len(requests))
        found = []
        for prompt, options in (request.args for request in requests):
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise InputError(
                    "the task draws its answers at random; answers here are greedy", fix="set do_sample: false"
                )
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else [text for text in until if text]
            most = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _MOST_NEW)
            found.append(self._answer(self.tok_encode(prompt), until, min(most, self.max_length - 1)))
            self._bar.advance(1)
        return found

    def _answer(self, prompt: list[int], until: list[str], most: int) -> str:
        ids, made, text = prompt[-(self.max_length - most) :], [], ""
        step = min(_STEP, self._reader.most or _STEP)
        self._reader.reset()
        for start in range(0, len(ids), step):
            logits = self._reader.feed(ids[start : start + step])
        while True:
            token = int(logits[-1].argmax())
            if token in self._ends:
                return text
            made.append(token)
            text = str(self.tokenizer.decode(made, skip_special_tokens=True))
            if ended := [text.index(end) for end in until if end in text]:
                return text[: min(ended)]
            if len(made) >= most:
                return text
            logits = self._reader.feed([token])


def _score(scores: Any, ids: Sequence[int]) -> tuple[float, bool]:
    import torch

    targets = torch.tensor(ids)
    total = float(scores.gather(-1, targets[:, None]).double().sum())
    return total, bool((scores.argmax(-1) == targets).all())
