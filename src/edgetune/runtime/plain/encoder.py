"""Encoders: texts in, vectors, labels or places out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import EdgetuneError
from edgetune.runtime import checks
from edgetune.runtime.cancel import Cancel
from edgetune.runtime.capi import Interrupted
from edgetune.runtime.plain.artifact import PlainArtifact
from edgetune.runtime.plain.description import GRAPH, Pooling
from edgetune.runtime.plain.graph import Graph, interruptible
from edgetune.runtime.plain.tokens import Long, Text, Tokens, Window, checked, strings

_BATCH_TOKENS = 2048  # that go through the model at once, padding included: bounds memory
_BATCH_TEXTS = 64

Floats = NDArray[np.float32]


class Encoder:
    """An encoder in memory, of one task. A context manager; several threads may use it at once.

    A text's numbers do not depend on what else is given, but for the last bits of floats: matrix kernels add up in another
    order for another number of rows.

    Args:
        artifact: verified.
        threads: CPU threads; all cores when None.

    Raises:
        InputError: `threads` is below 1, or far more than this machine has cores.
        EdgetuneError: ONNX Runtime cannot load it, or its tokenizer is not the model's.
    """

    def __init__(self, artifact: PlainArtifact, threads: int | None = None) -> None:
        self.artifact = artifact
        self._tokens = Tokens(artifact)
        self._graph = Graph(artifact.path / GRAPH, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, once what runs has ended. It cannot be used afterwards."""
        self._graph.close()

    def count(self, text: Text) -> int:
        """How many tokens the model reads of a text, those that the tokenizer adds included."""
        return sum(len(window) for window in self.windows([text]))

    def windows(self, texts: Sequence[Text]) -> list[Window]:
        """Texts as the model reads them, over-long ones in pieces; for `outputs`."""
        return self._tokens.windows(checked(texts), "window")

    def outputs(self, windows: Sequence[Window]) -> list[NDArray[Any]]:
        """The graph's outputs for some windows, read at once and filled up to the longest: (windows, …) each."""
        return self._outputs(windows, None)

    def _outputs(self, windows: Sequence[Window], how: Any) -> list[NDArray[Any]]:
        description = self.artifact.description
        return self._graph.run(feeds(windows, description.inputs, description.pad_id), how)

    def _read(
        self, texts: Sequence[Text], long: Long, cancel: Cancel | None, *, overlap: bool = False
    ) -> Iterator[tuple[Window, tuple[NDArray[Any], ...]]]:
        """The graph's outputs for each window of some texts, longest windows first; what belongs to padding is cut off."""
        checks.event("cancel", cancel)
        try:
            windows = self._tokens.windows(texts, long, overlap=overlap, cancel=cancel)
            order = sorted(windows, key=len, reverse=True)
            with interruptible(cancel) as how:
                while order:
                    if cancel is not None and cancel.is_set():
                        raise Interrupted
                    size = max(1, min(_BATCH_TEXTS, _BATCH_TOKENS // len(order[0])))
                    batch, order = order[:size], order[size:]
                    found = self._outputs(batch, how)
                    for row, window in enumerate(batch):
                        yield window, tuple(one[row, : len(window)] if self._by_token else one[row] for one in found)
        except Interrupted:
            raise EdgetuneError("cancelled before all texts were read") from None

    _by_token = False  # whether the graph gives a number, or several, for each token


def feeds(windows: Sequence[Window], inputs: Sequence[str], pad_id: int) -> dict[str, NDArray[np.int64]]:
    """What a graph reads of some windows: (windows, longest) int64 each, filled up at the end."""
    shape = len(windows), max(map(len, windows))
    values = {name: np.full(shape, pad_id if name == "input_ids" else 0, np.int64) for name in inputs}
    for row, window in enumerate(windows):
        encoding, length = window.encoding, len(window)
        values["input_ids"][row, :length] = encoding.ids
        values["attention_mask"][row, :length] = 1
        if "token_type_ids" in values:
            values["token_type_ids"][row, :length] = encoding.type_ids
    return values


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


class Embedder(Encoder):
    """Texts to vectors: pooled as the model was trained to, `mean` where nothing says how."""

    _by_token = True

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""
        return self.artifact.description.dimensions

    def encode(
        self,
        texts: Sequence[str],
        *,
        normalize: bool | None = None,
        long: Long = "refuse",
        cancel: threading.Event | None = None,
    ) -> Floats:
        """A vector for each text.

        Args:
            texts: any number.
            normalize: divide each vector by its length, so that a product of two is their cosine; as the model's
                configuration has it when None.
            long: over-long texts are refused, or read in windows: the vector is then that of all their tokens (`mean`,
                `max`), or the mean of the windows' (`cls`).
            cancel: set it from any thread, and reading ends at once, with an EdgetuneError.

        Returns:
            (texts, dimensions) float32.

        Raises:
            InputError: a text is not Unicode, or over-long and refused.
            EdgetuneError: cancelled, closed, or the runtime failed.
        """
        texts, pooling = strings(texts), self.artifact.description.pooling
        if normalize is not None:
            checks.flag("normalize", normalize)
        start = -np.inf if pooling == "max" else 0.0
        sums, weights = np.full((len(texts), self.dimensions), start), np.zeros(len(texts))
        for window, (hidden,) in self._read(texts, long, cancel):
            vector = pooled(hidden, pooling)
            if pooling == "max":
                np.maximum(sums[window.text], vector, out=sums[window.text])
                weights[window.text] = 1
            else:
                weight = len(window) if pooling == "mean" else 1
                sums[window.text] += vector * weight
                weights[window.text] += weight
        found = sums / np.maximum(weights, 1)[:, None]
        if self.artifact.description.normalize if normalize is None else normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found.astype(np.float32)


def pooled(hidden: NDArray[Any], pooling: Pooling) -> NDArray[np.float64]:
    """One vector of a text's: hidden (tokens, dimensions) to (dimensions,)."""
    if pooling == "cls":
        return hidden[0].astype(np.float64)
    found: NDArray[np.float64] = hidden.max(0).astype(np.float64) if pooling == "max" else hidden.mean(0, np.float64)
    return found
