"""The model card of an encoder's or a sequence-to-sequence model's artifact."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets import Target
from edgetune.runtime.plain.description import SEQ2SEQ, Description

_USE = {
    "feature-extraction": 'vectors = model.encode(["A text.", "Another one."])  # (2, {dimensions}) float32',
    "text-classification": 'print(model.classify(["A text."])[0].label)',
    "token-classification": 'print(model.tag(["A text."])[0])',
    "question-answering": 'print(model.answer("A question?", "A text that holds the answer.").text)',
    SEQ2SEQ: 'print(model.generate("A text.", max_tokens=64).text)',
}


def card(*, name: str, base: dict[str, Any], target: Target, description: Description, report: dict[str, Any]) -> str:
    """Markdown with front matter in the hub's format.

    Args:
        name: the artifact's name.
        base: `id`, `revision`, `license` of the model.
        target: what it was exported for.
        description: what the runtime is told of it.
        report: the export's, as far as it is known.
    """
    license_name = base.get("license")
    lines = ["---", "library_name: onnxruntime", f"pipeline_tag: {description.task}", "tags: [onnx, edgetune]"]
    if base.get("source") in ("hub", "package"):
        lines.append(f"base_model: {base.get('upstream') or base['id']}")
    if license_name:
        lines.append(f"license: {license_name.lower()}")
    revision = f" at `{base['revision']}`" if base.get("revision") else ""
    use = _USE[description.task].replace("{dimensions}", str(description.dimensions))
    lines += [
        "---",
        "",
        f"# {name}",
        "",
        f"`{base['id']}`{revision} for {description.task}, exported by edgetune. {target.description}",
        "",
        "```python",
        "from edgetune.runtime import load  # pip install edgetune",
        "",
        'with load("PATH/TO/THIS/FOLDER") as model:',
        f"    {use}",
        "```",
        "",
        "## What was measured",
        "",
        *_numbers(report),
        "",
        "## What it needs",
        "",
        f"{target.needs} Texts have up to {description.max_length:,} tokens"
        + (f", answers up to {description.max_answer:,}." if description.task == SEQ2SEQ else "."),
        "",
        *_aside(report),
        "## Where it comes from",
        "",
        "`manifest.json` has the SHA-256 of each file and the chain back to the model. Licence: "
        + (f"{license_name}, as the model's." if license_name else "that of the model."),
    ]
    return "\n".join(lines) + "\n"


def measures(compared: dict[str, Any]) -> list[tuple[str, str]]:
    """What a comparison found, for people."""
    rows = [("compared with the model on", f"{compared['texts']} texts, {compared['tokens']:,} tokens")]
    if "cosine_mean" in compared:
        rows.append(
            (
                "cosine of a text's vectors, mean / least",
                f"{compared['cosine_mean']:.5f} / {compared['cosine_min']:.5f}",
            )
        )
    if "kld_mean" in compared:
        rows.append(("KL divergence, mean / largest", f"{compared['kld_mean']:.5f} / {compared['kld_max']:.4f} nats"))
        rows.append(("best one agrees", f"{compared['top1_agreement']:.1%}"))
    if "greedy_agreement" in compared:
        rows.append(("answers that are the same, token for token", f"{compared['greedy_agreement']:.0%}"))
    return [*rows, ("largest difference of two numbers", f"{compared['difference']:.1e} of 1 + the largest")]


def _numbers(report: dict[str, Any]) -> list[str]:
    if "compared" not in report:
        return ["Nothing yet."]
    gate = "passed" if not report["failures"] else "NOT PASSED: " + "; ".join(report["failures"])
    rows = [*measures(report["compared"]), ("gate", gate)]
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def _aside(report: dict[str, Any]) -> list[str]:
    if not (found := report.get("left_aside")):
        return []
    return [
        f"Answers are greedy. The model's generation_config.json asks for more, which is not done: {', '.join(found)}.",
        "",
    ]
