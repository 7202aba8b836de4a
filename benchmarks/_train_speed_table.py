"""What the runs of `train_speed.py` come to: medians, ratios, goals, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OURS = "edgetune"


@dataclass(frozen=True)
class Run:
    """One training in a process of its own.

    Attributes:
        side, round: who, and in which round.
        steps, tokens: of the training; tokens of the rows with their prompts, no padding.
        seconds: the steps alone: from the end of one to the end of the next, loading and validation left out.
        peak_mb: the largest resident memory of the whole process, 10^6 bytes.
        wall_s, cpu_s: of the whole process.
        others: cores that other programs (or the host) kept busy meanwhile.
        loss: validation loss of the adapter it wrote; None before the judge has been asked.
    """

    side: str
    round: int
    steps: int
    tokens: int
    seconds: float
    peak_mb: float
    wall_s: float
    cpu_s: float
    others: float
    loss: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of the steps."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Goal:
    """What is to be reached against one rival: at least `speed` times as fast with at most `memory` of its peak."""

    rival: str
    speed: float
    memory: float


GOALS = (Goal("trl", 6.0, 0.4), Goal("trl-tuned", 2.5, 1.0))
FRACTION_GOAL = 0.75
LOSS_MARGIN = 0.002  # nats; another order of the same rows ends as far off


def limit_tokens_per_s(parameters: int, gflops: float) -> float:
    """The arithmetic limit: 4 operations a parameter and token (forward 2, backward to the activations 2)."""
    return gflops * 1e9 / (4 * parameters)


def summary(runs: Sequence[Run], limit: float) -> dict[str, dict[str, Any]]:
    """For each side the medians over its rounds, the ranges, and how ours compares.

    Args:
        runs: of all sides and rounds.
        limit: tokens a second that arithmetic allows.

    Returns:
        By side: tokens_per_s, tokens_per_s_range, peak_mb, loss and loss_range (None unless judged), fraction (of
        `limit`), and where there are runs of ours: speedup (the median over the rounds that both have of ours over
        theirs) and memory (our peak over theirs).
    """
    found: dict[str, dict[str, Any]] = {}
    for side in dict.fromkeys(run.side for run in runs):
        mine = [run for run in runs if run.side == side]
        speeds, losses = [run.tokens_per_s for run in mine], [run.loss for run in mine if run.loss is not None]
        found[side] = {
            "tokens_per_s": statistics.median(speeds),
            "tokens_per_s_range": (min(speeds), max(speeds)),
            "peak_mb": statistics.median(run.peak_mb for run in mine),
            "loss": statistics.median(losses) if losses else None,
            "loss_range": (min(losses), max(losses)) if losses else None,
            "fraction": statistics.median(speeds) / limit,
        }
    ours = {run.round: run.tokens_per_s for run in runs if run.side == OURS}
    for side, said in found.items():
        pairs = [ours[run.round] / run.tokens_per_s for run in runs if run.side == side and run.round in ours]
        if pairs:
            said["speedup"] = statistics.median(pairs)
            said["memory"] = found[OURS]["peak_mb"] / said["peak_mb"]
    return found


def goals(found: dict[str, dict[str, Any]]) -> list[tuple[bool, str]]:
    """Each goal that the sides at hand decide: whether it is met, and in words."""
    said: list[tuple[bool, str]] = []
    if OURS not in found:
        return said
    ours = found[OURS]
    for goal in GOALS:
        if goal.rival not in found:
            continue
        rival = found[goal.rival]
        speed, memory = rival["speedup"], rival["memory"]
        said.append((speed >= goal.speed, f"{speed:.2f} times as fast as {goal.rival} (goal: {goal.speed:g})"))
        said.append((memory <= goal.memory, f"{memory:.0%} of the memory of {goal.rival} (goal: {goal.memory:.0%})"))
        if ours["loss"] is not None and rival["loss"] is not None:
            met = ours["loss"] <= rival["loss_range"][1] + LOSS_MARGIN
            theirs = f"{goal.rival} {_span(rival['loss_range'], '.4f')}"
            said.append((met, f"loss {ours['loss']:.4f}, {theirs} (goal: at most {LOSS_MARGIN:g} above)"))
    fraction = ours["fraction"]
    said.append((fraction >= FRACTION_GOAL, f"{fraction:.2f} of the arithmetic limit (goal: {FRACTION_GOAL})"))
    return said


def table(found: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    """The summary as a Markdown table that also reads well in a terminal.

    Args:
        found: of `summary`.
        titles: what a side is called in the table; its own name where none is given.
    """
    head = ["training", "tokens/s", "of the limit", "peak memory", "validation loss", "ours is faster", "our memory"]
    cells: list[list[str]] = []
    for side, said in found.items():
        rival = side != OURS and "speedup" in said
        cells.append(
            [
                titles.get(side, side),
                _with_range(said["tokens_per_s"], said["tokens_per_s_range"], ".0f"),
                f"{said['fraction']:.2f}",
                f"{said['peak_mb']:,.0f} MB",
                "" if said["loss"] is None else _with_range(said["loss"], said["loss_range"], ".4f"),
                f"{said['speedup']:.2f} times" if rival else "",
                f"{said['memory']:.0%}" if rival else "",
            ]
        )
    widths = [max(len(row[at]) for row in [head, *cells]) for at in range(len(head))]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in lines)


def _with_range(middle: float, span: tuple[float, float], form: str) -> str:
    said = _span(span, form)
    return f"{middle:{form}}" + (f" ({said})" if "to" in said else "")


def _span(span: tuple[float, float], form: str) -> str:
    low, high = (f"{value:{form}}" for value in span)
    return low if low == high else f"{low} to {high}"


def text(result: dict[str, Any], titles: dict[str, str]) -> str:
    """All that is printed: what was trained where, the table, what the terms mean, the goals."""
    work, cpu, load = result["work"], result["cpu"], result["versions"]
    train = work["train"]
    rounds = 1 + max(run["round"] for run in result["runs"])
    packages = ", ".join(f"{name} {load[name]}" for name in load)
    base = "not asked" if result["base_loss"] is None else f"{result['base_loss']:.4f}"
    products = ", ".join(f"{name} {value:.0f}" for name, value in result["products_gflops"].items())
    lines = [
        f"{result['date']}, {cpu['model']}, {cpu['usable_cores']:g} cores ({', '.join(cpu['instruction_sets'])}); "
        f"{packages}.",
        f"{work['model_id']}, {work['parameters'] / 1e6:.0f} million parameters; LoRA rank {work['rank']} on all linear "
        f"layers; {train['tokens']:,} tokens ({train['learned_tokens']:,} learned) in {_count(train['passes'], 'pass', 'es')} "
        f"over {train['rows']} rows of {train['shortest']} to {train['longest']} tokens, {work['batch_size']} rows a step, "
        f"learning rate {work['learning_rate']:g}; {_count(rounds, 'round')}"
        + (", medians, lowest and highest in brackets." if rounds > 1 else "."),
        "",
        table(result["summary"], titles),
        "",
        "tokens/s: tokens of the rows, prompts included and padding left out, over the time of the steps alone. Peak "
        "memory: resident, of the whole process. Loss: of the adapter written, on the "
        f"{work['validation']['learned_tokens']:,} learned tokens of {work['validation']['rows']} held-out rows, by "
        f"plain transformers and peft in float32 (base: {base}).",
        f"Limit: 4 x parameters operations a token at {result['gflops']:.0f} GFLOP/s is {result['limit']:.0f} tokens/s. "
        f"That is the fastest of the products measured between the rounds, in GFLOP/s: {products}.",
    ]
    busy = max(run["others"] for run in result["runs"])
    if busy > 0.1:
        lines.append(f"Other programs kept up to {busy:.1f} cores busy meanwhile: the speeds are too low.")
    lines += [f"{'met' if met else 'NOT MET'}: {said}" for met, said in result["goals"]]
    return "\n".join(lines) + "\n"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}" + (plural if number != 1 else "")
