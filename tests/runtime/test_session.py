"""Sessions: the chat contract, generation, cancelling, threads, JSON Schema."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts import CONVERSATIONS, MAX_LENGTH, copy_of, edit_json, seal, tiny_artifact  # noqa: F401
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.runtime.artifact import open_artifact
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.prefix import Context
from edgetune.runtime.session import Piece, Session

ASK: Any = [{"role": "user", "content": "What is 2 plus 2?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 999}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


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


# --- JSON Schema


def only(text: str) -> dict[str, Any]:
    """A schema with one answer."""
    said = {"type": "object", "properties": {"say": {"const": text}}, "required": ["say"]}
    return {**said, "additionalProperties": False}


def test_json_schema(session: Session) -> None:
    for seed in range(6):
        options = GenerationOptions(json_schema=SCHEMA, temperature=1.5, top_k=0, seed=seed, max_tokens=150)
        answer = session.generate(ASK, options)
        assert answer.finish_reason == "stop"
        found = json.loads(answer.text)
        assert found.keys() == {"n", "ok"}
        assert type(found["n"]) is int and found["n"] <= 999 and type(found["ok"]) is bool


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objec"},
        {"type": "string", "pattern": "(("},
        {"$ref": "#/definitions/missing"},
        {"properties": []},
    ],
)
def test_broken_schema(session: Session, schema: Any) -> None:
    with pytest.raises(InputError, match="the schema cannot be followed") as caught:
        session.generate(ASK, GenerationOptions(json_schema=schema))
    assert caught.value.where == "json_schema"
    assert session.generate(ASK, GenerationOptions(max_tokens=2)).completion_tokens == 2


def test_schema_beyond_the_runtime_is_an_error(session: Session) -> None:
    with pytest.raises(EdgetuneError, match="leave emoji and other characters of several tokens out"):
        session.generate(ASK, GenerationOptions(json_schema=only("👋🏽")))
    assert session.generate(ASK, GenerationOptions(max_tokens=2)).completion_tokens == 2


def test_free_strings_are_json_or_an_error(session: Session) -> None:
    schema = {
        "type": "object",
        "properties": {"say": {"type": "string", "maxLength": 12}},
        "required": ["say"],
    }
    ends = set()
    for seed in range(30):
        options = GenerationOptions(
            json_schema={**schema, "additionalProperties": False}, temperature=2, top_k=0, seed=seed
        )
        try:
            answer = session.generate(ASK, options)
        except EdgetuneError as error:
            assert "its JSON is not whole" in str(error)
            ends.add("error")
        else:
            assert set(json.loads(answer.text)) == {"say"}
            ends.add(answer.finish_reason)
    assert "stop" in ends and "length" not in ends


def test_build_without_guidance_is_no_silent_success(
    tiny_artifact: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with runtime.load(tiny_artifact) as session:  # one that has not tried guidance yet
        real = session._reader._og

        class Params:  # takes guidance and forgets it, as such a build does
            def __new__(cls, model: Any) -> Any:
                class Deaf(real.GeneratorParams):  # type: ignore[misc,name-defined]
                    def set_guidance(self, *_: object) -> None:
                        pass

                return Deaf(model)

        class Module:
            GeneratorParams = Params
            Generator = real.Generator

        monkeypatch.setattr(session._reader, "_og", Module)
        with pytest.raises(EdgetuneError, match="cannot follow a JSON Schema"):
            session.generate(ASK, GenerationOptions(json_schema=SCHEMA))


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        ({"regex": "[a-c]{3,5}(x|yz)"}, r"[a-c]{3,5}(x|yz)"),
        ({"grammar": 'start: WORD ("-" WORD){1,2}\nWORD: /[a-e]+[0-9]/'}, r"[a-e]+\d(-[a-e]+\d){1,2}"),
    ],
)
def test_regex_and_grammar(session: Session, constraint: dict[str, str], fits: str, seed: int | None) -> None:
    drawn: Any = {} if seed is None else {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.01, "seed": seed}
    options = GenerationOptions(max_tokens=100, **constraint, **drawn)
    answer = session.generate(ASK, options)
    if answer.finish_reason == "length":  # a random model may repeat a letter for ever
        assert "grammar" in constraint
        options = GenerationOptions(max_tokens=100, **constraint, temperature=2, top_k=0, seed=3)
        answer = session.generate(ASK, options)
    assert answer.finish_reason == "stop"
    assert re.fullmatch(fits, answer.text)
    assert session.generate(ASK, options).ids == answer.ids  # the kept context begins the constraint anew


def test_draws_under_a_constraint_follow_the_model(session: Session) -> None:
    """Where the drawn token is not allowed, an allowed one is drawn by its probability, not the first one."""
    options = {"regex": "[a-z]", "temperature": 2.0, "top_k": 0}
    drawn = {session.generate(ASK, GenerationOptions(seed=seed, **options)).text for seed in range(20)}
    assert len(drawn) > 5
    narrow = {**options, "top_k": 1}  # what it keeps is not allowed: then the likeliest that is
    likeliest = session.generate(ASK, GenerationOptions(regex="[a-z]")).text
    assert {session.generate(ASK, GenerationOptions(seed=seed, **narrow)).text for seed in range(5)} == {likeliest}


@pytest.mark.parametrize("constraint", [{"regex": "(("}, {"grammar": "start: nope"}, {"regex": "(?<=a)b"}])
def test_broken_regex_and_grammar(session: Session, constraint: Any) -> None:
    with pytest.raises(InputError, match="cannot be followed") as caught:
        session.generate(ASK, GenerationOptions(**constraint))
    assert caught.value.where == next(iter(constraint))


def test_constraints_that_nothing_answers(session: Session) -> None:
    with pytest.raises(EdgetuneError, match="leave emoji and other characters of several tokens out"):
        session.generate(ASK, GenerationOptions(regex="👋🏽"))
    answer = session.generate(ASK, GenerationOptions(regex="[a-c]{20}", max_tokens=5))
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


# --- cancelling and threads


def test_cancel_from_another_thread(session: Session) -> None:
    cancel, started = threading.Event(), threading.Event()
    pieces: list[Piece] = []

    def read() -> None:
        for piece in session.stream(ASK, GenerationOptions(temperature=1.0, top_k=5, seed=1), cancel):
            pieces.append(piece)
            started.set()
            time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    cancelled = time.perf_counter()
    cancel.set()
    reader.join(10)
    assert time.perf_counter() - cancelled < 10
    last = pieces[-1].completion
    assert last is not None
    assert last.finish_reason == "cancelled"
    assert last.completion_tokens == len(pieces) - 1 < 150
    assert last.text == "".join(piece.text for piece in pieces)
    assert session.generate(ASK, GenerationOptions(max_tokens=5)).completion_tokens == 5


def test_cancelled_before_it_begins(session: Session) -> None:
    cancel = threading.Event()
    cancel.set()
    answer = session.generate(ASK, cancel=cancel)
    assert (answer.finish_reason, answer.ids, answer.ttft_s) == ("cancelled", (), None)


def test_a_second_generation_waits_and_can_be_cancelled(session: Session) -> None:
    first = session.stream(ASK, GenerationOptions(max_tokens=10))
    next(first)  # holds the session
    ended: dict[str, Any] = {}

    def ask(name: str, cancel: threading.Event) -> None:
        ended[name] = session.generate(ASK, GenerationOptions(max_tokens=10), cancel)

    give_up = threading.Event()
    threads = {
        name: threading.Thread(target=ask, args=(name, event))
        for name, event in {"gives up": give_up, "waits": threading.Event()}.items()
    }
    for thread in threads.values():
        thread.start()
    time.sleep(0.15)
    assert not ended
    give_up.set()
    threads["gives up"].join(0.2)
    assert ended["gives up"].finish_reason == "cancelled"
    rest = list(first)
    threads["waits"].join(10)
    assert rest[-1].completion is not None
    assert ended["waits"].ids == rest[-1].completion.ids


def test_a_stream_left_early_frees_the_session(session: Session) -> None:
    with closing(session.stream(ASK)) as stream:
        next(stream)
    for _ in session.stream(ASK):
        break
    assert session.generate(ASK, GenerationOptions(max_tokens=3)).completion_tokens == 3


def test_threads_do_not_mix(session: Session) -> None:
    asks: list[Any] = [[{"role": "user", "content": f"Question {n}, please."}] for n in range(6)]
    options = [GenerationOptions(max_tokens=30, temperature=1.0, top_k=0, seed=n) for n in range(6)]
    alone = [session.generate(ask, option).ids for ask, option in zip(asks, options, strict=True)]
    together: dict[int, list[Any]] = {}

    def ask(n: int) -> None:
        together[n] = list(session.stream(asks[n], options[n]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for n in range(6):
        assert together[n][-1].completion.ids == alone[n]
        assert tuple(itertools.chain(*(piece.ids for piece in together[n]))) == alone[n]


def test_closed(tiny_artifact: Path) -> None:  # noqa: F811
    session = runtime.load(tiny_artifact)
    session.close()
    with pytest.raises(EdgetuneError, match="the session is closed"):
        session.generate(ASK)
    for threads in (0, 100_000):  # the latter would take all memory for its threads
        with pytest.raises(InputError, match="threads: must be 1 to"):
            runtime.load(tiny_artifact, threads=threads)


# --- what a device needs


def run_python(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=True)


def test_no_training_library_and_no_telemetry(tiny_artifact: Path) -> None:  # noqa: F811
    code = (
        "import os, sys\n"
        "from edgetune import runtime\n"
        f"with runtime.load({str(tiny_artifact)!r}) as s: print(s.generate('What', None).completion_tokens > 0)\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'onnx'} & sys.modules.keys()))\n"
    )
    done = run_python(code, {**os.environ, "ORT_DISABLE_TELEMETRY": "0"})
    assert done.stdout.split("\n") == ["True", "1", "[]", ""]
    assert done.stderr == ""


def test_import_is_light() -> None:
    code = (
        "import time; t = time.perf_counter(); import edgetune.runtime, sys; took = time.perf_counter() - t\n"
        "print(took, 'onnxruntime_genai' in sys.modules)"
    )
    done = run_python(code)
    took, native = done.stdout.split()
    assert float(took) < 0.25
    assert native == "False"


LEAKS = """
import json, psutil, sys, threading
from edgetune import runtime
from edgetune.runtime.options import GenerationOptions

KINDS = [
    {}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2, "prompt_logprobs": 1}, {"reuse": "fast"}, {"reuse": "off"},
    {"regex": "[a-c]{2,4}"}, {"stop": ("a",)},
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
