"""Checks of a graph: each can fail, with one sentence. The graphs are made here, without the builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401
from edgetune.errors import EdgetuneError, GateError, InputError
from edgetune.export.graph_check import check_graph, check_greedy, check_places
from edgetune.export.package import _load
from edgetune.export.targets import Target, load_target
from edgetune.export.weight_check import compare_weights, read_weights


def graph(
    folder: Path, *, op: str = "Relu", kind: int = TensorProto.FLOAT, rows: Any = "rows", opset: int = 21
) -> Path:
    """x · w, then `op`, with the weight in model.onnx.data."""
    folder.mkdir(exist_ok=True)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy_helper.from_array(np.arange(8).reshape(4, 2).astype(dtype), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "first"), helper.make_node(op, ["y"], ["z"], "second")]
    inputs = [helper.make_tensor_value_info("x", kind, [rows, 4])]
    outputs = [helper.make_tensor_value_info("z", kind, [rows, 2])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    file = folder / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return file


def target(**changes: Any) -> Target:
    return load_target("cpu-fp32").model_copy(update=changes)


def rules(**changes: Any) -> Target:
    return target(graph=load_target("cpu-fp32").graph.model_copy(update=changes))


def test_a_good_graph_is_described(tmp_path: Path) -> None:
    found = check_graph(graph(tmp_path), target())
    assert found == {
        "opset": 21, "operators": {"MatMul": 1, "Relu": 1}, "types": ["float"], "weights_file": "model.onnx.data",
        "static": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("made", "wanted", "said"),
    [
        ({}, {"forbidden_ops": ["Relu"]}, "has 1 Relu, which the target forbids"),
        ({"kind": TensorProto.DOUBLE}, {"forbidden_types": ["double"]}, "tensors of the type double"),
        ({"opset": 23}, {"opset": 22}, "opset is 23, newer than 22"),
        ({}, {"domains": ["com.microsoft"]}, "operators of the domain"),
    ],
)
def test_what_a_target_forbids(tmp_path: Path, made: dict[str, Any], wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):  # the target is one that the model cannot have
        check_graph(graph(tmp_path, **made), rules(**wanted))


def test_what_was_made_wrongly_is_a_failure_of_ours(tmp_path: Path) -> None:
    made = graph(tmp_path, op="Nonsense", kind=TensorProto.DOUBLE)
    with pytest.raises(EdgetuneError, match=r"No Op registered for Nonsense.*tensors of the type double") as caught:
        check_graph(made, rules(forbidden_types=["double"]))
    assert caught.value.exit_code == 1


def test_operators_inside_branches_count(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", 1, [1])]
    )
    nodes = [helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)]
    inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [1])]
    made = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("z", 1, [1])])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(EdgetuneError, match="has 2 Relu"):
        check_graph(tmp_path / "m.onnx", rules(forbidden_ops=["Relu"]))


def test_shapes_must_be_fixed_where_the_target_says_so(tmp_path: Path) -> None:
    npu = load_target("qnn-npu")
    with pytest.raises(EdgetuneError, match="the input x has no fixed shape"):
        check_graph(graph(tmp_path / "dynamic"), npu)
    assert check_graph(graph(tmp_path / "fixed", rows=3), npu)["static"]


def test_weights_lie_in_one_file_beside_the_graph(tmp_path: Path) -> None:
    file = graph(tmp_path)
    (tmp_path / "model.onnx.data").rename(tmp_path / "elsewhere")
    with pytest.raises(EdgetuneError, match=r"model.onnx.data is missing"):
        check_graph(file, target())


def test_weights_in_two_files_or_elsewhere(tmp_path: Path) -> None:
    file = graph(tmp_path)
    model = onnx.load(file, load_external_data=False)
    second = model.graph.initializer.add()
    second.CopyFrom(model.graph.initializer[0])
    second.name, second.external_data[0].value = "more", "more.data"
    onnx.save(model, file)
    (tmp_path / "more.data").write_bytes((tmp_path / "model.onnx.data").read_bytes())
    with pytest.raises(EdgetuneError, match=r"in 2 files \(model.onnx.data, more.data\), not in one"):
        check_graph(file, target())
    model.graph.initializer.pop()
    model.graph.initializer[0].external_data[0].value = "../model.onnx.data"
    onnx.save(model, file)
    with pytest.raises(EdgetuneError, match=r"at ../model.onnx.data, not beside the graph"):
        check_graph(file, target())


def test_shapes_that_do_not_fit_one_another(tmp_path: Path) -> None:
    file = graph(tmp_path)
    model = onnx.load(file, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    onnx.save(model, file)
    with pytest.raises(EdgetuneError, match=r"shape inference says: .*Incompatible dimensions"):
        check_graph(file, target())


def test_greedy_tokens_are_the_merged_models(tiny_artifact: Path, tiny_model: Path, other_model: Path) -> None:  # noqa: F811
    check_greedy(tiny_model, tiny_artifact)
    with pytest.raises(EdgetuneError, match="likeliest token after a golden prompt is"):
        check_greedy(other_model, tiny_artifact)


def test_an_artifact_must_load(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = copy_of(tiny_artifact, tmp_path)
    assert _load(folder, runs=True) == {"ran_on_cpu": False}
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMul").input[1] = "nowhere"
    onnx.save(model, folder / "model.onnx")
    seal(folder)
    with pytest.raises(EdgetuneError, match="ONNX Runtime cannot load the artifact"):
        _load(folder, runs=True)


def test_no_file_of_an_artifact_names_where_it_was_made(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    (tmp_path / "model.onnx.data").write_text(str(tmp_path / "model"))  # weights are numbers, whatever they spell
    check_places(tmp_path, tmp_path / "model")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"name_or_path": "{tmp_path / "model"}"}}')
    with pytest.raises(EdgetuneError, match=r"tokenizer_config.json: names a place of this machine"):
        check_places(tmp_path, tmp_path / "model")


def test_no_place_of_this_machine_stands_in_it(tmp_path: Path) -> None:
    file = graph(tmp_path)
    model = onnx.load(file, load_external_data=False)
    model.doc_string = "made from /home/someone/models/mine"
    onnx.save(model, file)
    with pytest.raises(EdgetuneError, match="/home/someone/models/mine"):
        check_graph(file, target())


def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x00not a graph")
    with pytest.raises(EdgetuneError, match="ONNX"):
        check_graph(tmp_path / "model.onnx", target())


def merged(folder: Path, matrix: np.ndarray) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(
        {"model.layers.0.mlp.up_proj.weight": np.ascontiguousarray(matrix, np.float32)}, folder / "model.safetensors"
    )
    return folder


def one_matrix(file: Path, node: onnx.NodeProto, tensors: dict[str, np.ndarray]) -> Path:
    weights = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    made = helper.make_graph([node], "g", [], [], weights)
    onnx.save(helper.make_model(made), file)
    return file


def test_four_bit_weights_are_read_as_the_operator_reads_them(tmp_path: Path) -> None:
    """Against ONNX Runtime: the identity through MatMulNBits gives the weight."""
    import onnxruntime

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 2, 16), dtype=np.uint8)
    scales = rng.uniform(0.1, 1, (3 * 2,)).astype(np.float32)
    points = rng.integers(0, 256, (3 * 1,), dtype=np.uint8)
    name = "/model/layers.0/mlp/up_proj/MatMul_Q4"
    given: dict[str, Any] = {"bits": 4, "block_size": 32, "N": 3, "K": 64}
    node = helper.make_node("MatMulNBits", ["x", "q", "s", "z"], ["y"], name, domain="com.microsoft", **given)
    tensors = {"q": codes, "s": scales, "z": points}
    made = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, [64, 64])],
        [helper.make_tensor_value_info("y", 1, [64, 3])],
        [numpy_helper.from_array(value, key) for key, value in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": np.eye(64, dtype=np.float32)})[0].T
    ((found, ours),) = read_weights(tmp_path / "m.onnx")
    assert found == name
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    report = compare_weights(merged(tmp_path / "merged", theirs), tmp_path / "m.onnx", "int4")
    assert report["matrices"] == 1 and report["worst"]["relative_error"] < 1e-4


def test_norms_and_biases_are_compared_and_nothing_compared_is_no_check(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    right = np.arange(12, dtype=np.float32).reshape(4, 3)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "/model/layers.0/mlp/up_proj/MatMul")
    vectors = {
        "model.layers.0.input_layernorm.weight": np.array([1, 2, 3], np.float32),
        "model.layers.0.attn.qkv_proj.Add.bias": np.array([4, 5, 6], np.float16),
        "model.layers.1.final_norm_layernorm.weight": np.array([1.5, 1, 1], np.float32),
    }
    file = one_matrix(tmp_path / "m.onnx", node, {"w": right, **vectors})
    folder = merged(tmp_path / "merged", right.T)
    theirs = {
        "model.layers.0.input_layernorm.weight": np.array([1, 2, 3], np.float32),
        **{
            f"model.layers.0.self_attn.{which}_proj.bias": np.array([n], np.float32) for n, which in enumerate("qkv", 4)
        },
        "model.norm.weight": np.array([0.5, 0, 0], np.float32),  # the builder adds 1
    }
    weights = {**load_file(folder / "model.safetensors"), **theirs}
    save_file(weights, folder / "model.safetensors")
    found = compare_weights(folder, file, "fp32")
    assert (found["matrices"], found["vectors"], found["not_found"]) == (1, 3, [])
    assert compare_weights(folder, file, "fp32", ["model.layers.0.self_attn.q_proj"])["smoothed"] == 2
    with pytest.raises(EdgetuneError, match="not one of the graph's weights could be compared"):
        compare_weights(folder, file, "fp32", ["model.layers.0.mlp.up_proj"])
    save_file(
        {**weights, "model.layers.0.self_attn.k_proj.bias": np.array([7], np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(EdgetuneError, match=r"qkv_proj\.Add\.bias differ"):
        compare_weights(folder, file, "int4")  # whatever the matrices' precision


def test_weights_under_other_names_are_no_check(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "/somewhere/else")
    file = one_matrix(tmp_path / "m.onnx", node, {"w": np.eye(3, dtype=np.float32)})
    with pytest.raises(EdgetuneError, match="1 are called otherwise, /somewhere/else first"):
        compare_weights(merged(tmp_path / "merged", np.eye(3)), file, "fp32")


def test_a_weight_that_is_another_is_named(tmp_path: Path) -> None:
    right = np.arange(12, dtype=np.float32).reshape(4, 3)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "/model/layers.0/mlp/up_proj/MatMul")
    file = one_matrix(tmp_path / "m.onnx", node, {"w": right})
    assert compare_weights(merged(tmp_path / "same", right.T), file, "fp32")["worst"]["relative_error"] == 0
    with pytest.raises(GateError, match=r"up_proj/MatMul differ .* by 50.0%, more than the 5.0% that int8 explains"):
        compare_weights(merged(tmp_path / "other", 2 * right.T), file, "int8")
    with pytest.raises(EdgetuneError, match=r"is \(3, 4\), the merged model's is \(4, 3\)"):
        compare_weights(merged(tmp_path / "shape", right), file, "fp32")


def test_what_cannot_run_here_is_told_without_this_machines_folders(
    tiny_artifact: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgetune.runtime import session

    def refused(*_: Any, **__: Any) -> None:
        what = f"ONNX Runtime cannot load the artifact: NOT_IMPLEMENTED: {tiny_artifact}/model.onnx has MatMul(13)"
        raise EdgetuneError(what, where=tiny_artifact, fix="export it again")

    monkeypatch.setattr(session, "Session", refused)
    said = "ONNX Runtime cannot load the artifact: NOT_IMPLEMENTED: model.onnx has MatMul(13)"
    assert _load(tiny_artifact, runs=False) == {"ran_on_cpu": False, "cpu_says": said}


def test_checks_do_not_let_libraries_speak(
    tiny_artifact: Path,  # noqa: F811
    tiny_model: Path,
    recwarn: pytest.WarningsRecorder,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check_greedy(tiny_model, tiny_artifact)
    assert not recwarn.list and not capfd.readouterr().err
