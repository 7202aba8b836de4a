"""The real SmolLM2-135M from rows to an answer: the quickstart with fewer steps, and the gate that a ruined model fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import _REAL_HOME, ROOT, edgetune
from edgetune import runtime
from edgetune.runtime.options import GenerationOptions

pytestmark = pytest.mark.real

FEWER = [
    "train.max_steps=6", "train.learning_rate=5e-4", "train.evaluations=1", "train.samples=1", "train.sample_tokens=8",
    "verify.rows=8", "verify.golden_tokens=12",
    "bench.repetitions=2", "bench.warmup=0", "bench.new_tokens=16", "bench.prompt_tokens=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the shortened quickstart has been run."""
    folder = tmp_path_factory.mktemp("real")
    done = edgetune("run", "quickstart", *FEWER, "--json", cwd=folder, env=home())
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "result.json").write_text(done.stdout)
    return folder


def home() -> dict[str, str]:
    """The home that keeps the real model between test runs."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune"
    return {"EDGETUNE_HOME": _REAL_HOME or str(default)}


def test_the_numbers_that_others_rely_on(real: Path) -> None:
    reports = json.loads((real / "result.json").read_text())["reports"]
    train, merge, verify, bench = (reports[name] for name in ("train", "merge", "verify", "bench"))
    assert train["validation"]["after"]["loss"] < train["validation"]["before"]["loss"]
    assert merge["max_logprob_difference"] < merge["tolerance"] and merge["tied_embeddings"]
    assert verify["passed"] and verify["kld_mean"] < 0.02 and verify["top1_agreement"] > 0.93
    assert {"kld_p99", "kld_max"} <= verify.keys() and {"merged", "artifact"} <= verify["perplexity"].keys()
    for name in ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert bench[name]["p50"] > 0
    assert bench["itl_ms"]["p95"] > 0 and bench["load_s"] > 0 and bench["peak_rss_mb"] > 100 and bench["size_mb"] > 140
    for name in ("train", "merge", "export", "verify", "bench"):
        assert json.loads((real / f"runs/quickstart/{name}/report.json").read_text()) == reports[name]


def test_the_second_run_says_that_nothing_changed(real: Path) -> None:
    again = edgetune("run", "quickstart", *FEWER, cwd=real, env=home())
    assert again.returncode == 0 and "nothing changed" in again.stdout, again.stderr
    assert "done" not in again.stderr


def test_chat_answers_paris(real: Path) -> None:
    said = edgetune("chat", "runs/quickstart/artifact", cwd=real, stdin="What is the capital of France?\n", env=home())
    assert said.returncode == 0 and "Paris" in said.stdout, said.stdout + said.stderr
    once = edgetune(
        "generate", "runs/quickstart", "What is the capital of France?", "--max-tokens", "12", cwd=real, env=home()
    )
    assert once.returncode == 0 and "Paris" in once.stdout, once.stderr


def test_the_gate_refuses_plain_int4(real: Path) -> None:
    target = real / "plain.yaml"
    target.write_text("{description: as the builder rounds, needs: a CPU, provider: cpu, precision: int4}", "utf-8")
    ruined = edgetune("run", "quickstart", *FEWER, "export.target=plain.yaml", cwd=real, env=home())
    assert ruined.returncode == 3, ruined.stderr
    assert "the gate is not passed" in ruined.stderr and "export.target=cpu-int8" in ruined.stderr
    report = json.loads((real / "runs/quickstart/verify/report.json").read_text())
    assert not report["passed"] and report["kld_mean"] > 0.1


@pytest.mark.slow
def test_our_int4_is_small_and_keeps_the_model(real: Path) -> None:
    done = edgetune("run", "quickstart", *FEWER, "export.target=cpu-int4", cwd=real, env=home(), timeout=900)
    assert done.returncode == 0, done.stderr
    folder = real / "runs/quickstart"
    export, verify = (json.loads((folder / name / "report.json").read_text()) for name in ("export", "verify"))
    assert verify["kld_mean"] < 0.05 and verify["top1_agreement"] > 0.9
    assert export["size_mb"] < 111 and export["quantization"]["spared"] == {}


def test_a_conversation_s_answers_are_those_of_fresh_starts(real: Path) -> None:
    """Bit for bit, log-probabilities included, though all but the end of each prompt is there already."""
    known = []
    asks = ["Who wrote Faust?", "Tell me about him, in some detail.", "Where was he born?", "And where did he die?"]
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 4}):
        with runtime.load(real / "runs/quickstart") as session:
            messages = [{"role": "system", "content": "You know literature. " * 40}]
            for ask in asks:
                messages.append({"role": "user", "content": ask})
                prompt: Any = messages
                answer = session.generate(prompt, GenerationOptions(max_tokens=60, logprobs=3, **options))  # type: ignore[arg-type]
                fresh = session.generate(
                    prompt,
                    GenerationOptions(max_tokens=60, logprobs=3, reuse="off", **options),  # type: ignore[arg-type]
                )
                assert (answer.ids, answer.logprobs) == (fresh.ids, fresh.logprobs) and fresh.cached_tokens == 0
                again = session.generate(prompt, GenerationOptions(max_tokens=60, logprobs=3, **options))  # type: ignore[arg-type]
                assert (again.ids, again.logprobs) == (fresh.ids, fresh.logprobs)
                known.append((again.cached_tokens, session._reader.whole(session.encode(session.render(prompt)))))
                messages.append({"role": "assistant", "content": answer.text})
    assert all(found == most > 0 for found, most in known)


@pytest.mark.slow
def test_float32_says_what_transformers_says(real: Path) -> None:
    """Greedy tokens of 50 prompts, and the log-probabilities of prompts and answers."""
    import torch
    from transformers import AutoModelForCausalLM

    merged, artifact = real / "runs/quickstart/merged", real / "fp32"
    done = edgetune("export", merged, "--target", "cpu-fp32", "--out", artifact, cwd=real, env=home(), timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (ROOT / "recipes/data/chat_validation.jsonl").read_text("utf-8").splitlines()]
    rows += [json.loads(line) for line in (ROOT / "recipes/data/chat_train.jsonl").read_text("utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    furthest, prompts = 0.0, 0
    with runtime.load(artifact) as session, torch.no_grad():
        for row in rows[:50]:
            messages = row["messages"][:-1]
            ids = session.encode(session.render(messages))
            out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
            answer = session.generate(messages, GenerationOptions(max_tokens=24, logprobs=0, prompt_logprobs=0))
            assert list(answer.ids) == out[len(ids) :], messages
            exact = model(torch.tensor([out])).logits[0].log_softmax(-1)
            found = [*(answer.prompt_logprobs or ()), *(answer.logprobs or ())][1:]
            assert len(found) == len(out) - 1
            far = (abs(entry.logprob - float(exact[n, out[n + 1]])) for n, entry in enumerate(found) if entry)
            furthest, prompts = max(furthest, *far), prompts + 1
    assert prompts == 50 and furthest < 1e-3, furthest
