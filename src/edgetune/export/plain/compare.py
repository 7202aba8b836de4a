"""A finished artifact against the torch model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgetune.errors import EdgetuneError, InputError
from edgetune.export.plain.texts import Text
from edgetune.models.quiet import quiet
from edgetune.recipe import Limits
from edgetune.runtime.plain.artifact import PlainArtifact
from edgetune.runtime.plain.description import SEQ2SEQ
from edgetune.runtime.plain.encoder import Encoder, feeds, pooled
from edgetune.runtime.plain.seq2seq import Seq2Seq

_TOLERANCE = 1e-3  # of a float32 graph's numbers, relative to 1 + the largest of the model's
_ANSWER = 32  # tokens of a greedy answer that is compared
_LEAST_COSINE = 0.99  # of an embedding and the model's, in the mean
_TIE = 1e-2  # difference of two logits below which either token may be the likeliest


def compare(artifact: PlainArtifact, model: Any, texts: Sequence[Text], *, exact: bool) -> dict[str, Any]:
    """Compare an artifact's numbers with its model's, text by text.

    Args:
        artifact: verified.
        model: the torch model, float32, with an attention that computes.
        texts: what both read; over-long ones in windows, of a sequence-to-sequence model not at all.
        exact: the artifact is float32: its numbers have to be the model's, and so do the tokens of greedy answers.

    Returns:
        `texts`, `tokens`, `difference` (the largest of two numbers, relative to 1 + the largest of the model's); of embeddings
        `cosine_mean` and `cosine_min`; of heads and answers `kld_mean` and `kld_max` in nats, and `top1_agreement` (share of
        labels, places or tokens that are the same); of answers `greedy_agreement` (share of answers that are the same token for
        token).

    Raises:
        EdgetuneError: `exact`, and it is not so.
        InputError: all texts are over-long.
    """
    with quiet():
        found = (
            _of_seq2seq(artifact, model, texts)
            if artifact.description.task == SEQ2SEQ
            else _of_encoder(artifact, model, texts)
        )
    if exact and not found["difference"] <= _TOLERANCE:
        raise EdgetuneError(
            f"the graph's numbers differ from the model's by {found['difference']:.2g}",
            where=artifact.name,
            fix="the architecture is exported wrongly: please report this model",
        )
    if exact and (parted := found.get("parted")):
        raise EdgetuneError(
            f"the graph's greedy answer to {parted[0]!r} is another than the model's",
            where=artifact.name,
            fix="the architecture is exported wrongly: please report this model",
        )
    found.pop("parted", None)
    return found


def missed(found: dict[str, Any], limits: Limits) -> list[str]:
    """Which of the gate's limits an artifact misses, a sentence each."""
    said = []
    if found.get("kld_mean", 0.0) > limits.kld_mean:
        said.append(f"mean KL divergence {found['kld_mean']:.4f} nats, at most {limits.kld_mean:g}")
    if found.get("top1_agreement", 1.0) < limits.top1_agreement:
        said.append(f"the best one agrees in {found['top1_agreement']:.1%}, at least {limits.top1_agreement:.0%}")
    if found.get("cosine_mean", 1.0) < _LEAST_COSINE:
        said.append(f"mean cosine {found['cosine_mean']:.4f}, at least {_LEAST_COSINE:g}")
    return said


def _of_encoder(artifact: PlainArtifact, model: Any, texts: Sequence[Text]) -> dict[str, Any]:
    import torch

    task, pooling = artifact.description.task, artifact.description.pooling
    outputs = OUTPUTS[task]
    tokens, worst = 0, 0.0
    cosines: list[float] = []
    klds: list[float] = []
    agree: list[bool] = []
    with Encoder(artifact) as encoder, torch.no_grad():
        for window in encoder.windows(texts):
            given = feeds([window], artifact.description.inputs, artifact.description.pad_id)
            wanted = model(**{name: torch.from_numpy(value) for name, value in given.items()})
            ours = encoder.outputs([window])
            tokens += len(window)
            for name, one in zip(outputs, ours, strict=True):
                right = wanted[name][0].numpy()
                worst = max(worst, difference(right, one[0]))
                if task == "feature-extraction":
                    cosines.append(cosine(pooled(right, pooling), pooled(one[0], pooling)))
                    continue
                kld, same = divergence(right, one[0])
                klds += kld
                agree += same
    found = {"texts": len(texts), "tokens": tokens, "difference": worst}
    if cosines:
        return {**found, "cosine_mean": float(np.mean(cosines)), "cosine_min": float(np.min(cosines))}
    return {**found, **_summed(klds, agree)}


OUTPUTS: dict[str, tuple[str, ...]] = {
    "feature-extraction": ("last_hidden_state",),
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
}


def _of_seq2seq(artifact: PlainArtifact, model: Any, texts: Sequence[Text]) -> dict[str, Any]:
    import torch

    tokens, worst = 0, 0.0
    klds: list[float] = []
    agree: list[bool] = []
    parted: list[str] = []
    with Seq2Seq(artifact) as session, torch.no_grad():
        fitting = [(text, ids) for text in texts if isinstance(text, str) and (ids := _ids(session, text))]
        if not fitting:
            most = artifact.description.max_length
            raise InputError(f"no text to compare on has at most {most} tokens", fix="give shorter ones: --data FILE")
        for text, ids in fitting:
            wanted, rows = greedy(model, ids, session)
            ours = session.logits(ids, wanted[:-1])
            tokens += len(wanted)
            worst = max(worst, difference(rows, ours))
            kld, same = divergence(rows, ours)
            klds += kld
            agree += same
            answer = session.generate(text, max_tokens=_ANSWER).ids
            if list(answer) != wanted and not _tied(rows, wanted, answer):
                parted.append(text)
    found = {"texts": len(fitting), "tokens": tokens, "difference": worst, **_summed(klds, agree)}
    return {**found, "greedy_agreement": 1 - len(parted) / len(fitting), "parted": parted}


def _ids(session: Seq2Seq, text: str) -> list[int]:
    """The tokens of a text; none where it is over-long."""
    try:
        return session.encode(text)
    except InputError:
        return []


def greedy(model: Any, ids: Sequence[int], session: Seq2Seq) -> tuple[list[int], np.ndarray]:
    """A torch model's likeliest answer, and the logits (tokens, vocabulary) that each of its tokens was chosen by."""
    import torch

    text = torch.tensor([list(ids)])
    read, rows = [session.artifact.description.start_id], list[np.ndarray]()
    hidden = model.get_encoder()(input_ids=text, attention_mask=torch.ones_like(text))
    while len(rows) < _ANSWER:
        logits = model(
            encoder_outputs=hidden,
            attention_mask=torch.ones_like(text),
            decoder_input_ids=torch.tensor([read]),
            use_cache=False,
        ).logits[0, -1]
        rows.append(logits.numpy())
        read.append(session.choose(logits.numpy().copy(), len(rows) - 1))
        if read[-1] in session.artifact.description.stop_ids:
            break
    return read[1:], np.stack(rows)


def _tied(rows: np.ndarray, wanted: Sequence[int], found: Sequence[int]) -> bool:
    """Whether two answers part where two tokens were as likely as each other."""
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
    return at is not None and float(rows[at][wanted[at]] - rows[at][found[at]]) <= _TIE


def difference(wanted: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, relative to 1 + the largest number; infinite where one is none."""
    gap = np.abs(wanted.astype(np.float64) - found).max() / (1 + np.abs(wanted).max())
    return float(gap) if np.isfinite(gap) else float("inf")


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two vectors."""
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))


def divergence(wanted: np.ndarray, found: np.ndarray) -> tuple[list[float], list[bool]]:
    """KL divergence in nats of each row's distribution, and whether its likeliest entry is the same.

    Args:
        wanted, found: logits (rows, entries), or (entries,).
    """
    right, ours = (_log_softmax(np.atleast_2d(one).astype(np.float64)) for one in (wanted, found))
    kld = (np.exp(right) * (right - ours)).sum(-1)
    return [float(value) for value in kld], [bool(value) for value in right.argmax(-1) == ours.argmax(-1)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _summed(klds: list[float], agree: list[bool]) -> dict[str, float]:
    return {"kld_mean": float(np.mean(klds)), "kld_max": float(np.max(klds)), "top1_agreement": float(np.mean(agree))}
