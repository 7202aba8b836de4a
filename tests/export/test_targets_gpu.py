"""Targets for a CUDA device, on one: exported, compared, measured and answering there. For `make gpu-check`.

The whole of a run, from training on the device to the benchmark, with the tiny model. Processes are fresh: CUDA does not
survive a fork.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import edgetune, write_jsonl
from edgetune.runtime.providers import PROVIDERS, status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not status("cuda").runs, reason=f"no CUDA device for ONNX Runtime: {status('cuda').note}"),
]


@pytest.mark.parametrize("target", ["cuda-fp16", "cuda-bf16", "cuda-int4"])
def test_a_run_goes_to_its_end_on_the_device(
    tiny_model: Path, tmp_path: Path, tiny_rows: list[dict[str, Any]], target: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows * 20)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: rows.jsonl, validation: {{auto: 0.1}}, max_length: 128}}\n"
        "train: {rank: 4, max_steps: 2, batch_size: 4, evaluations: 1, samples: 0}\n"
        f"export: {{target: {target}, max_length: 128}}\n"
        "verify: {rows: 3, golden_tokens: 4, limits: {kld_mean: 0.5, kld_p99: 5, top1_agreement: 0.3, perplexity_ratio: 2}}\n"
        "bench: {prompt_tokens: 16, new_tokens: 4}\n"
    )
    done = edgetune("run", "tiny.yaml", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    verify = json.loads((run / "verify" / "report.json").read_text())
    assert verify["device"]["provider"] == "cuda" and verify["device"]["ran"]
    assert verify["device"]["shares"][PROVIDERS["cuda"].ep] > 0.5
    assert "run on the device | yes, on cuda" in (run / "artifact" / "README.md").read_text()
    report = json.loads((run / "bench" / "report.json").read_text())
    assert report["target"]["provider"] == "cuda"
    answer = edgetune("generate", run / "artifact", "Hello", "--max-tokens", "4", fresh=True)
    assert answer.returncode == 0, answer.stderr
    again = edgetune("generate", run / "artifact", "Hello", "--max-tokens", "4", fresh=True)
    assert answer.stdout == again.stdout
