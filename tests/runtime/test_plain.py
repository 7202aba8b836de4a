"""Encoders and sequence-to-sequence artifacts on plain ONNX Runtime, with tiny random models."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import seal, tiny_artifact  # noqa: F401 - a fixture
from edgetune import runtime
from edgetune.errors import EdgetuneError, InputError
from edgetune.recipe import ExportSection
from edgetune.runtime.artifact import open_any, open_artifact
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.plain.encoder import Embedder
from edgetune.runtime.plain.graph import Graph
from edgetune.runtime.plain.heads import Answerer, Classifier, Tagger
from edgetune.runtime.plain.seq2seq import Seq2Seq
from edgetune.runtime.plain.tokens import Tokens
from edgetune.runtime.session import Session
from edgetune.standalone import export_model
from plain_models import LABELS, TEXT, Plain, plain, save_encoder  # noqa: F401 - a fixture

WORDS = TEXT.split()
LONG = " ".join(WORDS + WORDS)  # over the tiny encoder's 48 tokens


def _torch(folder: Path, loader: str) -> tuple[Any, Any]:
    import transformers

    model = getattr(transformers, loader).from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def _outputs(folder: Path, loader: str, *texts: str) -> Any:
    """What transformers gives for a text, or a pair of them."""
    import torch

    model, tokenizer = _torch(folder, loader)
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt", padding=False, truncation=False))


def _softmax(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


def test_embeddings_are_the_means_of_the_models_vectors(plain: Plain) -> None:  # noqa: F811
    folder, artifact, _ = plain("embed")
    texts = ["the capital of France", "late", "Maria works in Berlin and Paris and Lima was not open on Tuesday"]
    with runtime.load(artifact, kind=Embedder) as model:
        found = model.encode(texts)
        unit = model.encode(texts, normalize=True)
    wanted = [_outputs(folder, "AutoModel", text).last_hidden_state[0].mean(0).numpy() for text in texts]
    assert found.shape == (3, 64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)


def test_a_text_has_the_same_vector_alone_and_among_many(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("embed")[1], kind=Embedder) as model:
        texts = [" ".join(WORDS[: 1 + n % 12]) for n in range(150)]
        many = model.encode(texts)
        for place in (0, 29, 77, 149):
            np.testing.assert_allclose(model.encode([texts[place]])[0], many[place], atol=1e-5)
        assert model.encode([]).shape == (0, 64)


def test_over_long_texts_are_refused_or_read_in_windows(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("embed")[1], kind=Embedder) as model:
        with pytest.raises(InputError, match=r"text 2 has .* tokens; the model reads 48"):
            model.encode(["late", LONG])
        found = model.encode(["late", LONG], long="window")
        windows = model.windows([LONG])
        assert len(windows) > 1
        assert max(map(len, windows)) <= 48
        parts = np.concatenate([model.outputs([window])[0][0] for window in windows])
        np.testing.assert_allclose(found[1], parts.mean(0), atol=1e-5)
        # no word of the text is left out
        kept = [tuple(place) for window in windows for place in window.encoding.offsets if place[1] > place[0]]
        assert "".join(LONG[start:end] for start, end in sorted(set(kept))) == LONG.replace(" ", "")
        with pytest.raises(InputError, match="a list of strings"):
            model.encode("late")
        with pytest.raises(InputError, match="refuse or window"):
            model.encode(["late"], long="cut")  # type: ignore[arg-type]


def test_classes_are_the_models(plain: Plain) -> None:  # noqa: F811
    folder, artifact, _ = plain("classify")
    texts = ["good phone", "bad battery and late parcel"]
    with runtime.load(artifact, kind=Classifier) as model:
        found = model.classify([*texts, (texts[0], texts[1])])
        assert model.labels == ("bad", "good", "none")
        assert sum(model.classify([LONG], long="window")[0].scores.values()) == pytest.approx(1)
    for one, given in zip(found, [(texts[0],), (texts[1],), tuple(texts)], strict=True):
        wanted = _softmax(_outputs(folder, "AutoModelForSequenceClassification", *given).logits[0].numpy())
        np.testing.assert_allclose(list(one.scores.values()), wanted, atol=1e-5)
        assert one.label == model.labels[int(wanted.argmax())]
        assert one.score == pytest.approx(float(wanted.max()), abs=1e-5)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_scores_follow_the_problem(kind: str, tmp_path: Path) -> None:
    labels = {0: "only"} if kind == "regression" else {0: "a", 1: "b"}
    folder = save_encoder(
        tmp_path / "model", "BertForSequenceClassification", problem_type=kind, id2label=labels, num_labels=len(labels)
    )
    export_model(folder, tmp_path / "artifact", ExportSection(target="cpu-fp32"))
    logits = _outputs(folder, "AutoModelForSequenceClassification", "late").logits[0].numpy()
    wanted = logits if kind == "regression" else 1 / (1 + np.exp(-logits))
    with runtime.load(tmp_path / "artifact", kind=Classifier) as model:
        np.testing.assert_allclose(list(model.classify(["late"])[0].scores.values()), wanted, atol=1e-5)


def test_spans_are_words_whose_labels_agree(plain: Plain) -> None:  # noqa: F811
    folder, artifact, _ = plain("tag")
    text = "Maria works in Berlin, not in Unseenville; Lima is open."
    with runtime.load(artifact, kind=Tagger) as model:
        spans = model.tag([text])[0]
    tokenizer = _torch(folder, "AutoModelForTokenClassification")[1]
    logits = _outputs(folder, "AutoModelForTokenClassification", text).logits[0].numpy()
    encoding = tokenizer(text, return_offsets_mapping=True)
    first: dict[int, int] = {}
    for place, word in enumerate(encoding.word_ids()):
        if word is not None:
            first.setdefault(word, place)
    wanted: list[list[Any]] = []
    before = ""
    for place in first.values():
        label = LABELS[int(logits[place].argmax())]
        start, end = encoding["offset_mapping"][place]
        while end < len(text) and text[end].isalnum():
            end += 1  # the word's other tokens
        kind = label.removeprefix("B-").removeprefix("I-")
        if label != "O" and before == kind and not label.startswith("B-"):
            wanted[-1][2] = end
        elif label != "O":
            wanted.append([kind, start, end])
        before = "" if label == "O" else kind
    assert [[span.label, span.start, span.end] for span in spans] == wanted
    assert wanted, "the random model finds nothing: choose another seed"
    assert all(span.text == text[span.start : span.end] and 0 < span.score <= 1 for span in spans)


def test_windows_of_a_tagged_text_share_words(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("tag")[1], kind=Tagger) as model:
        with pytest.raises(InputError, match="reads 48"):
            model.tag([LONG])
        spans = model.tag([LONG, "late"], long="window")[0]
    assert [span.start for span in spans] == sorted({span.start for span in spans})
    assert all(one.end <= other.start for one, other in itertools.pairwise(spans))
    assert any(span.start > len(LONG) // 2 for span in spans)


def test_answers_are_the_likeliest_pieces(plain: Plain) -> None:  # noqa: F811
    folder, artifact, _ = plain("answer")
    question, context = "where is Maria", "Maria lives in Berlin and works in Paris"
    with runtime.load(artifact, kind=Answerer) as model:
        found = model.answer(question, context)
        long = model.answer(question, LONG, long="window")
        with pytest.raises(InputError, match="reads 48"):
            model.answer(question, LONG)
        with pytest.raises(InputError, match="room for"):
            model.answer(LONG, context, long="window")
        with pytest.raises(InputError, match="empty"):
            model.answer(" ", context)
    out = _outputs(folder, "AutoModelForQuestionAnswering", question, context)
    encoding = _torch(folder, "AutoModelForQuestionAnswering")[1](question, context, return_offsets_mapping=True)
    inside = np.array([part == 1 for part in encoding.sequence_ids()])
    allowed = inside.copy()
    allowed[0] = True
    start, end = (_softmax(np.where(allowed, one[0].numpy(), -np.inf)) for one in (out.start_logits, out.end_logits))
    best = max(
        (start[i] * end[j], i, j) for i in np.flatnonzero(inside) for j in np.flatnonzero(inside) if i <= j < i + 30
    )
    places = encoding["offset_mapping"]
    assert (found.start, found.end) == (places[best[1]][0], places[best[2]][1])
    assert found.text == context[found.start : found.end]
    assert found.score == pytest.approx(float(best[0]), abs=1e-5)
    assert found.unanswerable == pytest.approx(float(start[0] * end[0]), abs=1e-5)
    assert LONG[long.start : long.end] == long.text


def _greedy(folder: Path, text: str, most: int) -> list[int]:
    model, tokenizer = _torch(folder, "AutoModelForSeq2SeqLM")
    found = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=most, do_sample=False, num_beams=1)
    return [int(token) for token in found[0][1:]]


def test_seq2seq_gives_transformers_tokens(plain: Plain) -> None:  # noqa: F811
    folder, artifact, _ = plain("t5")
    with runtime.load(artifact, kind=Seq2Seq) as model:
        for text in ("translate Maria works", "the capital city of France is open", "late"):
            found = model.generate(text, max_tokens=20)
            assert list(found.ids) == _greedy(folder, text, 20)
            assert found.completion_tokens == len(found.ids) <= 20
            assert found.finish_reason == ("stop" if found.ids[-1] == 1 else "length")
            assert found.prompt_tokens == len(model.encode(text))
            pieces = list(model.stream(text, max_tokens=20))
            assert "".join(piece.text for piece in pieces) == found.text
            assert tuple(token for piece in pieces for token in piece.ids) == found.ids
            # one step a token gives what all tokens at once give
            rows = model.logits(model.encode(text), found.ids[:-1])
            assert [int(row.argmax()) for row in rows] == list(found.ids)


def test_seq2seq_stops_where_it_is_told(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("t5")[1], kind=Seq2Seq) as model:
        whole = model.generate("translate Maria works", max_tokens=12)
        middle = whole.text[len(whole.text) // 2 :][:3]
        cut = model.generate("translate Maria works", GenerationOptions(max_tokens=12, stop=(middle,)))
        assert cut.text == whole.text[: whole.text.index(middle)]
        assert cut.finish_reason == "stop"
        assert model.generate("late", max_tokens=1).completion_tokens == 1
        with pytest.raises(InputError, match=r"64"):
            model.generate(LONG + LONG)
        with pytest.raises(InputError, match="temperature, regex cannot be followed"):
            model.generate("late", GenerationOptions(temperature=0.5, regex="a"))
        with pytest.raises(InputError, match="empty"):
            model.generate("  ")
        with pytest.raises(InputError, match="max_tokens"):
            model.generate("late", max_tokens=0)


def test_cancelling_leaves_the_session_usable(plain: Plain) -> None:  # noqa: F811
    with runtime.load(plain("t5")[1], kind=Seq2Seq) as model:
        wanted, cancel = model.generate("translate Maria works", max_tokens=12), threading.Event()
        pieces = []
        for piece in model.stream("translate Maria works", cancel=cancel, max_tokens=12):
            pieces.append(piece)
            if len(pieces) == 3:
                cancel.set()
        done = pieces[-1].completion
        assert done is not None
        assert done.finish_reason == "cancelled"
        assert done.ids == wanted.ids[:3]
        assert model.generate("translate Maria works", cancel=cancel).completion_tokens == 0
        assert model.generate("translate Maria works", max_tokens=12).ids == wanted.ids
    with runtime.load(plain("embed")[1], kind=Embedder) as encoder, pytest.raises(EdgetuneError, match="cancelled"):
        encoder.encode(["late"], cancel=cancel)


def slow(monkeypatch: pytest.MonkeyPatch, at: int) -> threading.Event:
    """Let runs of graphs take until somebody ends them, from the `at`-th on; set while one runs."""
    real, running, calls = Graph.run_values, threading.Event(), itertools.count()

    def run(graph: Graph, feeds: Any, how: Any = None) -> Any:
        if next(calls) >= at:
            running.set()
            for _ in range(2000):
                if how.terminate:
                    break
                time.sleep(0.005)
            else:
                raise AssertionError("nobody ended it")
        return real(graph, feeds, how)

    monkeypatch.setattr(Graph, "run_values", run)
    return running


def _cancelled_amid(call: Any, running: threading.Event) -> Any:
    """What a call gives that is cancelled amid a run of a graph."""
    cancel, found = threading.Event(), list[Any]()

    def work() -> None:
        try:
            found.append(call(cancel))
        except EdgetuneError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert running.wait(20)
    cancel.set()
    thread.join(20)
    return found[0]


@pytest.mark.parametrize("at", [0, 3])
def test_a_run_of_an_encoder_is_ended(plain: Plain, monkeypatch: pytest.MonkeyPatch, at: int) -> None:  # noqa: F811
    with runtime.load(plain("embed")[1], kind=Embedder) as model:
        texts = [" ".join(WORDS[: 1 + n % 12]) for n in range(300)]
        running = slow(monkeypatch, at)
        error = _cancelled_amid(lambda cancel: model.encode(texts, cancel=cancel), running)
        assert isinstance(error, EdgetuneError) and "cancelled" in str(error)
        monkeypatch.undo()
        assert model.encode(texts[:2]).shape == (2, 64)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_run_of_a_sequence_to_sequence_model_is_ended(
    plain: Plain,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    with runtime.load(plain("t5")[1], kind=Seq2Seq) as model:
        wanted = model.generate("translate Maria works", max_tokens=12).ids
        running = slow(monkeypatch, at)
        found = _cancelled_amid(lambda cancel: model.generate("translate Maria works", cancel=cancel), running)
        assert (found.finish_reason, found.ids) == ("cancelled", wanted[: max(at - 1, 0)])
        monkeypatch.undo()
        assert model.generate("translate Maria works", max_tokens=12).ids == wanted


def test_texts_are_not_tokenized_after_a_cancel(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with runtime.load(plain("embed")[1], kind=Embedder) as model:
        cancel, real, calls = threading.Event(), Tokens._encode, list[int]()

        def encode(tokens: Tokens, texts: Any, tokenizer: Any) -> Any:
            calls.append(len(texts))
            cancel.set()
            return real(tokens, texts, tokenizer)

        monkeypatch.setattr(Tokens, "_encode", encode)
        with pytest.raises(EdgetuneError, match="cancelled"):
            model.encode(["late"] * 5000, cancel=cancel)
        assert calls == [64]


def test_threads_do_not_mix_answers(plain: Plain) -> None:  # noqa: F811
    texts = ["translate Maria works", "the capital of France", "late", "where is the river"]
    with runtime.load(plain("t5")[1], kind=Seq2Seq) as model:
        wanted = [model.generate(text, max_tokens=10).ids for text in texts]
        found: dict[int, list[Any]] = {}

        def work(number: int) -> None:
            found[number] = [model.generate(texts[(number + turn) % 4], max_tokens=10).ids for turn in range(8)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: [wanted[(n + turn) % 4] for turn in range(8)] for n in range(4)}


def test_a_closed_session_says_so(plain: Plain) -> None:  # noqa: F811
    embedder = runtime.load(plain("embed")[1], kind=Embedder)
    embedder.close()
    with pytest.raises(EdgetuneError, match="closed"):
        embedder.encode(["late"])


def test_what_is_expected_is_what_comes(plain: Plain, tiny_artifact: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="gives Embedder, not Seq2Seq"):
        runtime.load(plain("embed")[1], kind=Seq2Seq)
    with pytest.raises(InputError, match="gives Session, not Embedder"):
        runtime.load(tiny_artifact, kind=Embedder)
    with runtime.load(tiny_artifact, kind=Session) as session:
        assert isinstance(session, Session)


def test_decoders_commands_refuse_it(plain: Plain) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"model for feature-extraction; chat, .* are for decoders") as error:
        open_artifact(plain("embed")[1])
    assert ".encode(texts)" in str(error.value)


def _copy(artifact: Path, folder: Path) -> Path:
    return Path(shutil.copytree(artifact, folder / "copy"))


@pytest.mark.parametrize("name", ["model.json", "golden.json", "tokenizer.json", "encoder.onnx", "model.onnx.data"])
def test_a_changed_file_never_loads(name: str, plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    copy = _copy(plain("t5")[1], tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match="SHA-256"):
        runtime.load(copy)


def test_a_graph_that_the_manifest_does_not_know_is_refused(plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    copy = _copy(plain("t5")[1], tmp_path)
    shutil.copy(copy / "decoder.onnx", copy / "model.onnx")
    with pytest.raises(InputError, match="not in the manifest"):
        runtime.load(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "edgetune/plain/9"}, "format"),
        ({"task": "feature-extraction"}, "lacks dimensions"),
        ({"stop_ids": []}, "stop_ids cannot be"),
        ({"max_length": "many"}, "max_length cannot be"),
    ],
)
def test_a_description_that_cannot_be_is_refused(
    change: dict[str, Any],
    says: str,
    plain: Plain,  # noqa: F811
    tmp_path: Path,
) -> None:
    copy = _copy(plain("t5")[1], tmp_path)
    described = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**described, **change}))
    seal(copy, task="text2text-generation")
    with pytest.raises(InputError, match=says):
        runtime.load(copy)


def test_another_tokenizer_is_noticed(plain: Plain, tmp_path: Path) -> None:  # noqa: F811
    copy = _copy(plain("embed")[1], tmp_path)
    shutil.copy(plain("t5")[1] / "tokenizer.json", copy / "tokenizer.json")
    seal(copy, task="feature-extraction")
    with pytest.raises(EdgetuneError, match="other ids than the model's"):
        runtime.load(copy)


def test_the_runtime_imports_neither_torch_nor_transformers(plain: Plain) -> None:  # noqa: F811
    import subprocess
    import sys

    code = (
        "import sys; from edgetune.runtime import load\n"
        f"with load({str(plain('embed')[1])!r}) as model: assert model.encode(['late']).shape == (1, 64)\n"
        f"with load({str(plain('t5')[1])!r}) as model: assert model.generate('late', max_tokens=2).ids\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime_genai', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_any_artifact_is_opened(plain: Plain, tiny_artifact: Path) -> None:  # noqa: F811
    assert open_any(plain("t5")[1]).name == "t5"
    assert open_any(tiny_artifact).name == "tiny"
