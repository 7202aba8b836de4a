"""The gate: the artifact against the merged model, on held-out rows of the user's own data.

Both models read the same rows; wherever loss falls, their next-token distributions are compared in float32. Logits
are used row by row and thrown away, so that no file of them ever exists. Either side may be what another tool made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune import progress
from edgetune.data.batch import Encoded, cut
from edgetune.errors import GateError, InputError
from edgetune.export.graph_reader import CONFIG, Graph
from edgetune.export.readers import Reader, ends, greedy, is_graph, longest, open_reader, pieces
from edgetune.export.scores import Place, Scores
from edgetune.export.tokens import CLASSES, Tokens
from edgetune.files import read_json, write_json
from edgetune.models import load_tokenizer
from edgetune.models.quiet import quiet
from edgetune.recipe import Limits, VerifySection
from edgetune.runtime.artifact import adapter_file
from edgetune.runtime.hardware import architecture
from edgetune.runtime.memory import peak_rss_mb, reset_peak
from edgetune.runtime.providers import named

__all__ = ["Graph", "failures", "gate_error", "verify"]

_ENOUGH = 200  # tokens under which one or two disagreements decide the gate
_SAME_TOKENS = 0.99  # share of the vocabulary under which it is another one
_BASE_ROWS = 8  # on which a base with no adapter on is compared: its gate is the adapter's
_CONTEXT = 24  # tokens before a worst place that are shown


def verify(
    artifact: Path,
    merged: Path,
    rows: Sequence[Encoded],
    section: VerifySection,
    out: Path,
    *,
    provider: str = "cpu",
    trust_remote_code: bool = False,
    places: Sequence[str] | None = None,
    adapter: str | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Compare an artifact with the model that it was made from, or any two models of one vocabulary.

    Args:
        artifact: folder with genai_config.json, or a transformers folder. Hashes, where there are any, are verified.
        merged: the model that it is compared with, of either kind.
        rows: encoded held-out rows.
        section: the recipe's `verify`.
        out: existing folder for report.json.
        provider: where the artifact runs, as targets have it.
        trust_remote_code: run code that the merged model's folder brings.
        places: where each row stands, as file:line; its number when None.
        adapter: of an artifact that carries adapters, the name of the one that is compared; its base when None.
        base: transformers folder that the artifact without its adapters is compared with, on a few rows.

    Returns:
        The report: `kld_mean`, `kld_median`, `kld_p90` … `kld_max` (nats), `delta_p_rms`, `top1_agreement`,
        `perplexity.{merged,artifact,ratio,ratio_se}`, `tokens`, `by_position`, `by_token_class`, `worst`, `golden`
        (first divergent token of greedy generation), `device` (None for a transformers folder; `provider`: where it ran,
        `architecture`: of the processors that it was made for, `ran`: whether all of that is what it was made for, `shares` of its nodes by ONNX Runtime's providers), `limits`,
        `failures` and `passed`; where they are given `adapter` and `base` (`kld_mean`, `kld_p99`, `top1_agreement`,
        `tokens`), which has no limits.

    Raises:
        InputError: the two do not have the same vocabulary, one cannot be loaded, the provider is missing, no row has a
            token that carries loss, or the merged model's logits are not finite numbers.
        GateError: the artifact's are not.
    """
    reset_peak()
    started = time.monotonic()
    limit = min(longest(artifact), longest(merged))
    short = [(number, cut(row, limit)) for number, row in enumerate(rows[: section.rows])]
    used = [(number, row) for number, row in short if any(row.learned[1:])]
    if not used:
        raise InputError(
            "no held-out row has a token that carries loss",
            fix="give other rows (`--data`), or raise export.max_length",
        )
    prompts = _golden(artifact)
    golden = [prompt for prompt in prompts if len(prompt["ids"]) < limit]
    tokenizer = load_tokenizer(merged, trust_remote_code=trust_remote_code)
    warnings = _check_tokens(artifact, merged, tokenizer)
    if len(golden) < len(prompts):
        left = f"{len(prompts) - len(golden)} of {len(prompts)} golden prompts"
        warnings.append(f"{left} were left out: with an answer they do not fit the context of {limit} tokens")
    scores, answers = Scores((merged, artifact)), list[dict[str, Any]]()
    with progress.task("verify", len(used) + len(golden)) as bar, quiet():
        switched = None if adapter is None else adapter_file(adapter)
        found = open_reader(artifact, provider=provider, adapter=switched)
        step = _step(found, section.step, artifact)
        wanted = open_reader(merged, trust_remote_code=trust_remote_code)
        _check_width(found, wanted, artifact)
        for number, row in used:
            _add(scores, wanted, found, step, number, row)
            bar.advance(1, f"KL {scores.mean():.4f}")
        for prompt in golden:
            room = min(section.golden_tokens, limit - len(prompt["ids"]))
            answers.append(_greedy(wanted, found, prompt, room, tokenizer, set(ends(merged))))
            bar.advance(1)
        device = _device(artifact, found, provider)
        del found, wanted
    result = scores.summary()
    texts = Tokens(tokenizer, ends(merged))
    if result["tokens"] < _ENOUGH:
        few = f"only {result['tokens']} tokens were compared, too few to judge by"
        warnings.insert(0, f"{few}: hold out more rows (data.validation)")
    result |= {
        "by_position": scores.by_position(),
        "by_token_class": scores.by_class(texts.kind, CLASSES),
        "worst": [_told(place, texts, rows[place.row], places) for place in scores.worst()],
        "rows": len(used),
        "step": step,
        "kinds": {
            name: "onnx" if is_graph(p) else "weights" for name, p in (("merged", merged), ("artifact", artifact))
        },
        "precision": str(_target(artifact).get("precision", "unknown")),
        "device": device,
        "golden": answers,
        "limits": section.limits.model_dump(),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "warnings": warnings,
    }
    if adapter is not None:
        result["adapter"] = adapter
    if base is not None:
        result["base"] = _base(artifact, base, used[:_BASE_ROWS], section.step, trust_remote_code)
    result["failures"] = failures(result, section.limits)
    result["passed"] = not result["failures"]
    write_json(out / "report.json", result)
    return result


def _device(artifact: Path, found: Reader, provider: str) -> dict[str, Any] | None:
    """Where the artifact ran, and whether it was made for that."""
    if not isinstance(found, Graph):
        return None
    only = _target(artifact).get("architecture", "any")
    return {
        "provider": provider,
        "architecture": only,
        "ran": provider == named(read_json(artifact / CONFIG)) and only in ("any", architecture()),
        "shares": found.shares(),
    }


def _base(
    artifact: Path, base: Path, rows: Sequence[tuple[int, Encoded]], step: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    """How far an artifact with no adapter on is from its base."""
    scores = Scores((base, artifact))
    with progress.task("verify the base", len(rows)) as bar, quiet():
        found, wanted = open_reader(artifact), open_reader(base, trust_remote_code=trust_remote_code)
        for number, row in rows:
            _add(scores, wanted, found, _step(found, step, artifact), number, row)
            bar.advance(1, f"KL {scores.mean():.4f}")
    summary = scores.summary()
    return {name: summary[name] for name in ("kld_mean", "kld_p99", "top1_agreement", "tokens")}


def _add(scores: Scores, wanted: Reader, found: Reader, step: int | None, number: int, row: Encoded) -> None:
    """Compare a row, a piece at a time."""
    start = 0
    for p, q in zip(pieces(wanted, row.ids), pieces(found, row.ids, step), strict=True):
        scores.add(p, q, number, start, row.ids, row.learned)
        start += len(p)


def _step(reader: Reader, wanted: int | None, folder: Path) -> int | None:
    """Tokens that are fed to the artifact at once: as asked for, or one where its graph gives only the last logits."""
    if not isinstance(reader, Graph) or reader.most is None:
        return wanted
    if wanted not in (None, 1):
        raise InputError(
            f"its graph gives the logits of the last position only, so that {wanted} tokens at once cannot be compared",
            where=folder,
            fix="compare it token by token (--step 1), or make it without `prune_lm_head`",
        )
    if wanted is None:
        progress.say("note: the graph gives the logits of the last position only: it is fed token by token")
    return 1


def _check_width(found: Reader, wanted: Reader, artifact: Path) -> None:
    if wanted.vocabulary != found.vocabulary:
        raise InputError(
            f"the artifact has {found.vocabulary} tokens, the model {wanted.vocabulary}",
            where=artifact,
            fix="compare an artifact with the model that it was exported from (`--against`)",
        )


def _check_tokens(artifact: Path, merged: Path, tokenizer: Any) -> list[str]:
    """Refuse another vocabulary; returns what is to be said of small differences."""
    if not (artifact / "tokenizer.json").is_file():
        return []
    own = {number: text for text, number in load_tokenizer(artifact).get_vocab().items()}
    other = {number: text for text, number in tokenizer.get_vocab().items()}
    both = sorted(own.keys() & other.keys())
    differ = [number for number in both if own[number] != other[number]]
    if not both or len(differ) > (1 - _SAME_TOKENS) * len(both):
        first = f", first {differ[0]}: {own[differ[0]]!r} and {other[differ[0]]!r}" if differ else ""
        raise InputError(
            f"has another vocabulary than {merged.name}: {len(differ):,} of {len(both):,} tokens are different ones{first}",
            where=artifact,
            fix="compare it with the model that it was made from (`--against`)",
        )
    if differ:
        first = f"{differ[0]} is {own[differ[0]]!r} and {other[differ[0]]!r}"
        return [f"{len(differ)} tokens of the two vocabularies are different ones: {first}"]
    return []


def _told(place: Place, texts: Tokens, row: Encoded, places: Sequence[str] | None) -> dict[str, Any]:
    """A worst place as the report has it, with texts for token ids."""
    token = row.ids[place.position]
    return {
        "kld": place.kld,
        "where": places[place.row] if places else f"row {place.row + 1}",
        "position": place.position,
        "context": texts.join(row.ids[max(0, place.position - _CONTEXT) : place.position]),
        "next": {
            "id": token,
            "text": texts.text(token),
            "merged": place.next[0],
            "artifact": place.next[1],
        },
        **{
            name: [{"id": i, "text": texts.text(i), "probability": share} for i, share in likeliest]
            for name, likeliest in (("merged", place.wanted), ("artifact", place.found))
        },
    }


def gate_error(report: dict[str, Any], artifact: Path) -> GateError:
    """What is said, and what to try, when the gate is not passed."""
    ruined = report["kld_mean"] > 0.2 or report["top1_agreement"] < 0.8
    says = "at this precision it is another model than the one that was trained; " if ruined else ""
    if report["precision"] == "unknown":  # another tool made it
        says = "it is another model than the one that it is compared with; " if ruined else ""
        fix = f"{says}make it with more bits, or give limits (--limit NAME=VALUE) if this loss is acceptable to you"
    elif report["precision"] == "fp32":
        fix = f"{says}an export without rounding should pass: please report this model"
    else:
        more = "export.target=cpu-int8" if report["precision"] == "int4" else "export.target=cpu-fp32"
        fix = f"{says}choose more bits ({more}), or set verify.limits if this loss is acceptable to you"
    if report["tokens"] < _ENOUGH:
        fix = f"{report['warnings'][0]}; else {fix}"
    return GateError(f"the gate is not passed: {'; '.join(report['failures'])}", where=artifact, fix=fix)


def _target(artifact: Path) -> dict[str, Any]:
    """As edgetune's own manifest has it, else empty."""
    try:
        return dict(read_json(artifact / "manifest.json")["options"]["target"])
    except (InputError, KeyError, TypeError, ValueError):
        return {}


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


def _golden(artifact: Path) -> list[dict[str, Any]]:
    """The golden prompts of an artifact of edgetune's; what others made has none."""
    file = artifact / "golden.json"
    return list(read_json(file)["prompts"]) if is_graph(artifact) and file.is_file() else []


def _greedy(
    wanted: Reader, found: Reader, prompt: dict[str, Any], tokens: int, tokenizer: Any, stops: set[int]
) -> dict[str, Any]:
    """Greedy answers of both models to a golden prompt, and where they part."""
    merged = greedy(wanted, prompt["ids"], tokens, stops)
    artifact = greedy(found, prompt["ids"], tokens, stops)
    same = next((i for i, (a, b) in enumerate(zip(merged, artifact, strict=False)) if a != b), None)
    return {
        "prompt": prompt["messages"][-1]["content"],
        "divergent_at": same,
        "tokens": len(merged),
        "merged": tokenizer.decode(merged, skip_special_tokens=True),
        "artifact": tokenizer.decode(artifact, skip_special_tokens=True),
    }
