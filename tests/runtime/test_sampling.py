"""The sampler against a plain implementation in float64, on any logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.sampling import Sampler, keep, likeliest, log_softmax

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


def reference(
    logits: list[float], options: GenerationOptions, prompt: list[int], answer: list[int]
) -> tuple[list[float], list[float]]:
    """Logits after penalties and bias, and the probabilities that are drawn from (temperature over 0), in the
    documented order, a token at a time."""
    shaped = list(logits)
    for token in {*prompt, *answer}:
        penalty = options.repetition_penalty
        shaped[token] = shaped[token] / penalty if shaped[token] > 0 else shaped[token] * penalty
    for token in set(answer):
        shaped[token] -= options.presence_penalty + options.frequency_penalty * answer.count(token)
    for token, bias in options.logit_bias.items():
        shaped[token] += bias
    if options.temperature == 0:
        return shaped, []
    order = sorted(range(len(shaped)), key=lambda token: (-shaped[token], token))
    weights = {token: np.exp((shaped[token] - shaped[order[0]]) / options.temperature) for token in order}
    if options.top_k:
        order = order[: options.top_k]
    total, nucleus, reached = sum(weights[token] for token in order), [], 0.0
    for token in order:
        nucleus.append(token)
        reached += weights[token]
        if options.top_p < 1 and reached >= options.top_p * total * (1 - 1e-12):
            break
    kept = [token for token in nucleus if weights[token] >= options.min_p * weights[order[0]]]
    whole = sum(weights[token] for token in kept)
    return shaped, [weights[token] / whole if token in kept else 0.0 for token in range(len(shaped))]


def test_defaults_are_greedy() -> None:
    assert GenerationOptions().greedy
    for more in ({"temperature": 1.0}, {"logprobs": 0}, {"logit_bias": {1: 2}}, {"presence_penalty": 0.1}):
        assert not GenerationOptions(**more).greedy  # type: ignore[arg-type]


@given(
    LOGITS,
    st.data(),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_and_bias(logits: list[float], data: Any, repetition: float, presence: float, often: float) -> None:
    token = st.integers(0, len(logits) - 1)
    prompt, answer = data.draw(st.lists(token)), data.draw(st.lists(token))
    options = GenerationOptions(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=often,
        logit_bias=data.draw(st.dictionaries(token, st.floats(-100, 100))),
    )
    sampler = Sampler(options, prompt)
    for token in answer:
        sampler.took(token)
    wanted, _ = reference(logits, options, prompt, answer)
    np.testing.assert_allclose(sampler.scores(np.array(logits, np.float32)), wanted, rtol=1e-5, atol=1e-4)


@given(
    st.lists(st.integers(-24, 24), min_size=2, max_size=40),  # quarters: equal logits, and none nearly so
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 45),
    st.sampled_from([1.0, 0.97, 0.7, 0.31, 1e-6]),
    st.sampled_from([0.0, 0.013, 0.2, 0.77]),
)
@example([4, 4, 4, 4], 1.0, 2, 1.0, 0.0)
def test_what_is_kept(quarters: list[int], temperature: float, k: int, p: float, least: float) -> None:
    logits = [quarter / 4 for quarter in quarters]
    options = GenerationOptions(temperature=temperature, top_k=k, top_p=p, min_p=least)
    _, wanted = reference(logits, options, [], [])
    found = keep(np.array(logits, np.float32), options)
    assert sorted(found.tolist()) == [token for token, share in enumerate(wanted) if share > 0]


def test_top_p_over_many_tokens() -> None:
    """More than are sorted at first."""
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for p in (0.01, 0.5, 0.99):
        options = GenerationOptions(temperature=1.5, top_k=0, top_p=p)
        _, wanted = reference(logits.tolist(), options, [], [])
        assert set(keep(logits, options).tolist()) == set(np.flatnonzero(wanted).tolist())


@pytest.mark.parametrize("more", [{"top_k": 0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.8}, {"top_k": 0, "min_p": 0.05}])
def test_draws_have_the_probabilities(more: Any) -> None:
    logits = np.array([0.0, 1.0, 2.0, 0.5, -1.0, 2.5, 1.5, -3.0], np.float32)
    options = GenerationOptions(temperature=0.8, seed=5, **more)
    sampler, drawn = Sampler(options, []), 20_000
    counts = np.bincount([int(np.argmax(sampler.scores(logits.copy()))) for _ in range(drawn)], minlength=8)
    _, wanted = reference(logits.tolist(), options, [], [])
    shares = np.array(wanted)
    assert np.all(counts[shares == 0] == 0)
    error = np.sqrt(shares * (1 - shares) / drawn)
    assert np.all(np.abs(counts / drawn - shares) <= 4.5 * error + 1e-12)


def test_draws_under_a_mask_have_the_probabilities() -> None:
    """A constraint takes the largest score that it allows: of the kept tokens by probability, else the likeliest."""
    logits = np.array([0.0, 1.0, 2.0, 0.5, -1.0, 2.5, 1.5, -3.0], np.float32)
    sampler = Sampler(GenerationOptions(temperature=1.0, top_k=4, seed=1), [])
    allowed = np.array([0, 1, 2, 3])  # of the kept 1, 2, 5, 6
    drawn = np.array([allowed[np.argmax(sampler.scores(logits.copy())[allowed])] for _ in range(20_000)])
    assert set(drawn.tolist()) == {1, 2}
    share = np.exp(1) / (np.exp(1) + np.exp(2))
    assert abs((drawn == 1).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / 20_000)
    none_kept = np.array([0, 3, 4, 7])
    for _ in range(50):
        scores = sampler.scores(logits.copy())
        assert none_kept[np.argsort(-scores[none_kept])].tolist() == [3, 0, 4, 7]


@given(LOGITS, st.floats(1e-300, 2), st.integers(0, 2**31 - 1), st.integers(0, 50))
@example([30.0, -30.0, 29.0], 1e-300, 0, 0)
@example([30.0, -30.0, 29.0], 1e-300, 0, 2)
def test_scores_are_numbers_and_repeat(logits: list[float], temperature: float, seed: int, k: int) -> None:
    options = GenerationOptions(temperature=temperature, seed=seed, top_k=k)
    one, two = (Sampler(options, []).scores(np.array(logits, np.float32)) for _ in range(2))
    assert one.tolist() == two.tolist() and (one > -1e32).all()  # a constraint's lowest float32 stays the lowest
    assert int(np.argmax(one)) in keep(np.array(logits, np.float32), options)


@given(LOGITS)
def test_log_softmax(logits: list[float]) -> None:
    exact = np.array(logits, np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    found = log_softmax(np.array(logits, np.float32))
    np.testing.assert_allclose(found, exact, atol=2e-5)
    best = sorted(range(len(logits)), key=lambda token: (-found[token], token))
    assert likeliest(found, 5) == best[:5] and likeliest(found, 0) == []
