"""The model card: what it says of the device, of the target, and of earlier cards."""

from __future__ import annotations

from typing import Any

from edgetune.export.card import card, keep_stamp, slower
from edgetune.export.targets import load_target

BASE = {"id": "tiny", "source": "folder", "revision": None, "license": "mit", "upstream": None, "sha256": "0"}


def export(**device: Any) -> dict[str, Any]:
    return {"max_length": 128, "model_context": 512, "device": {"provider": "qnn", "ran": False, **device}}


def test_it_says_what_the_target_asks_for() -> None:
    target = load_target("qnn-npu")
    text = card("tiny", BASE, target, {"export": export()})
    assert target.needs in text
    assert "Limits of the gate: mean KL divergence at most 0.05 nats" in text
    assert "without If, Loop, Scan, MatMulNBits, GatherBlockQuantized; without tensors of double, bfloat16" in text
    assert "all shapes fixed" in text
    stricter = {
        "limits": {**target.limits.model_dump(), "kld_mean": 0.01},
        "passed": False,
        "failures": ["x"],
        "tokens": 9,
    }
    numbers = {"kld_mean": 1, "kld_p99": 1, "top1_agreement": 1, "perplexity": {"merged": 1, "artifact": 1}}
    assert "at most 0.01 nats" in card("tiny", BASE, target, {"verify": {**stricter, **numbers}})


def test_what_could_not_be_compiled_or_run_in_place_of_the_device_is_said() -> None:
    device = {"prepare_failed": "a | b", "cpu_says": "no kernel"}
    text = card("tiny", BASE, load_target("qnn-npu"), {"export": export(**device)})
    assert "| compiles for the device | no: a \\| b |" in text
    assert "| run on the CPU in place of it | no: no kernel |" in text
    text = card("tiny", BASE, load_target("qnn-npu"), {"export": export(prepared={"m.onnx": {"QNN": 0.9, "CPU": 0.1}})})
    assert (
        "| compiles for the device, m.onnx | nodes by provider: QNN 90%, CPU 10%; compiled there at the first load |"
        in text
    )


def test_missed_limits_of_the_export_stand_in_it() -> None:
    reports = {"export": {**export(), "failures": ["size_mb 2 is over 1"]}}
    assert "NOT REACHED: size_mb 2 is over 1" in card("tiny", BASE, load_target("cpu-auto"), reports)


def test_a_rate_that_was_asked_for_and_not_measured_is_said() -> None:
    auto = {"limits": {"decode_tokens_per_s": 120, "prefill_tokens_per_s": 900}}
    bench = {"decode_tokens_per_s": {"p50": 99.5}, "prefill_tokens_per_s": {"p50": 950.0}}
    reports = {"export": {"quantization": {"auto": auto}}, "bench": bench}
    assert slower(reports) == ["decode 99.5 tokens/s, under the 120 that was asked for"]
    assert slower({"export": {}, "bench": bench}) == slower({}) == []


def test_a_new_card_keeps_that_it_was_run_on_the_device() -> None:
    now = card("tiny", BASE, load_target("qnn-npu"), {"export": export()})
    seen = "| run on the device | yes, on qnn: KL mean 0.0100 |\n"
    before = now.replace("| on the device | checked, not run on the device: run `edgetune verify` there |\n", seen)
    assert before != now
    assert keep_stamp(before, now) == before and keep_stamp(now, now) == now
