"""What benchmarks/runtime_vs.py says of made-up rounds, its GGUF files of a tiny model, and its talk with an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from artifacts import tiny_artifact  # noqa: F401
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "runtime_vs.py"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def row(name: str, mb: float, decode: float, prefill: float, kld: float | None, peak: float, **more: Any) -> Any:
    return {
        "name": name,
        "engine": name.partition(",")[0],
        "size_mb": mb,
        "read_bytes": 100_000_000,
        "quality": {} if kld is None else {"kld_mean": kld, "kld_p99": 5 * kld, "top1_agreement": 0.9},
        "prefill": [prefill, prefill * 1.1, prefill * 0.9],
        "decode": [decode, decode * 1.1, decode * 0.9],
        "quiet": [],
        "busy": [],
        "memory": {"peak_rss_mb": peak, "pss_mb": peak - 10},
        "cold_s": [2.0],
        "warm_s": [0.3, 0.2, 0.4],
        "others": 0.0,
        "failed": None,
        **more,
    }


def test_goals_are_judged_against_the_best_of_the_size_class() -> None:
    from _runtime_vs_table import goals

    own = row("edgetune, cpu-int4", 100, 150, 1000, 0.05, 220)
    rows = [
        own,
        row("llama.cpp, Q4_0", 92, 100, 800, 0.06, 230),
        row("llama.cpp, Q4_1", 98, 90, 900, 0.04, 180),
        row("llama.cpp, Q8_0", 145, 500, 5000, 0.001, 100),  # of another size class
        row("OpenVINO GenAI, Q4_0", 92, 60, 990, None, 400),
        row("edgetune, cpu-int8", 101, 900, 9000, 0.001, 10),  # one's own is no rival
    ]
    said = goals(own, rows)
    assert [met for met, _ in said] == [True, False, True, True, False]
    assert "does not count" in said[1][1]
    assert said[0][1].startswith("decode 1.50 times (1.50 to 1.50) that of llama.cpp, Q4_0 (KL no worse: 0.0500, 0.06")
    assert (
        "prefill 1.11 times" in said[1][1]
        and "llama.cpp, Q4_1 (KL worse, so it does not count: 0.0500, 0.0400)" in said[1][1]
    )
    assert "OpenVINO GenAI, Q4_0 (KL of one is not known); goal: 0.97 times" in said[2][1]
    assert said[3][1] == "loaded in 0.30 s; goal: 0.5 s"
    assert said[4][1].startswith("220 MB resident at most, llama.cpp, Q4_1 180 MB")


def test_level_allows_for_noise() -> None:
    from _runtime_vs_table import goals

    def judged(share: float) -> bool:
        other = row("OpenVINO GenAI, Q8_0", 100, 10, 1000 / share, 0.1, 400)
        return next(met for met, words in goals(own, [own, other]) if words.startswith("prefill"))

    own = row("edgetune, cpu-int8", 100, 150, 1000, 0.05, 220)
    assert judged(0.98) and not judged(0.96)


def test_the_table_has_a_column_for_each_head_and_what_is_missing_is_empty() -> None:
    from _runtime_vs_table import table

    rows = [
        row("edgetune, a", 100, 100, 1000, 0.05, 220, busy=[20.0, 45.0], quiet=[100.0, 80.0]),
        {
            **row("llama.cpp, Q4_0", 92, 1, 1, None, 200),
            "decode": [],
            "prefill": [],
            "warm_s": [],
            "cold_s": [],
            "memory": {},
        },
    ]
    lines = table(rows, bandwidth_gb_s=40.0, stressed=True).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    ours = [cell.strip() for cell in lines[2].split("|")]
    assert ours[1:3] == ["edgetune, a", "100"] and "25%" in ours and "0.30 (2.00)" in ours
    assert "34%, 32.5 tokens/s" in ours  # √(0.2 · 0.5625)
    assert set(lines[3].replace(" ", "").split("|")) == {"", "llama.cpp,Q4_0", "92"}


def test_a_gguf_file_has_the_logits_and_tokens_of_the_model_that_it_was_written_of(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from _runtime_vs_gguf import read_bytes, write_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(tiny_model, tmp_path / "tiny.gguf", half=False)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
        found = model(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    text = "<|im_start|>The Seine, 12345 naïve 東京<|im_end|>"
    own, read = (
        AutoTokenizer.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"),
    )
    assert read(text).input_ids == own(text).input_ids
    # Embedding and head are one table, so that a step reads all there is.
    assert read_bytes(tmp_path / "tiny.gguf") == 4 * model.num_parameters()


def test_what_is_no_plain_llama_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from _runtime_vs_gguf import write_gguf

    from edgetune.errors import InputError

    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    for change, what in (
        ({"model_type": "gemma"}, "is a gemma model"),
        ({"partial_rotary_factor": 0.5}, "turns a part of each head only"),
        ({"vocab_size": 300}, "has a token 383, and the model 300 of them"),
        ({"model_type": "phi3"}, "a tensor that a phi3 model has not"),
    ):
        (other / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=what):
            write_gguf(other, tmp_path / "other.gguf", half=True)
    assert not (tmp_path / "other.gguf").exists()


@pytest.fixture
def phi3(tiny_model: Path, tmp_path: Path) -> Path:
    """The shape of Phi-3-mini made tiny, written as benchmarks/export_memory.py writes it; the tiny model's tokenizer."""
    import export_memory

    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "original_max_position_embeddings": 512}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export_memory, "CONFIG", {**export_memory.CONFIG, **sizes, **heads})
        export_memory.write_model(tmp_path / "phi3", 2, tiny_model)
    return tmp_path / "phi3"


def test_phi3_as_gguf_has_the_logits_of_the_model(phi3: Path, tmp_path: Path) -> None:
    import torch
    from _runtime_vs_gguf import read_bytes, write_gguf
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    for half in (True, False):
        write_gguf(phi3, tmp_path / "phi3.gguf", half)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32)
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="phi3.gguf", dtype=torch.float32)
        torch.testing.assert_close(found(ids).logits, own(ids).logits, atol=1e-5, rtol=1e-5)
    reader = GGUFReader(tmp_path / "phi3.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "phi3" and said["phi3.attention.sliding_window"] == 2047
    assert {tensor.name for tensor in reader.tensors} >= {
        "output.weight",
        "blk.1.attn_qkv.weight",
        "blk.0.ffn_up.weight",
    }
    assert read_bytes(tmp_path / "phi3.gguf") == 4 * (own.num_parameters() - 383 * 64)  # of the embedding a row


def test_a_shape_is_rounded_from_float16_and_only_its_speed_is_judged(
    phi3: Path,
    tiny_artifact: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import runtime_vs
    from _runtime_vs_table import goals
    from gguf import GGUFReader

    seen: list[str] = []

    class Rounds:
        """An engine that copies in place of rounding."""

        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Rounds:
            return self

        def __exit__(self, *_: object) -> None: ...
        def quantize(self, source: Path, made: Path, kind: str) -> None:
            kinds = {tensor.tensor_type.name for tensor in GGUFReader(source).tensors if len(tensor.shape) > 1}
            seen.extend([*sorted(kinds), kind])
            made.write_bytes(source.read_bytes())

    monkeypatch.setattr(runtime_vs, "Engine", Rounds)
    args = runtime_vs.arguments([str(phi3), str(tiny_artifact), "--shape", "--rounds", "2"])
    assert (args.prompt, args.tokens, args.rounds, args.kinds, args.most) == (64, 24, 2, "Q4_0", 0)
    entries, check = runtime_vs.prepared(args, Path(sys.executable), None, 2, notes := [])
    assert [entry.name for entry in entries] == ["edgetune, tiny", "llama.cpp, Q4_0"] and check is None
    assert seen == ["F16", "Q4_0"] and [file.name for file in Path(entries[1].model).parent.iterdir()] == ["Q4_0.gguf"]
    assert runtime_vs.divergence(args, entries, check) == {} and not any("left out" in note for note in notes)
    own = row("edgetune, a", 2100, 17, 60, None, 3000)
    said = goals(own, [own, row("llama.cpp, Q4_0", 2200, 16, 50, None, 4000)], shape=True)
    assert [met for met, _ in said] == [False, True] and "goal: 1.1 times" in said[0][1] and "KL" not in said[0][1]


@pytest.mark.parametrize("wrong", [["--most", "3"], ["--without", "llama"]])
def test_a_shape_with_what_it_has_not(tiny_model: Path, tiny_artifact: Path, wrong: list[str]) -> None:  # noqa: F811
    import runtime_vs

    with pytest.raises(SystemExit):
        runtime_vs.arguments([str(tiny_model), str(tiny_artifact), "--shape", *wrong])


def test_nothing_is_met_against_what_is_closer_to_the_model() -> None:
    from _runtime_vs_table import goals

    own = row("edgetune, cpu-int8", 150, 300, 3000, 0.0036, 100)
    for kld, met in ((0.0033, False), (0.0036, True), (0.01, True), (None, True)):
        said = goals(own, [own, row("llama.cpp, Q8_0", 145, 100, 1000, kld, 200)])
        assert [each for each, words in said if not words.startswith("loaded")] == [met] * 3


def test_prompts_differ_from_their_first_tokens_on() -> None:
    from _runtime_vs_rounds import prompts

    found = prompts(lambda text: [hash(word) % 50_000 for word in text.split()], ["a b c d e f g h " * 40], 32, 5)
    assert len(found) == 6 and {len(ids) for ids in found} == {32}
    assert len({tuple(ids[:8]) for ids in found}) > 3 and len({tuple(ids) for ids in found}) == 6


def test_a_processor_with_amx_is_not_built_for_natively() -> None:
    from _runtime_vs_environments import cmake_flags

    assert "GGML_NATIVE=ON" in cmake_flags({"avx2", "fma"})
    amx = cmake_flags({"avx2", "fma", "f16c", "avx512f", "avx512_vnni", "amx_tile", "amx_int8"})
    assert "GGML_NATIVE=OFF" in amx and "GGML_AVX512_VNNI=ON" in amx and "GGML_AVX512_BF16" not in amx


def test_rounds_of_an_artifact_beside_itself(tiny_artifact: Path) -> None:  # noqa: F811
    from _runtime_vs_process import OURS, Entry
    from _runtime_vs_rounds import load_times, take_turns

    entries = [Entry(name, OURS, sys.executable, str(tiny_artifact), 1, 1.0, None) for name in ("a", "b")]
    missing = Entry("c", OURS, sys.executable, str(tiny_artifact / "none"), 1, 1.0, None)
    asked = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    found = take_turns([*entries, missing], asked, 4, 0)
    load_times([*entries, missing], found, 8, 1)
    assert found["a"].tokens == found["b"].tokens and len(found["a"].tokens) == 2
    assert {len(tokens) for tokens in found["a"].tokens} == {4}
    assert len(found["a"].decode) == 2 and len(found["a"].warm_s) == 1 and found["a"].memory["peak_rss_mb"] > 10
    assert found["c"].failed and not found["c"].decode


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "no such file" in done.stderr
