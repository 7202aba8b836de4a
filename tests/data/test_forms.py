"""Forms: each is recognized from all rows, brought into one, and its faults are named."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetune.data.forms import FORMS, find_form, normalize
from edgetune.data.problems import Problems, RowProblem
from edgetune.data.read import Row

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
EACH: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "text": {"text": "Q A"},
}


def form_of(*values: dict[str, Any]) -> tuple[str | None, list[str]]:
    problems = Problems()
    form = find_form([Row(v, f"a.jsonl:{i}") for i, v in enumerate(values, 1)], problems)
    return form, [problem.line() for problem in problems.items]


def normal(values: dict[str, Any], form: str) -> dict[str, Any]:
    return normalize(values, form, Counter())


def problem(values: dict[str, Any], form: str) -> str:
    with pytest.raises(RowProblem) as error:
        normal(values, form)
    assert error.value.fix
    return error.value.what


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_told_and_normalized(form: str) -> None:
    assert form_of(EACH[form], EACH[form]) == (form, [])
    expected = {"text": "Q A"} if form == "text" else {"messages": [USER, ANSWER]}
    assert normal(EACH[form], form) == expected


def test_null_columns_are_absent() -> None:
    row = {**dict.fromkeys(("text", "prompt", "completion")), **EACH["messages"]}
    assert form_of(row) == ("messages", [])


def test_mixed_forms_name_rows_of_each() -> None:
    form, found = form_of(EACH["messages"], *[EACH["alpaca"]] * 5)
    assert form is None
    assert "alpaca in a.jsonl:2, a.jsonl:3, a.jsonl:4 and 2 more; messages in a.jsonl:1" in found[0]


def test_rows_that_fit_two_forms_need_a_word() -> None:
    form, found = form_of({**EACH["messages"], "text": "…"}, {**EACH["messages"], "text": "…"})
    assert form is None
    assert "fit several forms: messages, text" in found[0]
    assert "data.form" in found[0]


def test_one_row_of_a_single_form_decides() -> None:
    assert form_of({**EACH["messages"], "text": "…"}, EACH["messages"])[0] == "messages"


def test_no_known_form() -> None:
    form, found = form_of({"question": "Q", "answer": "A"}, {})
    assert form is None
    assert "a.jsonl:1: the row is of no known form (its keys: 'question', 'answer')" in found[0]
    assert "its keys: none" in found[1]


def test_a_row_without_the_keys_of_its_form_is_named() -> None:
    assert form_of(EACH["alpaca"], {"instruction": "Q"})[0] == "alpaca"
    assert problem({"instruction": "Q"}, "alpaca") == "`output` is missing (the row's keys: 'instruction')"


def test_alpaca_input_follows_after_a_blank_line() -> None:
    row = normal({"instruction": "Sum up.", "input": "A text.", "output": "Text."}, "alpaca")
    assert row["messages"][0]["content"] == "Sum up.\n\nA text."
    assert normal({"instruction": "Q", "output": "A"}, "alpaca")["messages"][0]["content"] == "Q"


def test_sharegpt_roles() -> None:
    froms = ["system", "human", "gpt", "user", "chatgpt", "tool", "assistant", "observation", "model"]
    row = normal({"conversations": [{"from": f, "value": "x"} for f in froms]}, "sharegpt")
    assert [turn["role"] for turn in row["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]


def test_extra_keys_are_counted() -> None:
    extra: Counter[str] = Counter()
    normalize({"messages": [{**USER, "name": "Bo"}, ANSWER], "id": 7, "none": None}, "messages", extra)
    assert extra == {"id": 1, "messages[].name": 1}


def test_content_is_kept_as_it_is() -> None:
    assert normal({"prompt": " Q\n", "completion": "\n A "}, "prompt-completion")["messages"][1]["content"] == "\n A "


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "`messages` is a string, not a list"),
        ([], "the row has no assistant turn"),
        ([USER], "the row has no assistant turn"),
        (["hello"], "turn 1 is a string, not an object"),
        ([{"role": "user"}], "turn 1 has no `content`"),
        ([{"content": "Q"}], "turn 1 has no `role`"),
        ([{"role": "bot", "content": "Q"}], "turn 1 has the unknown role 'bot'"),
        ([{"role": 3, "content": "Q"}], "turn 1 has the unknown role a number"),
        ([{"role": ["user"], "content": "Q"}], "turn 1 has the unknown role a list"),
        ([{"role": "user", "content": [{"type": "text"}]}], "turn 1: `content` is a list, not a string"),
        ([USER, {"role": "assistant", "content": None}], "turn 2: `content` is null, not a string"),
        ([USER, {"role": "assistant", "content": ""}], "the answer is empty"),
        ([USER, {"role": "assistant", "content": " \n"}, USER, ANSWER], "the answer is empty (turn 2)"),
        ([{"role": "user", "content": " "}, ANSWER], "the user turn is empty"),
        ([USER, {"role": "system", "content": "S"}, ANSWER], "turn 2 is a system turn"),
        ([ANSWER, USER, ANSWER], "turn 1 is an answer with no user turn before it"),
        ([USER, ANSWER, USER], "the last turn is the user's and has no answer"),
        (
            [USER, {"role": "assistant", "content": "x\ud83d"}],
            "turn 2 holds half a character (\\ud83d at position 2)",
        ),
    ],
)
def test_faults_of_a_conversation(messages: Any, expected: str) -> None:
    assert expected in problem({"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("values", "form", "expected"),
    [
        ({"prompt": "Q", "completion": ""}, "prompt-completion", "the answer is empty"),
        ({"prompt": ["Q"], "completion": "A"}, "prompt-completion", "`prompt` is a list, not a string"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "alpaca", "`input` is a number, not a string"),
        ({"text": ""}, "text", "the text is empty"),
        ({"text": 1.5}, "text", "`text` is a number, not a string"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "sharegpt", "unknown role 'bard'"),
        ({"conversations": [USER, ANSWER]}, "sharegpt", "turn 1 has no `from`"),
    ],
)
def test_faults_of_other_forms(values: dict[str, Any], form: str, expected: str) -> None:
    assert expected in problem(values, form)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.dictionaries(st.sampled_from([k for row in EACH.values() for k in row]), JSON),
    form=st.sampled_from(FORMS),
)
def test_any_row_is_normalized_or_named(values: dict[str, Any], form: str) -> None:
    form_of(values)
    try:
        row = normal(values, form)
    except RowProblem as found:
        assert found.what and found.fix
    else:
        assert row.keys() == {"text"} or row["messages"][-1]["role"] == "assistant"
