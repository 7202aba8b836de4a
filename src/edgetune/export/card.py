"""The model card: `README.md` of an artifact, with the numbers that were measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from edgetune import progress
from edgetune.export.targets import Target
from edgetune.files import read_json, sha256_file, staged_folder, write_json, write_text
from edgetune.leases import holders
from edgetune.run import MANIFEST, read_manifest
from edgetune.runtime.artifact import NO_ADAPTER, adapter_file

_OVERFLOW = (
    " On an x86 processor without VNNI set its session option `session.x64quantprecision` to 1 there: without it 8-bit products "
    "overflow. edgetune sets it where it is needed."
)


def card(name: str, base: dict[str, Any], target: Target, reports: dict[str, dict[str, Any]]) -> str:
    """Markdown with front matter in the hub's format.

    Args:
        name: the artifact's name.
        base: `id`, `revision`, `license` of the base model.
        target: what it was exported for.
        reports: the stages' reports that exist: `train`, `export`, `verify`, `bench`.
    """
    license_name = base.get("license")
    front = [
        "---",
        "library_name: onnxruntime-genai",
        "pipeline_tag: text-generation",
        "tags: [onnx, edgetune]",
    ]
    if base.get("source") in ("hub", "package"):
        front.append(f"base_model: {base.get('upstream') or base['id']}")
    if license_name:
        front.append(f"license: {license_name.lower()}")
    lines = [*front, "---", "", f"# {name}", ""]
    lines += [
        f"`{base['id']}`"
        + (f" at `{base['revision']}`" if base.get("revision") else "")
        + f", fine-tuned and exported by edgetune. {target.description}",
        "",
    ]
    lines += [
        "```",
        "pip install edgetune",
        "edgetune chat PATH/TO/THIS/FOLDER",
        "```",
        "",
        "It loads unchanged in `onnxruntime-genai`, too." + (_OVERFLOW if _has_int8_products(target) else ""),
        "",
    ]
    lines += _adapters(reports)
    lines += ["## What was measured", "", *_numbers(reports), ""]
    lines += ["## What it needs", "", target.needs, "", *_rules(target, reports)]
    if export := reports.get("export"):
        lines += [
            f"Context: {export['max_length']} tokens, prompt and answer together (the model's own limit is "
            f"{export['model_context']}). Memory for the KV cache grows with it"
            + (", in 8 bits a number." if target.kv_cache == "int8" else "."),
            "",
        ]
    lines += [
        "## Where it comes from",
        "",
        "`manifest.json` has the SHA-256 of each file and the chain back to the base model and the data. "
        "Licence: " + (f"{license_name}, as the base model's." if license_name else "that of the base model."),
    ]
    return "\n".join(lines) + "\n"


def _rules(target: Target, reports: dict[str, dict[str, Any]]) -> list[str]:
    """What the target asks of an artifact: the gate's limits, and what the graph must not contain."""
    limits = reports.get("verify", {}).get("limits") or target.limits.model_dump()
    rules = target.graph
    kept = [
        f"opset {rules.opset} at most",
        f"operators of the domains {', '.join(rules.domains)} only",
        *([f"without {', '.join(rules.forbidden_ops)}"] if rules.forbidden_ops else []),
        *([f"without tensors of {', '.join(rules.forbidden_types)}"] if rules.forbidden_types else []),
        *(
            ["all shapes fixed, so a generator's max_length has to stay as genai_config.json has it"]
            if target.static
            else []
        ),
    ]
    return [
        _limits(limits),
        "",
        f"The graph was checked against its target: {'; '.join(kept)}.",
        "",
    ]


_LIMITS = "Limits of the gate: "


def _limits(limits: dict[str, Any]) -> str:
    return (
        f"{_LIMITS}mean KL divergence at most {limits['kld_mean']:g} nats, 99th percentile at most "
        f"{limits['kld_p99']:g}, the best token the same in {limits['top1_agreement']:.0%} of positions, perplexity at most "
        f"{limits['perplexity_ratio']:g} times the merged model's."
    )


def _has_int8_products(target: Target) -> bool:
    section = target.quantization
    if target.provider != "cpu" or section is None:
        return False
    plan = section.plan()
    return section.method == "auto" or any(
        grid.activations == "int8" for grid in (plan.default, *plan.modules.values())
    )


def _on_device(reports: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Whether the graph was run on what it is for, and which provider ran which share of its nodes."""
    device = reports.get("export", {}).get("device")
    if not device:
        return []
    if row := _ran(reports.get("verify", {})):
        return [row]
    if device["ran"]:  # the CPU says nothing of itself
        said = f"answered on {device['provider']} when it was exported; `edgetune verify` compares it there"
        return [] if device["provider"] == "cpu" else [(_UNSEEN, said)]
    rows = [(_UNSEEN, "checked, not run on the device: run `edgetune verify` there")]
    for file, shares in device.get("prepared", {}).items():
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        rows.append(
            (f"compiles for the device, {file}", f"nodes by provider: {parts}; compiled there at the first load")
        )
    if why := device.get("prepare_failed"):
        rows.append(("compiles for the device", f"no: {_cell(why)}"))
    if why := device.get("cpu_says"):
        rows.append(("run on the CPU in place of it", f"no: {_cell(why)}"))
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_UNSEEN, _SEEN = "on the device", "run on the device"


def _ran(verify: dict[str, Any]) -> tuple[str, str] | None:
    """What the card says once a comparison was made on what the artifact is for; None where none was."""
    device = verify.get("device")
    only = device.get("architecture", "any") if device else "any"
    if not device or not device["ran"] or (device["provider"] == "cpu" and only == "any"):
        return None
    parts = ", ".join(f"{name} {share:.0%}" for name, share in device["shares"].items())
    gate = "passed" if verify["passed"] else "NOT PASSED"
    return (
        _SEEN,
        f"yes, on {device['provider']}{'' if only == 'any' else f', {only}'}: KL mean {verify['kld_mean']:.4f} over {verify['tokens']} tokens, best token agrees "
        f"{verify['top1_agreement']:.1%}, gate {gate}; nodes by provider: {parts}",
    )


# The first and the last row of what a stage's report comes to in a card.
_ROWS = {"verify": ("KL divergence from the merged model", "gate"), "bench": ("measured on", "size on disk")}
_MEASURED = "## What was measured\n\n"


def stamp(
    artifact: Path, stage: Literal["verify", "bench"], report: dict[str, Any], *, only_device: bool = False
) -> None:
    """Put into an artifact's card what was measured, in place of what an earlier measurement said.

    Left alone: folders of other tools and other cards; with a line that says so, folders that cannot be written or that
    others use.

    Args:
        artifact: its folder.
        stage: what measured it.
        report: what it found.
        only_device: put in no more than that it was run on its device; as in a run, which writes its card itself.
    """
    artifact = artifact.resolve()
    file = artifact / "README.md"
    if not file.is_file() or not read_manifest(artifact):
        return
    text = file.read_text(encoding="utf-8")
    top, found, rest = text.partition(_MEASURED)
    section, mark, rest = rest.partition("\n## ")
    if not found or not mark:
        return
    rows = [line for line in section.splitlines() if line.startswith("| ") and line != "| | |"]
    if stage == "verify" and (row := _ran(report)):
        rows = [_line(row) if line.startswith((f"| {_UNSEEN} |", f"| {_SEEN} |")) else line for line in rows]
    if not only_device:
        rows = _without_rows(rows, stage)
        after = next((at for at, line in enumerate(rows) if line.startswith(f"| {_ROWS['bench'][0]} |")), len(rows))
        at = after if stage == "verify" else len(rows)
        new = _quality(report) if stage == "verify" else _speed({"bench": report})
        rows[at:at] = [_line(row) for row in new]
        if stage == "verify":
            rest = "".join(
                f"{_limits(report['limits'])}\n" if line.startswith(_LIMITS) else line
                for line in rest.splitlines(keepends=True)
            )
    if not rows:
        return
    new_text = f"{top}{_MEASURED}" + "\n".join([*_TABLE, *rows]) + f"\n{mark}{rest}"
    if new_text == text:
        return
    if Path.cwd().is_relative_to(artifact) or any(one.pid != os.getpid() for one in holders(artifact)):
        progress.say("note: the card was not changed, as its folder is in use")
        return
    try:
        rewrite_card(artifact, new_text)
    except OSError:
        progress.say("note: the card could not be changed, as its folder may not be written")


def _without_rows(rows: list[str], stage: str) -> list[str]:
    """The lines of a card's table without those of a stage."""
    first, last = (
        next((at for at, line in enumerate(rows) if line.startswith(f"| {start}")), None) for start in _ROWS[stage]
    )
    return rows if first is None or last is None else rows[:first] + rows[last + 1 :]


def keep_stamp(before: str, now: str) -> str:
    """A new card of the same artifact, with what an earlier one says of a run on the device where this one knows of none."""
    seen = next((line for line in before.splitlines(keepends=True) if line.startswith(f"| {_SEEN} |")), None)
    lines = now.splitlines(keepends=True)
    return now if seen is None else "".join(seen if line.startswith(f"| {_UNSEEN} |") else line for line in lines)


def _numbers(reports: dict[str, dict[str, Any]]) -> list[str]:
    rows = _on_device(reports)
    if missed := reports.get("export", {}).get("failures"):
        rows.append(("what was asked of the export", "NOT REACHED: " + "; ".join(missed)))
    if train := reports.get("train"):
        before, after = train["validation"]["before"], train["validation"]["after"]
        rows.append(("validation loss, before → after training", f"{before['loss']:.3f} → {after['loss']:.3f}"))
    if verify := reports.get("verify"):
        rows += _quality(verify)
    if reports.get("bench"):
        rows += _speed(reports)
    if not rows:
        return ["Nothing yet: run `edgetune verify` and `edgetune bench` on this folder."]
    return [*_TABLE, *map(_line, rows)]


_TABLE = ("| | |", "|---|---|")


def _line(row: tuple[str, str]) -> str:
    return f"| {row[0]} | {row[1]} |"


def _quality(verify: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "KL divergence from the merged model, mean / p99",
            f"{verify['kld_mean']:.4f} / {verify['kld_p99']:.4f} nats",
        ),
        *((("adapter that was on", verify["adapter"]),) if "adapter" in verify else ()),
        ("best token agrees", f"{verify['top1_agreement']:.1%} of {verify['tokens']} positions"),
        (
            "perplexity, merged → artifact",
            f"{verify['perplexity']['merged']:.3f} → {verify['perplexity']['artifact']:.3f}",
        ),
        *_without(verify),
        ("gate", "passed" if verify["passed"] else "NOT PASSED: " + "; ".join(verify["failures"])),
    ]


def _speed(reports: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    bench = reports["bench"]
    machine = bench.get("hardware", {}).get("cpu", {})
    return [
        (
            "measured on",
            f"{machine.get('model', 'a CPU')}, {bench.get('threads', '?')} threads"
            if isinstance(machine, dict)
            else str(machine),
        ),
        (
            f"time to first token, {bench['prompt_tokens']} prompt tokens",
            f"{bench['ttft_ms']['p50']:.0f} ms",
        ),
        ("prefill", f"{bench['prefill_tokens_per_s']['p50']:.0f} tokens/s"),
        ("decode", f"{bench['decode_tokens_per_s']['p50']:.1f} tokens/s"),
        *(("slower here", said) for said in slower(reports)),
        *_cost(bench),
        ("peak memory of the process", f"{bench['peak_rss_mb']:.0f} MB"),
        ("size on disk", f"{bench['size_mb']:.1f} MB"),
    ]


def slower(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The rates that `auto` was asked for and the bench did not measure, in words. Other programs make a measurement slower, so
    that this fails nothing."""
    asked = (reports.get("export", {}).get("quantization") or {}).get("auto", {}).get("limits", {})
    bench = reports.get("bench") or {}
    return [
        f"{rate.partition('_')[0]} {bench[rate]['p50']:.1f} tokens/s, under the {asked[rate]:g} that was asked for"
        for rate in ("decode_tokens_per_s", "prefill_tokens_per_s")
        if rate in asked and rate in bench and bench[rate]["p50"] < asked[rate]
    ]


def _adapters(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What adapters there are, and how they are switched on."""
    found = reports.get("export", {}).get("adapters")
    if not found:
        return []
    names = list(found)
    alone = f"It is on unless `{NO_ADAPTER}` is asked for." if len(names) == 1 else "None is on unless it is named."
    rows = [f"| `{name}` | {told['rank']} | {', '.join(told['layers'])} |" for name, told in found.items()]
    return [
        "## Adapters",
        "",
        f"The weights are the base's; adapters lie beside them and are switched on by name. {alone}",
        "",
        "| adapter | rank | layers |",
        "|---|---|---|",
        *rows,
        "",
        "```",
        f'edgetune generate PATH/TO/THIS/FOLDER "Hello" --adapter {names[0]}',
        "```",
        "",
        "```python",
        "adapters = onnxruntime_genai.Adapters(model)",
        f'adapters.load("{adapter_file(names[0])}", "{names[0]}")',
        f'generator.set_active_adapter(adapters, "{names[0]}")  # before the prompt; without it the base answers',
        "```",
        "",
    ]


def _without(verify: dict[str, Any]) -> list[tuple[str, str]]:
    base = verify.get("base")
    if not base:
        return []
    says = (
        f"{base['kld_mean']:.4f} nats, best token agrees in {base['top1_agreement']:.1%} of {base['tokens']} positions"
    )
    return [("KL divergence of the base without an adapter, mean", says)]


def _cost(bench: dict[str, Any]) -> list[tuple[str, str]]:
    """What it costs that the adapter is not merged."""
    adapter, comparison = bench.get("target", {}).get("adapter"), bench.get("comparison")
    if not adapter or not comparison:
        return []
    parts = [
        f"{found['what']} {comparison['report'][found['what'] + '_tokens_per_s']['p50']:,.1f} tokens/s; with it beside the "
        f"weights {found['value']:.2f} times as fast"
        for found in comparison["ratios"]
    ]
    return [("were the adapter merged", ", ".join(parts))]


def rewrite_card(artifact: Path, text: str) -> None:
    """Put a new card into a finished artifact, card and manifest together: the folder is replaced as a whole."""
    if (artifact / "README.md").read_text(encoding="utf-8") == text:
        return
    with staged_folder(artifact) as staged:
        for file in artifact.iterdir():
            if file.name not in ("README.md", MANIFEST):
                try:
                    os.link(file, staged / file.name)
                except OSError:  # a file system without links
                    shutil.copy2(file, staged / file.name)
        write_text(staged / "README.md", text)
        manifest = read_json(artifact / MANIFEST)
        manifest["outputs"]["README.md"] = {
            "sha256": sha256_file(staged / "README.md"),
            "bytes": len(text.encode()),
        }
        write_json(staged / MANIFEST, manifest)
