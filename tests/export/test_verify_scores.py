"""The statistics of the gate against a plain computation in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import GateError, InputError
from edgetune.export.scores import WORST, Scores, bucket
from edgetune.export.tokens import CLASSES, Tokens


def _scored(seed: int, lengths: list[int], vocabulary: int, piece: int) -> tuple[Scores, list[dict[str, Any]]]:
    """Random rows, compared `piece` positions at a time; and what is true of each compared position."""
    import torch

    draw = np.random.default_rng(seed)
    scores, expected = Scores(), []
    for row, length in enumerate(lengths):
        ids = draw.integers(0, vocabulary, length).tolist()
        learned = (draw.random(length) < 0.7).tolist()
        wanted = draw.normal(0, 3, (length, vocabulary)).astype(np.float32)
        found = (wanted + draw.normal(0, draw.random(), wanted.shape)).astype(np.float32)
        for start in range(0, length, piece):
            here = slice(start, start + piece)
            scores.add(torch.tensor(wanted[here]), torch.tensor(found[here]), row, start, ids, learned)
        for i in range(length - 1):
            if learned[i + 1]:
                p, q = (x[i].astype(np.float64) for x in (wanted, found))
                p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p, q))
                expected.append({
                    "kld": float((p * np.log(p / q)).sum()), "p": p[ids[i + 1]], "q": q[ids[i + 1]], "at": (row, i + 1),
                    "agree": p.argmax() == q.argmax(), "pair": (ids[i], ids[i + 1]),
                })  # fmt: skip
    return scores, expected


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    vocabulary=st.integers(2, 40),
    piece=st.integers(1, 160),
)
def test_every_number_is_that_of_a_plain_computation(
    seed: int, lengths: list[int], vocabulary: int, piece: int
) -> None:
    scores, expected = _scored(seed, lengths, vocabulary, piece)
    assert len(scores) == len(expected)
    if not expected:
        return
    found = scores.summary()
    kld, p, q = (np.array([place[name] for place in expected]) for name in ("kld", "p", "q"))
    near = {"rel": 1e-4, "abs": 1e-6}
    assert scores.mean() == pytest.approx(kld.mean(), **near) and found["kld_mean"] == pytest.approx(kld.mean(), **near)
    for name, share in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("p99_9", 99.9), ("max", 100)):
        assert found[f"kld_{name}"] == pytest.approx(np.percentile(kld, share), **near), name
    assert found["delta_p_rms"] == pytest.approx(math.sqrt(((q - p) ** 2).mean()), **near)
    assert found["top1_agreement"] == pytest.approx(np.mean([place["agree"] for place in expected]))
    perplexity = found["perplexity"]
    assert perplexity["merged"] == pytest.approx(math.exp(-np.log(p).mean()), rel=1e-4)
    assert perplexity["artifact"] == pytest.approx(math.exp(-np.log(q).mean()), rel=1e-4)
    assert perplexity["ratio"] == pytest.approx(perplexity["artifact"] / perplexity["merged"], rel=1e-6)
    differences = np.log(p) - np.log(q)
    if len(kld) > 1:
        error = perplexity["ratio"] * differences.std(ddof=1) / math.sqrt(len(kld))
        assert perplexity["ratio_se"] == pytest.approx(error, rel=1e-3, abs=1e-7)
    else:
        assert perplexity["ratio_se"] is None
    worst = scores.worst()
    assert [place.kld for place in worst] == pytest.approx(sorted(kld, reverse=True)[:WORST], **near)
    true = {place["at"]: place for place in expected}
    for place in worst:
        here = true[place.row, place.position]
        assert place.kld == pytest.approx(here["kld"], **near) and place.next == pytest.approx(
            (here["p"], here["q"]), **near
        )
        assert (place.wanted[0][0] == place.found[0][0]) == here["agree"]
        assert [share for _, share in place.wanted] == sorted((share for _, share in place.wanted), reverse=True)
    for groups in (scores.by_position(), scores.by_class(lambda a, b: ("even", "odd")[(a + b) % 2], ("odd", "even"))):
        assert sum(part["tokens"] for part in groups.values()) == len(kld)
        mean = sum(part["tokens"] * part["kld_mean"] for part in groups.values()) / len(kld)
        assert mean == pytest.approx(kld.mean(), **near)
    first = [place["kld"] for place in expected if place["at"][1] < 64]
    if first:
        assert scores.by_position()["0-63"]["kld_mean"] == pytest.approx(np.mean(first), **near)
    odd = [place["kld"] for place in expected if sum(place["pair"]) % 2]
    found_odd = scores.by_class(lambda a, b: ("even", "odd")[(a + b) % 2], ("odd", "even")).get("odd", {"tokens": 0})
    assert found_odd["tokens"] == len(odd)


def test_the_standard_error_is_the_spread_over_repeated_draws() -> None:
    """Drawn anew many times, the ratio scatters as its standard error says."""
    draw = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(400):
        scores = Scores()
        wanted = draw.normal(-2, 1, 200)
        scores._kld.extend([0.0] * 200)
        scores._agree.extend([1] * 200)
        scores._wanted.extend(wanted)
        scores._found.extend(wanted - draw.normal(0.05, 0.3, 200))
        found = scores.summary()["perplexity"]
        ratios.append(found["ratio"])
        errors.append(found["ratio_se"])
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.12)


@given(position=st.integers(0, 10**6))
def test_buckets_double_and_leave_no_gap(position: int) -> None:
    low, high = bucket(position)
    assert low <= position <= high and (high == 63 if low == 0 else high + 1 == 2 * low)


def test_logits_that_are_no_numbers_are_refused_and_a_token_of_no_probability_is_not() -> None:
    import torch

    good = torch.tensor([[1.0, 2.0, float("-inf")], [0.5, 0.0, float("-inf")]])
    scores = Scores()
    scores.add(good, good, 0, 0, [0, 1], [False, True])
    assert scores.summary()["kld_mean"] == 0
    folders = Path("reference"), Path("judged")
    for wanted, found, error in (
        (good * float("nan"), good, InputError),
        (good, good * float("nan"), GateError),
        # the artifact rules out what the model holds possible
        (good[:, :2], torch.tensor([[0.0, float("-inf")]] * 2), GateError),
    ):
        with pytest.raises(error, match="not finite numbers, first in row 3") as caught:
            Scores(folders).add(wanted, found, 2, 0, [0, 0], [False, True])
        assert caught.value.where == ("reference" if error is InputError else "judged")


def test_tokens_have_classes_and_texts(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = Tokens(tokenizer, [2])
    ids = tokenizer("The river, naïve\n\n12345 東<|im_end|>")["input_ids"]
    kinds = {tokens.text(b): tokens.kind(a, b) for a, b in itertools.pairwise(ids)}
    assert kinds[","] == "punctuation" and kinds["<|im_end|>"] == "special"
    assert {kind for text, kind in kinds.items() if text.isdigit()} == {"digits"}
    assert {kind for text, kind in kinds.items() if text and text.isspace()} == {"whitespace"}
    assert {kind for text, kind in kinds.items() if "\N{REPLACEMENT CHARACTER}" in text} == {"part of a character"}
    assert kinds[" rive"] == "word start" and kinds["r"] == "word continuation" and kinds["naïve"] == "word start"
    assert set(kinds.values()) <= set(CLASSES)
    assert tokens.join(ids).startswith("The river, naïve")


def test_a_space_that_the_tokenizer_keeps_to_itself_is_told() -> None:
    class Spiece:
        all_special_ids, added_tokens_decoder = [0], {}
        _pieces = ("<s>", "▁Paris", "ian", "▁", "<0x0A>")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self._pieces[token]

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(self._pieces[i].replace("▁", " ").replace("<0x0A>", "\n") for i in ids).removeprefix(" ")

    tokens = Tokens(Spiece())
    assert [tokens.text(i) for i in range(1, 5)] == [" Paris", "ian", " ", "\n"]
    pairs = [(0, 1), (1, 2), (2, 3), (2, 4), (1, 0)]
    kinds = [tokens.kind(*pair) for pair in pairs]
    assert kinds == ["word start", "word continuation", "whitespace", "whitespace", "special"]
