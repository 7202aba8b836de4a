"""Rows to tokens: what is learned is proved, whatever the template does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import chat_templates as t
import pytest
from chat_templates import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SHARED
from edgetune.data import render
from edgetune.data.problems import RowProblem
from edgetune.data.render import Renderer
from edgetune.errors import InputError

PHI3 = SHARED / "models" / "stories15M-phi3"
WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def phi3() -> Any:
    if not PHI3.is_dir():
        pytest.skip("needs ../shared/models/stories15M-phi3 beside the checkout")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PHI3)


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def learned(tokenizer: Any, row: dict[str, Any], train_on: Any = "assistant") -> list[str]:
    """The learned runs, as text."""
    renderer = Renderer(tokenizer)
    return [text for text, is_learned in renderer.pieces(renderer.encode(row, train_on)) if is_learned]


def test_the_answer_and_its_stop_token_are_learned(tiny: Any) -> None:
    assert learned(tiny, chat("What is 2+2?", "It is 4.")) == ["It is 4.<|im_end|>"]


def test_the_row_ends_with_its_stop_token_and_begins_with_the_runtimes_prompt(tiny: Any) -> None:
    row = chat("What is 2+2?", "It is 4.")
    encoded = Renderer(tiny).encode(row, "assistant")
    prompt = tiny.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.learned == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
    assert encoded.ids[-1] == tiny.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("assistant", ["A1<|im_end|>", "A2<|im_end|>"]), ("last", ["A2<|im_end|>"])],
)
def test_train_on_chooses_the_turns(tiny: Any, train_on: str, expected: list[str]) -> None:
    assert learned(tiny, chat("Q1", "A1", "Q2", "A2", system="Be brief."), train_on) == expected


def test_train_on_all_learns_every_token_but_the_first(tiny: Any) -> None:
    encoded = Renderer(tiny).encode(chat("Q1", "A1", "Q2", "A2"), "all")
    assert encoded.learned == [False] + [True] * (len(encoded.ids) - 1)


def test_an_answer_that_also_stands_in_the_prompt_is_learned_where_it_is_the_answer(tiny: Any) -> None:
    assert learned(tiny, chat("assistant\nyes", "yes", "yes", "yes", "yes", "yes")) == ["yes<|im_end|>"] * 3
    encoded = Renderer(tiny).encode(chat("yes", "yes"), "assistant")
    assert encoded.learned.index(True) > encoded.ids.index(encoded.ids[encoded.learned.index(True)])


def test_the_default_system_prompt_is_only_read(tiny: Any) -> None:
    renderer = Renderer(tiny)
    pieces = renderer.pieces(renderer.encode(chat("Q", "A"), "assistant"))
    assert pieces[0][0].startswith("<|im_start|>system\nYou help.<|im_end|>")
    assert not pieces[0][1]


def test_two_questions_in_a_row_are_up_to_the_template(tiny: Any) -> None:
    messages = [
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two."},
        {"role": "assistant", "content": "Three."},
    ]
    assert learned(tiny, {"messages": messages}) == ["Three.<|im_end|>"]
    with pytest.raises(RowProblem, match="roles must alternate"):
        learned(with_template(tiny, t.STRICT), {"messages": messages})


def test_a_template_that_strips_and_adds_spaces(tiny: Any) -> None:
    strict = with_template(tiny, t.STRICT)
    assert learned(strict, chat("Q", "  A \n", "R", "B")) == [" A <|im_end|>", " B <|im_end|>"]
    with pytest.raises(RowProblem, match="refuses the row: roles must alternate"):
        learned(strict, chat("Q", "A", system="S"))


def test_a_template_that_ends_the_row_with_another_token(tiny: Any) -> None:
    phi = with_template(tiny, t.PHI)
    assert learned(phi, chat("Q", "A", "R", "B")) == ["A<|im_end|>", "B<|im_end|>"]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_turn_that_the_template_passes_over_is_named(tiny: Any, role: str) -> None:
    row = chat("Q and S", "A")
    row["messages"].insert(0 if role == "system" else 1, {"role": role, "content": "S"})
    with pytest.raises(RowProblem, match=f"leaves out or changes the {role} turn"):
        learned(with_template(tiny, t.PHI), row)


def test_thinking(tiny: Any) -> None:
    thinking = with_template(tiny, t.THINKING)
    assert learned(thinking, chat("Q", "A")) == ["<think>\n\n</think>\n\nA<|im_end|>"]
    thought = "<think>\nhm\n</think>\n\nA"
    assert learned(thinking, chat("Q", thought)) == [f"{thought}<|im_end|>"]
    with pytest.raises(RowProblem, match="turn 2: the template changes the answer") as problem:
        learned(thinking, chat("Q", thought, "R", "B"))
    assert "train_on=last" in problem.value.fix
    assert learned(thinking, chat("Q", thought, "R", "B"), "last") == ["<think>\n\n</think>\n\nB<|im_end|>"]


def test_an_earlier_answer_without_the_opening_is_counted(tiny: Any) -> None:
    encoded = Renderer(with_template(tiny, t.THINKING)).encode(chat("Q", "A", "R", "B"), "assistant")
    assert encoded.notes == {render.NO_OPENING}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (t.NO_END, "the model would never stop"),
        (t.OTHER_ASK, "asks for an answer with"),
        ("{{ 'Hello' }}", "leaves the answer out"),
        ("{{ raise_exception('no') }}", "fails on a question and its answer"),
        ("{{ messages[7].content.x }}", "fails on a question and its answer"),
        ("{% for m in %}", "fails on a question and its answer"),
        (None, "the model has no chat template"),
    ],
)
def test_a_template_that_no_row_can_be_learned_with(tiny: Any, template: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        learned(with_template(tiny, template), chat("Q", "A"))
    assert "model.chat_template=FILE.jinja" in str(error.value)


def test_a_template_that_moves_the_system_turn(tiny: Any) -> None:
    moving = with_template(tiny, t.SYSTEM_LAST)
    with pytest.raises(RowProblem, match="turn 3: the template asks for the answer with") as problem:
        learned(moving, chat("Q", "A", "R", "B", system="S"))
    assert "train_on=last" in problem.value.fix
    assert learned(moving, chat("Q", "A", "R", "B", system="S"), "last") == ["B<|im_end|>"]


def test_two_bos_tokens_are_named(tiny: Any) -> None:
    with pytest.raises(RowProblem, match=r"begins with <\|im_start\|> twice"):
        learned(with_template(tiny, t.TWO_BOS), chat("Q", "A"))


@pytest.mark.parametrize("place", [0, 1])
def test_special_tokens_as_text_are_named(tiny: Any, place: int) -> None:
    turns = ["Q", "A"]
    turns[place] = "so <|im_end|>\n<|im_start|>assistant\nyes"
    with pytest.raises(RowProblem, match=rf"turn {place + 1} holds <\|im_end\|>"):
        learned(tiny, chat(*turns))


def test_an_answer_that_merges_with_the_prompt_is_named(tiny: Any) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # a tokenizer that knows two line breaks as one token, as most real ones do
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĊĊ"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>")
    merging.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    merging.chat_template = tiny.chat_template
    assert learned(merging, chat("Q", "A\n\nB\n")) == ["A\n\nB\n<|im_end|>"]
    with pytest.raises(RowProblem, match=r"turn 2: .* merge with the prompt into one token \('\\n\\n'\)"):
        learned(merging, chat("Q", "\nA"))


def test_characters_that_the_tokenizer_does_not_have_are_named() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: i for i, letter in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *"adehilorstu \n"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    letters = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>", unk_token="<unk>"
    )
    letters.chat_template = t.NO_END.replace("m['content'] + '\n'", "m['content'] + '<|im_end|>\n'")
    assert learned(letters, chat("hello", "hello")) == ["hello<|im_end|>"]
    with pytest.raises(RowProblem, match=r"decode to 'hell<unk><\|im_end\|>' where the row has 'hellö"):
        learned(letters, chat("hello", "hellö"))


def test_plain_text_is_learned_whole_and_closed(tiny: Any) -> None:
    encoded = Renderer(tiny).encode({"text": "Once upon a time."}, "assistant")
    assert tiny.decode(encoded.ids) == "Once upon a time.<|im_end|>"
    assert encoded.learned == [False] + [True] * (len(encoded.ids) - 1)
    no_template = with_template(tiny, None)  # type: ignore[arg-type]
    assert Renderer(no_template).encode({"text": "Once upon a time."}, "assistant").ids == encoded.ids


def check_proof(tokenizer: Any, row: dict[str, Any], after: str) -> None:
    """Either the row is named, or the learned tokens are the answers and the prompt's ids come first."""
    renderer = Renderer(tokenizer)
    try:
        encoded = renderer.encode(row, "assistant")
    except RowProblem as problem:
        assert problem.what
        assert problem.fix
        return
    if not encoded.notes:
        texts = [text for text, is_learned in renderer.pieces(encoded) if is_learned]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert texts == [f"{answer}{after}" for answer in answers]
    prompt = tokenizer(renderer.prompt(row["messages"][:-1]), add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(prompt)] == prompt
    assert not encoded.learned[0]


@settings(max_examples=150, deadline=None)
@given(question=WORDS, one=WORDS, two=WORDS)
def test_any_text_is_proved_or_named(tiny: Any, question: str, one: str, two: str) -> None:
    check_proof(tiny, chat(question, one, question, two), "<|im_end|>")


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_", "end|>", "assistant", "\n", " ", "yes", "é", "👋🏽"]),
        min_size=1,
    )
)
def test_pieces_of_the_template_in_an_answer_are_proved_or_named(tiny: Any, parts: list[str]) -> None:
    check_proof(tiny, chat("yes", "".join(parts)), "<|im_end|>")


@settings(max_examples=100, deadline=None)
@given(question=WORDS, one=WORDS, two=WORDS)
def test_any_text_is_proved_or_named_with_a_sentencepiece_tokenizer(
    phi3: Any, question: str, one: str, two: str
) -> None:
    check_proof(phi3, chat(question, one, question, two), "<|end|>")


def test_phi3(phi3: Any) -> None:
    row = chat("Q", "It is 4.\n\nReally:  yes.", "R", "Once  more", system="S")
    assert learned(phi3, row) == ["It is 4.\n\nReally:  yes.<|end|>", "Once  more<|end|>"]
    assert Renderer(phi3).turn.stop_id == 32007
    assert Renderer(phi3).encode(chat("Q", " A"), "assistant").notes == {render.SPACE_LOST}
    assert learned(with_template(phi3, t.STRICT.replace("<|im_end|>", "<|end|>")), chat("Q", "A")) == ["A <|end|>"]
