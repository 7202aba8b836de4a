"""Guessing ahead: the tokens are those of plain steps, and wrong guesses cost little."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401
from edgetune.errors import InputError
from edgetune.runtime import load
from edgetune.runtime.artifact import Artifact, open_artifact
from edgetune.runtime.hardware import cpu
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.profile import Profile, Settings, artifact_digest, engine, profile_path, save
from edgetune.runtime.session import Session
from edgetune.runtime.speculation import DEFAULT_COSTS, MOST_ROWS, Counts, Lookup, Policy, guessing


class Model:
    """A model whose next token is a function of all tokens before it. Counts what reading costs."""

    def __init__(self, prompt: Sequence[int], after: Callable[[list[int]], int]) -> None:
        self.ids, self._after = list(prompt), after
        self.costs = 0.0
        self._policy = Policy(DEFAULT_COSTS)

    def next(self) -> int:
        return self._after(self.ids)

    def read(self, tokens: list[int]) -> list[int]:
        assert 1 <= len(tokens) <= MOST_ROWS
        self.costs += self._policy.cost(len(tokens))
        found = []
        for token in tokens:
            self.ids.append(token)
            found.append(self.next())
        return found

    def rewind(self, length: int) -> None:
        assert length < len(self.ids)
        del self.ids[length:]


def answer(model: Model, limit: int, policy: Policy) -> tuple[list[int], Counts]:
    counts, made = Counts(), list[int]()
    for step in guessing(model.read, model.rewind, list(model.ids), model.next(), policy, limit, counts):
        made += step
        if len(made) >= limit:
            return made[:limit], counts
    raise AssertionError("unreachable")


def plain(prompt: Sequence[int], after: Callable[[list[int]], int], limit: int) -> list[int]:
    ids = list(prompt)
    for _ in range(limit):
        ids.append(after(ids))
    return ids[len(prompt) :]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.integers(1, 60),
    st.booleans(),
    st.integers(1, 5),
)
def test_the_tokens_are_those_of_plain_steps(prompt: list[int], limit: int, always: bool, memory: int):
    def after(ids: list[int]) -> int:
        return hash(tuple(ids[-memory:])) % 5

    found, counts = answer(Model(prompt, after), limit, Policy(DEFAULT_COSTS, always=always))
    assert found == plain(prompt, after, limit)
    assert 0 <= counts.accepted <= counts.drafted <= counts.guesses * (MOST_ROWS - 1)


def test_copying_takes_few_steps():
    draw = random.Random(1)
    text = [draw.randrange(1000) for _ in range(200)]
    model = Model([*text, -1, *text[:3]], lambda ids: text[len(ids) - len(text) - 1])
    found, counts = answer(model, 190, Policy(DEFAULT_COSTS))
    assert found == text[3:193] and counts.accepted > 0.9 * counts.drafted
    assert model.costs < 190 / 2.5


@pytest.mark.parametrize("costs", [DEFAULT_COSTS, {1: 1.0, 2: 1.24, 4: 1.53, 8: 1.66, 16: 2.54}])
@pytest.mark.parametrize("limit", [4, 8, 16, 32, 64, 400])
@pytest.mark.parametrize("seed", range(5))
def test_no_answer_is_below_097_of_plain_decoding(seed: int, limit: int, costs: dict[int, float]):
    """Every guess is wrong, though there is always one."""
    draw, policy, counts = random.Random(seed), Policy(costs), Counts()
    spent = []

    def read(tokens: list[int]) -> list[int]:
        spent.append(policy.cost(len(tokens)))
        return [*((token + 1) % 6 for token in tokens[1:]), draw.randrange(6)]

    made = 0
    for step in guessing(read, lambda _: None, [draw.randrange(6) for _ in range(300)], 0, policy, limit, counts):
        made += len(step)
        if made >= limit:
            break
    assert sum(spent) <= (limit - 1) / 0.97 and (counts.guesses > 0 or limit < 16)


def test_it_stops_when_the_text_is_no_longer_copied_and_begins_again():
    draw = random.Random(3)
    text = [draw.randrange(50) for _ in range(150)]

    def after(ids: list[int]) -> int:
        made = len(ids) - len(text)
        if made < 100 or made >= 400:
            return text[made % len(text)]
        return hash((made, 7)) % 50  # open writing between

    model, policy = Model(text, after), Policy(DEFAULT_COSTS)
    widths: list[tuple[int, int]] = []
    counts, made = Counts(), 0
    for step in guessing(model.read, model.rewind, text, after(text), policy, 500, counts):
        made += len(step)
        widths.append((made, len(step)))
        if made >= 490:
            break
    taken = {
        part: sum(1 for at, _ in widths if low <= at < high)
        for part, low, high in (("copied", 20, 100), ("open", 120, 400), ("again", 420, 490))
    }
    assert taken["copied"] < 80 / 3 and taken["again"] < 70 / 2 and taken["open"] > 250


def test_guesses_follow_what_stood_last_and_repeat_themselves():
    lookup = Lookup([1, 2, 3, 9, 1, 2, 3, 4, 1, 2])
    assert lookup.guess(3) == ([3, 4, 1], 2)
    lookup.feed(3)
    assert lookup.guess(12) == ([4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3], 3)
    assert Lookup([5, 6, 7]).guess(4) == ([], 0) and Lookup().guess(4) == ([], 0)


def test_the_place_with_the_longest_common_past_counts():
    """Not the last one, where four tokens are the same; of equals the last."""
    first, last = [1, 2, 3, 4, 5, 6, 70], [9, 3, 4, 5, 6, 80]
    assert Lookup([*first, *last, 8, 1, 2, 3, 4, 5, 6]).guess(2) == ([70, 9], 4)
    assert Lookup([*first, *last, 8, 7, 3, 4, 5, 6]).guess(1) == ([80], 4)
    assert Lookup([7, 7, 7, 7]).guess(3) == ([7, 7, 7], 3)


def test_where_rows_cost_as_much_as_steps_nothing_is_guessed():
    policy = Policy({1: 1.0, 16: 16.0})
    assert policy.width(4, 15) == 0 and Policy({1: 1.0, 16: 1.0}).width(4, 15) > 4
    assert Policy({1: 1.0, 16: 16.0}, always=True).width(4, 15) == 15


def test_the_first_answers_tokens_come_one_by_one_where_nothing_repeats():
    found, counts = answer(Model([1], lambda ids: len(ids)), 20, Policy(DEFAULT_COSTS))
    assert found == list(range(1, 21)) and counts == Counts()


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Session:  # noqa: F811
    return load(tiny_artifact)


def profile_of(artifact: Artifact, settings: Settings) -> Profile:
    return Profile(artifact_digest(artifact), artifact.name, cpu(), engine(), settings, {})


PROMPTS = ["one two three one two three one two", "The capital of France is Paris.", "a", "12345 67890 12345 678"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("limit", [1, 2, 40])
def test_a_session_gives_the_same_tokens(session: Session, prompt: str, limit: int):
    plain = session.generate(prompt, GenerationOptions(max_tokens=limit, exact=True))
    found = session.generate(prompt, GenerationOptions(max_tokens=limit, speculation="on"))
    assert found.ids == plain.ids and found.text == plain.text and found.finish_reason == plain.finish_reason
    assert plain.drafted_tokens == 0 and found.accepted_tokens <= found.drafted_tokens
    again = session.generate(prompt + found.text, GenerationOptions(max_tokens=limit, exact=True))
    fresh = session.generate(prompt + found.text, GenerationOptions(max_tokens=limit, exact=True, reuse="off"))
    assert again.ids == fresh.ids  # what wrong guesses left behind is cut off


@pytest.fixture
def oracle(session: Session, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The answer to the first prompt. What is guessed of it is right, but for every seventh token."""
    plain = session.generate(PROMPTS[0], GenerationOptions(max_tokens=100, exact=True)).ids
    start = len(session.encode(PROMPTS[0]))

    def guess(lookup: Lookup, most: int) -> tuple[list[int], int]:
        place = len(lookup._ids) - start
        found = [token if at % 7 else token ^ 1 for at, token in enumerate(plain)][place : place + min(most, 5)]
        return found, 4

    monkeypatch.setattr(Lookup, "guess", guess)
    return plain


def test_what_is_right_of_a_guess_is_kept(session: Session, oracle: tuple[int, ...]):
    found = session.generate(PROMPTS[0], GenerationOptions(max_tokens=100, speculation="on"))
    assert found.ids == oracle
    assert found.drafted_tokens - found.accepted_tokens >= 100 / 7 and found.accepted_tokens > 50
    assert f"{found.accepted_tokens} of {found.drafted_tokens} guessed" in found.describe()


def test_auto_guesses_only_where_costs_were_measured(tiny_artifact: Path, oracle: tuple[int, ...]):  # noqa: F811
    options = GenerationOptions(max_tokens=100)
    artifact = open_artifact(tiny_artifact)
    assert load(tiny_artifact).generate(PROMPTS[0], options).drafted_tokens == 0
    for costs, guesses in (({1: 1.0, 16: 1.5}, True), ({1: 1.0, 16: 16.0}, False)):
        save(profile_of(artifact, Settings(row_costs=costs)), profile_path(artifact))
        found = load(tiny_artifact).generate(PROMPTS[0], options)
        assert (found.drafted_tokens > 0) == guesses and found.ids == oracle
    assert load(tiny_artifact, use_profile=False).generate(PROMPTS[0], options).drafted_tokens == 0


def test_a_stop_string_among_guessed_tokens_ends_it(session: Session, oracle: tuple[int, ...]):
    text = session.decode(oracle)
    stop = text[len(text) // 2 :][:3]
    options = GenerationOptions(max_tokens=100, stop=(stop,))
    found = session.generate(PROMPTS[0], replace(options, speculation="on"))
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop" and found.accepted_tokens > 0


@pytest.mark.parametrize(
    "shape",
    [{"temperature": 0.5, "seed": 1}, {"repetition_penalty": 1.2}, {"logprobs": 0}, {"regex": "[a-z ]+"}],
)
def test_what_shapes_probabilities_is_not_guessed(session: Session, shape: dict[str, Any]):
    assert session.generate(PROMPTS[0], GenerationOptions(max_tokens=30, speculation="on", **shape)).drafted_tokens == 0


def test_a_graph_that_tells_only_the_last_token_is_not_guessed(tiny_artifact: Path, tmp_path: Path):  # noqa: F811
    pruned = copy_of(tiny_artifact, tmp_path)
    seal(pruned, options={"target": {"options": {"prune_lm_head": True}}})
    found = load(pruned).generate(PROMPTS[0], GenerationOptions(max_tokens=30, speculation="on"))
    assert found.drafted_tokens == 0 and found.completion_tokens > 1


@pytest.mark.parametrize(("wrong", "where"), [({"speculation": "yes"}, "speculation"), ({"exact": 1}, "exact")])
def test_bad_options(wrong: dict[str, Any], where: str):
    with pytest.raises(InputError) as caught:
        GenerationOptions(**wrong)
    assert caught.value.where == where


def test_exact_overrides_what_may_round():
    options = GenerationOptions(exact=True, speculation="on", reuse="fast")
    assert (options.speculation, options.reuse) == ("off", "exact")
    assert GenerationOptions(exact=True, reuse="off").reuse == "off"
