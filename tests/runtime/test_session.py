"""Sessions: the chat contract, prompts, generation, and what a device needs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts import CONVERSATIONS, MAX_LENGTH, copy_of, edit_json, seal, tiny_artifact  # noqa: F401
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.options import GenerationOptions, OptionFields
from edgetune.runtime.prefix import Context
from edgetune.runtime.session import Session

ASK: Any = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Iterator[Session]:  # noqa: F811
    with runtime.load(tiny_artifact) as found:
        yield found


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:  # noqa: F811
    return copy_of(tiny_artifact, tmp_path)


# --- the chat contract


def test_same_as_in_training(session: Session, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for messages in [
        *CONVERSATIONS,
        ASK,
        [{"role": "user", "content": '\u2028\ta\\n"b" <b> {{ x }} 👩‍👩‍👧'}],
    ]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert session.render(messages) == text  # type: ignore[arg-type]
        assert session.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_golden_ids_differ(copy: Path) -> None:
    golden = json.loads((copy / "golden.json").read_text())
    golden["prompts"][1]["ids"][3] += 1
    edit_json(copy / "golden.json", prompts=golden["prompts"])
    seal(copy)
    with pytest.raises(EdgetuneError, match="golden prompt 2: the tokenizer gives other ids from place 3") as caught:
        runtime.load(copy)
    assert caught.value.exit_code == 1


def test_golden_text_differs(copy: Path) -> None:
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("You help.", "You  help."))
    seal(copy)  # the hashes are right, the template is not that of the training
    with pytest.raises(EdgetuneError, match="golden prompt 1: the chat template gives another text"):
        runtime.load(copy)


def test_stop_ids_differ(copy: Path) -> None:
    edit_json(copy / "golden.json", stop_ids=[2, 0])
    seal(copy)
    with pytest.raises(EdgetuneError, match=r"stop tokens are \[2\], not \[2, 0\]"):
        runtime.load(copy)


def test_graph_that_does_not_load(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"no graph")
    seal(copy)
    with pytest.raises(EdgetuneError, match="ONNX Runtime cannot load the artifact"):
        runtime.load(copy)


# --- prompts


def test_prompt_that_fills_the_context(session: Session) -> None:
    whole = "a " * MAX_LENGTH
    ids = session.encode(whole)
    fitting = session.decode(ids[: MAX_LENGTH - 1])
    assert len(session.encode(fitting)) == MAX_LENGTH - 1
    assert session.generate(fitting).completion_tokens == 1
    with pytest.raises(InputError, match=f"the prompt has {len(ids)} tokens; the context holds {MAX_LENGTH}"):
        session.stream(whole)  # said at once, not with the first piece


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("", "the prompt is empty"),
        ("a\0b", "NUL"),
        ("a\ud800b", "not Unicode"),
        ([{"role": "user"}], "message 1: needs role and content"),
        ([*ASK, {"role": "user", "content": None}], "message 2: needs role and content"),
        ([{"role": "user", "content": "\ud800"}], "not Unicode"),
    ],
)
def test_prompts_that_are_refused(session: Session, prompt: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        session.stream(prompt)


def test_template_that_refuses(copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    refusal = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    (copy / "chat_template.jinja").write_text(refusal + template)
    seal(copy)
    with runtime.load(copy) as strict:
        with pytest.raises(InputError, match="the model's chat template refuses this conversation: no tools"):
            strict.stream([{"role": "tool", "content": "x"}])
        assert strict.generate(ASK).completion_tokens > 0


# --- generation


def test_greedy_repeats_itself(session: Session, tiny_artifact: Path) -> None:  # noqa: F811
    first = session.generate(ASK, GenerationOptions(max_tokens=30))
    assert first.ids == session.generate(ASK, GenerationOptions(max_tokens=30)).ids
    with Session(open_artifact(tiny_artifact), threads=1) as other:
        assert other.generate(ASK, GenerationOptions(max_tokens=30)).ids == first.ids
    assert first.finish_reason == "length"
    assert first.completion_tokens == len(first.ids) == 30
    assert first.prompt_tokens == len(session.encode(session.render(ASK)))
    assert first.text == session.decode(first.ids)
    assert first.ttft_s is not None and first.ttft_s > 0
    assert first.decode_tokens_per_s is not None and first.decode_tokens_per_s > 0


def test_max_tokens_where_the_cache_has_a_fixed_size(copy: Path) -> None:
    """ONNX Runtime GenAI would go on until the cache is full."""
    config = json.loads((copy / "genai_config.json").read_text())
    window = {
        "window_size": 2047,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": [],
        "cache_slack": 0,
    }
    config["model"]["decoder"]["sliding_window"] = window
    edit_json(copy / "genai_config.json", **config)
    seal(copy)
    with runtime.load(copy) as session:
        answer = session.generate("Hello", GenerationOptions(max_tokens=5))
    assert (answer.completion_tokens, answer.finish_reason) == (5, "length")


def test_same_as_the_trained_model(session: Session, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    long = [{"role": "user", "content": "Write a short answer, please. " * 8}]  # more than one prefill call
    for messages in (ASK, long):
        ids = session.encode(session.render(messages))
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert list(session.generate(messages, GenerationOptions(max_tokens=12)).ids) == out


def test_seeds(session: Session) -> None:
    def ids(seed: int | None, **more: Any) -> tuple[int, ...]:
        options = GenerationOptions(max_tokens=24, temperature=1.0, top_k=0, seed=seed, **more)
        return session.generate(ASK, options).ids

    assert ids(7) == ids(7)
    assert len({ids(seed) for seed in range(5)}) == 5
    assert len({ids(None) for _ in range(5)}) > 1
    greedy = session.generate(ASK, GenerationOptions(max_tokens=24)).ids
    assert ids(3, top_p=1e-6) == greedy
    one = GenerationOptions(max_tokens=24, temperature=1.0, top_k=1, seed=3)
    assert session.generate(ASK, one).ids == greedy
    session.generate(ASK, GenerationOptions(max_tokens=2, temperature=2.0, top_k=10**6, seed=2**31 - 1))


def test_max_tokens_is_capped_by_the_context(session: Session) -> None:
    answer = session.generate(ASK, GenerationOptions(max_tokens=100_000))
    assert answer.finish_reason in ("stop", "length")
    assert answer.prompt_tokens + answer.completion_tokens <= MAX_LENGTH


def test_stop_token_ends_the_answer(session: Session) -> None:
    for seed in range(60):  # a random model stops by chance
        answer = session.generate(ASK, GenerationOptions(max_tokens=200, temperature=1.5, top_k=0, seed=seed))
        if answer.finish_reason == "stop":
            assert answer.ids[-1] == 2 and 2 not in answer.ids[:-1]
            assert "<|im_end|>" not in answer.text
            return
    pytest.fail("never stopped")


def test_stop_string_across_tokens(session: Session) -> None:
    plain = session.generate(ASK, GenerationOptions(max_tokens=40))
    pieces = [piece.text for piece in session.stream(ASK, GenerationOptions(max_tokens=40)) if piece.text]
    at = next(i for i in range(3, len(pieces)) if len(pieces[i]) > 1)
    stop = pieces[at - 1][-1:] + pieces[at][:1]  # the end of one token and the beginning of the next
    shown = []
    for piece in session.stream(ASK, GenerationOptions(max_tokens=40, stop=(stop, "never said"))):
        shown.append(piece.text)
        assert stop not in "".join(shown)
    assert piece.completion is not None
    assert piece.completion.finish_reason == "stop"
    assert piece.completion.text == "".join(shown) == plain.text[: plain.text.index(stop)]
    assert piece.completion.completion_tokens < 40


class Scripted:
    """A native generator that says what it is told."""

    def __init__(self, ids: list[int]) -> None:
        self.left, self.now = list(ids), -1

    def append_tokens(self, ids: list[int]) -> None:
        pass

    def generate_next_token(self) -> None:
        self.now = self.left.pop(0)

    def get_next_tokens(self) -> list[int]:
        return [self.now]

    def is_done(self) -> bool:
        return not self.left


def test_characters_come_whole(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "a👋🏽 東京👩‍👩‍👧 naïve."
    ids = session.encode(wanted)
    assert len(ids) > len(wanted)  # each of these is several tokens
    for most in range(1, len(ids) + 1):
        scripted = Context(Scripted(ids[:most]), None, 1000)
        monkeypatch.setattr(session._reader, "begin", lambda *_, made=scripted: made)
        shown = ""
        for piece in session.stream(ASK, GenerationOptions(max_tokens=most, stop=("🎈",))):  # begins as 👋 does
            shown += piece.text
            assert wanted.startswith(shown)
        assert piece.completion is not None
        assert (piece.completion.text, piece.completion.finish_reason) == (shown, "length")
    assert shown == wanted


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 383), min_size=1, max_size=40))
def test_any_tokens_stream_as_whole_characters(session: Session, ids: list[int]) -> None:
    """Whatever bytes a model writes: pieces are Unicode, and together what its tokens stand for, broken bytes aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session._reader, "begin", lambda *_: Context(Scripted(ids), None, 1000))
        stream = session.stream(ASK, GenerationOptions(max_tokens=len(ids)))
        texts = [piece.text for piece in stream]
    said = ids[: ids.index(2) + 1] if 2 in ids else ids
    data = b"".join(session._vocabulary.bytes(token) or b"" for token in said)
    for text in texts:
        text.encode("utf-8")  # no half of a surrogate pair
        assert "\ufffd" not in text or b"\xef\xbf\xbd" in data
    shown = "".join(texts)
    with contextlib.suppress(UnicodeDecodeError):
        assert shown == data.decode("utf-8")
    rest = data
    for character in shown:  # in order, each of them was written
        at = rest.find(character.encode())
        assert at >= 0
        rest = rest[at + len(character.encode()) :]


def test_decode_gives_back_what_was_encoded(session: Session) -> None:
    for text in ("👋🏽 emoji", "a👩‍👩‍👧b\n東京", "naïve", ""):
        assert session.decode(session.encode(text)) == text
    assert session.decode(session.encode("<|im_start|>hi 👋<|im_end|>")) == "hi 👋"
    assert session.decode(session.encode("a👋")[:-1]) == "a"  # half a character is not shown


# --- what a device needs


def run_python(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=True)


def test_no_training_library_and_no_telemetry(tiny_artifact: Path) -> None:  # noqa: F811
    code = (
        "import os, sys\n"
        "from edgetune import runtime\n"
        f"with runtime.load({str(tiny_artifact)!r}) as s: print(s.generate('What', None).completion_tokens > 0)\n"
        "print(sorted({'numpy', 'onnxruntime', 'jinja2', 'pydantic'} & sys.modules.keys()))  # cold starts are short\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'onnx'} & sys.modules.keys()))\n"
    )
    done = run_python(code, {**os.environ, "ORT_DISABLE_TELEMETRY": "0"})
    assert done.stdout.split("\n") == ["True", "[]", "1", "[]", ""]
    assert done.stderr == ""


def test_import_is_light() -> None:
    heavy = {
        "numpy",
        "onnxruntime",
        "onnxruntime_genai",
        "tokenizers",
        "pydantic",
        "jinja2",
        "psutil",
        "typer",
        "rich",
        "yaml",
    }
    code = f"import sys; import edgetune.runtime; print(sorted({heavy!r} & set(sys.modules)))"
    assert run_python(code).stdout == "[]\n"


def test_the_package_gives_what_its_users_need() -> None:
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        runtime.Nothing  # noqa: B018
    assert (Path(runtime.__file__).parents[1] / "py.typed").is_file()


def test_options_as_keywords(session: Session) -> None:
    assert OptionFields.__annotations__.keys() == {field.name for field in fields(GenerationOptions)}
    drawn = session.generate(ASK, max_tokens=12, temperature=1.0, seed=3)
    assert drawn.ids == session.generate(ASK, GenerationOptions(max_tokens=12, temperature=1.0, seed=3)).ids
    both = session.generate(ASK, GenerationOptions(max_tokens=30, temperature=1.0, seed=3), max_tokens=12)
    assert both.ids == drawn.ids
    with pytest.raises(InputError, match="is no option: max_token"):
        session.generate(ASK, max_token=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="temperature: must be a number from 0 to 2"):
        session.stream(ASK, temperature=3)


LEAKS = """
import json, psutil, sys, threading
from edgetune import runtime
from edgetune.runtime.options import GenerationOptions

KINDS = [
    {}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2, "prompt_logprobs": 1}, {"reuse": "fast"}, {"reuse": "off"},
    {"regex": "[a-c]{2,4}"}, {"stop": ("a",)}, {"json_schema": {"enum": [1, 2]}}, {"grammar": 'start: "a" "b"?'}, {"speculation": "on"},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
]
process, used = psutil.Process(), []
with runtime.load(sys.argv[1]) as session:
    for n in range(10_000):
        options = GenerationOptions(max_tokens=4, **KINDS[n % len(KINDS)])
        prompt, cancel = f"Question {n}: " + "one two three " * (n % 7), threading.Event()
        if n % 5 == 0:
            stream = session.stream(prompt, options, cancel)
            next(stream)
            if n % 2:
                cancel.set()
                list(stream)
            stream.close()
        else:
            session.generate(prompt, options)
        if n % 1000 == 999:
            used.append(process.memory_info().rss / 1e6)
print(json.dumps(used))
"""


@pytest.mark.slow
def test_ten_thousand_generations_leak_nothing(tiny_artifact: Path) -> None:  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", LEAKS, str(tiny_artifact)], capture_output=True, text=True, timeout=540, check=True
    )
    used = json.loads(done.stdout)
    slope = (used[-1] - used[1]) / (len(used) - 2) * 1000  # bytes a generation, after the first two thousand
    assert slope < 300, used
