"""The gate: the artifact against the merged model, on held-out rows of the user's own data.

Both models read the same rows; wherever loss falls, their next-token distributions are compared in float32. Logits
are used row by row and thrown away, so that no file of them ever exists.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.data.batch import Encoded, cut
from edgetune.errors import EdgetuneError, GateError, InputError
from edgetune.files import write_json
from edgetune.models import load_model, load_tokenizer, stop_ids
from edgetune.models.quiet import quiet
from edgetune.recipe import Limits, VerifySection
from edgetune.runtime.memory import peak_rss_mb, reset_peak

if TYPE_CHECKING:
    import numpy as np
    import torch

    Logits = Callable[[Sequence[int]], torch.Tensor]

_ENOUGH = 200  # tokens under which one or two disagreements decide the gate
_CHUNK = 256  # positions whose distributions are in memory at once, float32


def verify(
    artifact: Path,
    merged: Path,
    rows: Sequence[Encoded],
    section: VerifySection,
    out: Path,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare an artifact with the model that it was made from.

    Args:
        artifact: artifact folder, hashes already verified.
        merged: transformers folder.
        rows: encoded held-out rows.
        section: the recipe's `verify`.
        out: existing folder for report.json.
        trust_remote_code: run code that the merged model's folder brings.

    Returns:
        The report: `kld_mean`, `kld_p99`, `kld_max` (nats), `top1_agreement`, `perplexity.{merged,artifact,ratio}`, `tokens`,
        `golden` (first divergent token of greedy generation), `limits`, `failures` and `passed`.

    Raises:
        InputError: the two do not have the same vocabulary, or no row has a token that carries loss.
        GateError: the artifact's logits are not finite numbers.
        EdgetuneError: the merged model's are not.
    """
    import torch

    reset_peak()
    started = time.monotonic()
    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    golden = json.loads((artifact / "golden.json").read_text(encoding="utf-8"))["prompts"]
    limit = config["search"]["max_length"]
    used = [row for row in (cut(row, limit) for row in rows[: section.rows]) if any(row.learned[1:])]
    if not used:
        raise InputError(
            "no held-out row has a token that carries loss",
            fix="give other rows (`--data`), or raise export.max_length",
        )
    with progress.task("verify", len(used) + len(golden)) as bar, quiet():
        model = load_model(merged, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model.eval()
        graph = Graph(artifact, config)
        if model.config.get_text_config().vocab_size != graph.vocabulary:
            raise InputError(
                f"the artifact has {graph.vocabulary} tokens, the model {model.config.get_text_config().vocab_size}",
                where=artifact,
                fix="compare an artifact with the model that it was exported from (`--against`)",
            )
        scores = _Scores()
        for row in used:
            scores.add(_merged_logits(model, row.ids), graph.logits(row.ids), row)
            bar.advance(1, f"KL {scores.mean():.4f}")
        tokenizer, stops, texts = load_tokenizer(merged, trust_remote_code=trust_remote_code), set(stop_ids(merged)), []
        for prompt in golden:
            texts.append(_greedy(model, graph, prompt, section.golden_tokens, tokenizer, stops))
            bar.advance(1)
    result = {
        **scores.summary(),
        "rows": len(used),
        "precision": _precision(artifact),
        "golden": texts,
        "limits": section.limits.model_dump(),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
    }
    few = f"only {result['tokens']} tokens were compared, too few to judge by: hold out more rows (data.validation)"
    result["warnings"] = [few] if result["tokens"] < _ENOUGH else []
    result["failures"] = failures(result, section.limits)
    result["passed"] = not result["failures"]
    write_json(out / "report.json", result)
    return result


def gate_error(report: dict[str, Any], artifact: Path) -> GateError:
    """What is said, and what to try, when the gate is not passed."""
    ruined = report["kld_mean"] > 0.2 or report["top1_agreement"] < 0.8
    says = "at this precision it is another model than the one that was trained; " if ruined else ""
    if report["precision"] == "fp32":
        fix = f"{says}an export without rounding should pass: please report this model"
    else:
        more = "export.target=cpu-int8" if report["precision"] == "int4" else "export.target=cpu-fp32"
        fix = f"{says}choose more bits ({more}), or set verify.limits if this loss is acceptable to you"
    if report["warnings"]:
        fix = f"{report['warnings'][0]}; else {fix}"
    return GateError(f"the gate is not passed: {'; '.join(report['failures'])}", where=artifact, fix=fix)


def _precision(artifact: Path) -> str:
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest.get("options", {}).get("target", {}).get("precision", "unknown"))


def failures(report: dict[str, Any], limits: Limits) -> list[str]:
    """Each limit that the numbers miss, in words: `kld_mean 0.35 is over 0.05`."""
    found = []
    for name, value, most in (
        ("kld_mean", report["kld_mean"], limits.kld_mean),
        ("kld_p99", report["kld_p99"], limits.kld_p99),
        ("perplexity_ratio", report["perplexity"]["ratio"], limits.perplexity_ratio),
    ):
        if not value <= most:  # a NaN fails too
            found.append(f"{name} {value:.4g} is over {most:g}")
    if not report["top1_agreement"] >= limits.top1_agreement:
        found.append(f"top1_agreement {report['top1_agreement']:.4g} is under {limits.top1_agreement:g}")
    return found


class Graph:
    """The artifact's graph on plain ONNX Runtime, which gives the logits of every position."""

    def __init__(self, artifact: Path, config: dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(artifact / config["model"]["decoder"]["filename"]),
            options,
            providers=["CPUExecutionProvider"],
        )
        self._heads, self._head_size = (
            config["model"]["decoder"]["num_key_value_heads"],
            config["model"]["decoder"]["head_size"],
        )
        self._inputs = {found.name for found in self._session.get_inputs()}
        self._past = sorted(name for name in self._inputs if name.startswith("past_key_values."))
        self.vocabulary = int(config["model"]["vocab_size"])

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits (S, V), float32, of one row of S tokens."""
        import torch

        return torch.from_numpy(self.run(ids, None)[0][0])

    def run(self, ids: Sequence[int], past: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """One step: logits (1, S, V) and the new KV cache, each (1, heads, length, head size), in the order of the inputs."""
        import numpy as np

        empty = np.zeros((1, self._heads, 0, self._head_size), np.float32)
        cache = dict(zip(self._past, past or [empty] * len(self._past), strict=True))
        before = next(iter(cache.values())).shape[2]
        feed: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, before + len(ids)), np.int64),
            **cache,
        }
        if "position_ids" in self._inputs:
            feed["position_ids"] = np.arange(before, before + len(ids), dtype=np.int64)[None]
        logits, *present = self._session.run(
            ["logits", *(name.replace("past_key_values", "present") for name in self._past)], feed
        )
        return logits, present


def _merged_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


class _Scores:
    """Sums over positions; one number a position is kept, for the percentiles."""

    def __init__(self) -> None:
        self._kld: list[float] = []
        self._agree = 0
        self._loss = [0.0, 0.0]

    def add(self, wanted: torch.Tensor, found: torch.Tensor, row: Encoded) -> None:
        """Compare logits (S, V) of one row where its next token carries loss."""
        import torch

        at = torch.tensor([i - 1 for i in range(1, len(row.ids)) if row.learned[i]])
        targets = torch.tensor([row.ids[i] for i in range(1, len(row.ids)) if row.learned[i]])
        for part, target in zip(at.split(_CHUNK), targets.split(_CHUNK), strict=True):
            p, q = wanted[part].log_softmax(-1), found[part].log_softmax(-1)
            self._kld += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()
            self._agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            for which, scores in enumerate((p, q)):
                self._loss[which] -= float(scores.gather(-1, target[:, None]).sum())

    def mean(self) -> float:
        """Mean KL divergence so far, in nats."""
        return sum(self._kld) / len(self._kld)

    def summary(self) -> dict[str, Any]:
        """The numbers of the report."""
        import numpy as np

        count = len(self._kld)
        merged, artifact = (
            math.exp(min(loss / count, 700.0)) if math.isfinite(loss) else math.inf for loss in self._loss
        )
        if not math.isfinite(merged):
            raise EdgetuneError(
                "the merged model's logits are not finite numbers", fix="train again with a lower train.learning_rate"
            )
        if not (math.isfinite(artifact) and all(map(math.isfinite, self._kld))):
            raise GateError(
                "the artifact's logits are not finite numbers", fix="choose another target, such as cpu-int8"
            )
        return {
            "kld_mean": self.mean(),
            "kld_median": float(np.median(self._kld)),
            "kld_p99": float(np.percentile(self._kld, 99)),
            "kld_max": max(self._kld),
            "top1_agreement": self._agree / count,
            "perplexity": {"merged": merged, "artifact": artifact, "ratio": artifact / merged},
            "tokens": count,
        }


def _greedy(
    model: Any, graph: Graph, prompt: dict[str, Any], tokens: int, tokenizer: Any, stops: set[int]
) -> dict[str, Any]:
    """Greedy answers of both models to a golden prompt, and where they part."""
    import torch

    wanted: list[int] = []
    found: list[int] = []
    with torch.inference_mode():
        ids, cache = torch.tensor([prompt["ids"]]), None
        while len(wanted) < tokens and not (wanted and wanted[-1] in stops):
            step = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            wanted.append(int(step.logits[0, -1].argmax()))
            ids = torch.tensor([wanted[-1:]])
    past, feed = None, list(prompt["ids"])
    while len(found) < tokens and not (found and found[-1] in stops):
        logits, past = graph.run(feed, past)
        found.append(int(logits[0, -1].argmax()))
        feed = found[-1:]
    same = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
    return {
        "prompt": prompt["messages"][-1]["content"],
        "divergent_at": same,
        "tokens": len(wanted),
        "merged": tokenizer.decode(wanted, skip_special_tokens=True),
        "artifact": tokenizer.decode(found, skip_special_tokens=True),
    }
