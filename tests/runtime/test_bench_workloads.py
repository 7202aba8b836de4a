"""Workloads and prompts: names, depths and batches, what fits, files of prompts; and the bytes that a step reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts import tiny_artifact  # noqa: F401
from edgetune.errors import InputError
from edgetune.recipe import BenchSection
from edgetune.runtime.bench import prompts
from edgetune.runtime.bench.traffic import weight_bytes
from edgetune.runtime.bench.workloads import DoesNotFit, Workload, fitted, parse

SECTION = BenchSection()


def names(
    *asked: str, depths: tuple[int, ...] = (), batches: tuple[int, ...] = (), file: str | None = None
) -> list[str]:
    return [work.name for work in parse(asked, depths, batches, file, SECTION)]


def test_names_are_llama_benchs():
    assert names("pp512", "tg128") == ["pp512", "tg128"]
    assert names() == [f"pp{SECTION.prompt_tokens}+tg{SECTION.new_tokens}"]
    assert names("tg8", depths=(0, 100), batches=(1, 4)) == ["tg8", "tg8 x4", "tg8@d100", "tg8@d100 x4"]
    assert names("pp8@d3", depths=(0, 100)) == ["pp8@d3"]
    assert names("chat", "pp8", "pp8") == ["pp8", "chat"]  # none twice, what goes through a session last
    assert names("standard") == [
        *("pp512", "pp512@d1024", "pp512@d4096", "tg128", "tg128@d1024", "tg128@d4096", "chat", "copy")
    ]
    assert names(file="x.jsonl") == ["prompts"]


@given(st.text(alphabet="ptg0123456789+@dx ", max_size=14))
def test_any_name_is_read_or_refused(name: str):
    try:
        (work,) = parse([name], (), (), None, SECTION)
    except InputError as error:
        assert error.where == "workloads"
    else:
        assert parse([work.name], (), (), None, SECTION) == [work] and work.prompt + work.new > 0


def test_what_does_not_fit():
    work = Workload("drawn", 50, 20)
    assert fitted([work], 70, "a")[0] == [work]
    with pytest.raises(DoesNotFit, match=r"pp50\+tg20 needs a context of 70 tokens, the artifact's holds 69"):
        fitted([work], 69, "a")
    small = Workload("drawn", 20)
    found, notes = fitted([work, small], 69, "a")
    assert found == [small]
    assert notes == ["pp50+tg20 was not measured: pp50+tg20 needs a context of 70 tokens, the artifact's holds 69"]
    standard = parse(["standard"], (), (), None, SECTION)
    found, notes = fitted(standard, 512, "a")
    assert [one.name for one in found] == ["tg128", "tg128@d383", "chat", "copy"] and len(notes) == 5
    deep = Workload("drawn", 0, 10, depth=4096)
    found, notes = fitted([deep, Workload("drawn", 0, 10, depth=9999)], 100, "a")
    assert [one.depth for one in found] == [89] and found[0].length == 100 and len(notes) == 2
    assert "the depth is 89, not 4,096 (tg10@d89 in its place)" in notes[0]
    with pytest.raises(InputError, match="nothing can stand before"):
        fitted([Workload("drawn", 10, 0, depth=5, batch=2)], 100, "a")
    assert Workload("drawn", 10).length == 11 and Workload("drawn", 0, 10).length == 12


def test_prompts_have_the_length_and_differ():
    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()[::2]]  # half a token a word

    drawn = prompts.distinct_prompts(encode, 50, 2, 3)
    assert [len(ids) for _, ids in drawn] == [50] * 5 and len({tuple(ids) for _, ids in drawn}) == 5
    assert prompts.distinct_prompts(encode, 50, 0, 3) == drawn[2:]
    with pytest.raises(InputError, match="not 12 different prompts of 8 tokens"):
        prompts.distinct_prompts(lambda text: [1] * len(text), 8, 0, 12)
    assert len(prompts.distinct_prompts(lambda text: [1] * len(text), 1, 0, 12)) == 12  # nothing to keep in a cache


def test_conversations_and_copies_differ_from_the_first_words_on():
    talks = [prompts.conversation(f"round {n}") for n in range(20)]
    assert len({talk[0].split(" is the name")[0] for talk in talks}) == 20
    assert prompts.conversation("round 3") == talks[3] and all(len(talk) == 4 for talk in talks)
    copies = [prompts.copying(f"round {n}")[0]["content"] for n in range(20)]
    assert len({text.split(":")[0] for text in copies}) == 20 and copies[0].endswith("word for word.")


def test_quoted_share():
    assert prompts.quoted([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 9]) == 0.5
    assert prompts.quoted([1, 2, 3], [1, 2, 3]) is None
    assert prompts.quoted([1, 2, 3, 4, 5], [2, 3, 4, 5]) == 1.0


def test_own_prompts(tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "other": 1},
        {"prompt": "p"},
        {"text": "t"},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert prompts.read_prompts(file) == [[{"role": "user", "content": "a"}], "p", "t"]
    (tmp_path / "own.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert prompts.read_prompts(tmp_path / "own.txt") == ["one\n\ntwo"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "holds no prompt"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "own.jsonl:1: is not JSON"),
        (b'{"prompt": "x"}\n[1]', "own.jsonl:2: is not a JSON object"),
        (b'{"prompt": " "}', "neither messages nor a prompt"),
        (b'{"messages": [{"role": "user"}]}', "role and content"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no turn that asks"),
    ],
)
def test_wrong_prompts_are_told_with_their_line(tmp_path: Path, content: bytes, what: str):
    file = tmp_path / "own.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=what):
        prompts.read_prompts(file)
    with pytest.raises(InputError, match="is a folder"):
        prompts.read_prompts(tmp_path)


def test_bytes_of_a_step_are_those_of_the_graph(tiny_artifact: Path):  # noqa: F811
    import onnx

    graph = onnx.load(str(tiny_artifact / "model.onnx"), load_external_data=False).graph
    wanted = 64 * 4  # a row of the tied table, which is the head's, transposed
    looked_up = {
        node.input[i]
        for node in graph.node
        for i in {"Gather": (0,), "GroupQueryAttention": (7, 8)}.get(node.op_type, ())
    }
    for weight in graph.initializer:
        bits = {1: 32, 6: 32, 7: 64}[weight.data_type]
        size = bits // 8
        for dim in weight.dims[1:] if weight.name in looked_up and len(weight.dims) else weight.dims:
            size *= dim
        wanted += size
    assert weight_bytes(tiny_artifact / "model.onnx") == pytest.approx(wanted, abs=0)


def test_shared_and_packed_weights_count_once(tmp_path: Path):
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    def outside(name: str, kind: int, dims: list[int], offset: int) -> TensorProto:
        found = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w"), ("offset", str(offset))):
            entry = found.external_data.add()
            entry.key, entry.value = key, value
        return found

    weights = [
        outside("table", TensorProto.UINT8, [100, 32], 0),
        outside("head", TensorProto.UINT8, [100, 1, 32], 0),  # the same bytes
        outside("small", TensorProto.UINT4, [10, 8], 9999),
        numpy_helper.from_array(np.ones((6, 2), np.float16), "scales"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["row"]),
        helper.make_node("MatMulNBits", ["row", "head"], ["a"]),
        helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "wide"], ["b"]),
        helper.make_node("Mul", ["b", "small"], ["c"]),
    ]
    save(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)), tmp_path / "g.onnx")
    assert weight_bytes(tmp_path / "g.onnx") == 32 + 3200 + 12 * 4 + 40


@given(st.binary(max_size=200))
def test_what_is_no_graph_has_no_bytes(data: bytes):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "g.onnx")
        file.write_bytes(data)
        found = weight_bytes(file)
        assert found is None or found >= 0
        assert weight_bytes(Path(folder, "none")) is None
