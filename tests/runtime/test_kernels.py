"""The self-test of quantized products, and that it would notice a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.runtime import kernels


def test_this_processor_computes_right() -> None:
    found = kernels.errors()
    assert set(found) == {kernel.name for kernel in kernels.KERNELS}
    assert kernels.wrong() == {}


def test_int8_weights_are_loaded_otherwise_only_where_they_overflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = kernels.errors({})
    assert kernels.overflows() == (plain["int8 activations"] > kernels.MOST_ERROR)
    assert max(kernels.errors(kernels.RIGHT).values()) <= kernels.MOST_ERROR
    graph, other = Path(kernels.__file__).with_name("kernels.onnx"), tmp_path / "other.onnx"
    other.write_bytes(graph.read_bytes().replace(b"DynamicQuantizeMatMul", b"D"))
    for yes in (False, True):
        monkeypatch.setattr(kernels, "overflows", lambda yes=yes: yes)
        assert kernels.session_options(graph) == (kernels.RIGHT if yes else {})
        assert kernels.session_options(other) == {}


@pytest.mark.parametrize("flags", [["avx2", "avx_vnni"], ["avx512_vnni", "avx512f"], ["avx2", "avx512f"], ["neon"]])
def test_vnni_answers_before_the_test(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    """Only a processor without it is tested when an artifact is loaded."""
    tested: list[object] = []
    monkeypatch.setattr("edgetune.runtime.hardware.cpu", lambda: {"instruction_sets": flags})
    monkeypatch.setattr(kernels, "errors", lambda session: tested.append(session) or {"int8 activations": 1.0})
    has = any("vnni" in flag for flag in flags)
    assert kernels.overflows.__wrapped__() == (not has) and tested == ([] if has else [{}])


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.weights

    def other(kernel: kernels.Kernel) -> object:
        codes, scales, zeros = real(kernel)
        return codes, scales, zeros // 2 if kernel.name == "int4 with zero points" else zeros

    monkeypatch.setattr(kernels, "weights", other)
    assert set(kernels.wrong()) == {"int4 with zero points"}


def test_the_file_is_what_its_maker_makes() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from edgetune.export.kernel_graph import graph

    assert Path(kernels.__file__).with_name("kernels.onnx").read_bytes() == graph().SerializeToString()
