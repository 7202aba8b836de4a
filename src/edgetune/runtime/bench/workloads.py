"""What is measured: named pieces of work, and how they fit into an artifact's context.

Names are llama-bench's: `pp512` reads a prompt of 512 tokens, `tg128` writes 128 tokens one after the other, `@d1024`
says that 1,024 tokens stand in the context already, `x4` that four rows are worked at together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgetune.errors import InputError
from edgetune.recipe import BenchOptions, BenchSection

NAMES = "ppN, tgN, ppN+tgM, chat, copy, standard"
STANDARD = ("pp512", "tg128", "chat", "copy")
STANDARD_DEPTHS = (0, 1024, 4096)
_DRAWN = re.compile(r"(?:pp(\d{1,7}))?(\+)?(?:tg(\d{1,7}))?(?:@d(\d{1,7}))?")


class DoesNotFit(InputError):
    """A workload that the context does not hold."""


@dataclass(frozen=True)
class Workload:
    """One piece of work.

    Attributes:
        kind: `drawn`: prompt, new tokens or both on drawn prompts of an exact length; `chat`: four turns, each answer
            part of the next prompt; `copy`: an answer that quotes its prompt; `file`: your own prompts.
        prompt: tokens that are read and timed; 0: only writing is.
        new: tokens that are written and timed: all of them on drawn prompts, else at most so many; 0: only reading is.
        depth: tokens in the context before the clock starts.
        batch: rows worked at together.
        file: prompts of `file`.
    """

    kind: Literal["drawn", "chat", "copy", "file"]
    prompt: int = 0
    new: int = 0
    depth: int = 0
    batch: int = 1
    file: str | None = None

    @property
    def name(self) -> str:
        """As it stands in tables and reports."""
        if self.kind != "drawn":
            return "prompts" if self.kind == "file" else self.kind
        parts = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.new}"] * (self.new > 0)
        depth = f"@d{self.depth}" if self.depth else ""
        return "+".join(parts) + depth + (f" x{self.batch}" if self.batch > 1 else "")

    @property
    def through_session(self) -> bool:
        """Answered as `chat` and `serve` answer, rather than on the bare generator."""
        return self.kind != "drawn"

    @property
    def length(self) -> int:
        """Tokens of context that a drawn one needs: reading ends with a token that is sampled, writing begins with one."""
        return max(self.depth + self.prompt, 1) + (max(self.new, 1) if self.prompt else self.new + 1)


def parse(
    names: Sequence[str], depths: Sequence[int], batches: Sequence[int], prompts: str | None, section: BenchSection
) -> list[Workload]:
    """The work that is asked for, in order, none twice.

    Args:
        names: of workloads; none: `prompts`, or one prompt and its answer of the section's lengths.
        depths, batches: every drawn workload is measured at each; none: at depth 0 (`standard`: 0, 1,024, 4,096), and
            one row.
        prompts: a file of prompts.
        section: lengths of what has none of its own.

    Raises:
        InputError: an unknown name, or a depth or batch that nothing is measured at.
    """
    found: list[Workload] = []
    for name in names:
        if name == "standard":
            for part in STANDARD:
                found += _spread(_one(part, section), depths or STANDARD_DEPTHS, batches)
        else:
            found += _spread(_one(name, section), depths, batches)
    if prompts is not None:
        found.append(Workload("file", new=section.new_tokens, file=prompts))
    if not found:
        found = _spread(Workload("drawn", section.prompt_tokens, section.new_tokens), depths, batches)
    if (depths or any(size > 1 for size in batches)) and all(work.through_session for work in found):
        raise InputError("depths and batches are for ppN and tgN", where="workloads", fix="name one of those")
    return sorted(dict.fromkeys(found), key=lambda work: work.through_session)


def check_guessing(works: Sequence[Workload], options: BenchOptions) -> None:
    """Raise InputError where guessing ahead is asked for, and nothing goes through a session."""
    asked = {"speculation": options.speculation != "auto", "exact": options.exact}
    for name, given in asked.items():
        if given and not any(work.through_session for work in works):
            raise InputError(
                "is for chat, copy and prompts; other work is decoded one by one", where=name, fix="name one of those"
            )


def _one(name: str, section: BenchSection) -> Workload:
    if name in ("chat", "copy"):
        return Workload("chat" if name == "chat" else "copy", new=section.new_tokens)
    match = _DRAWN.fullmatch(name)
    prompt, both, new, depth = match.groups() if match else (None, None, None, None)
    if not match or (prompt is None and new is None) or bool(both) != bool(prompt and new):
        raise InputError(f"there is no workload {name!r}", where="workloads", fix=f"take {NAMES}, such as pp512,tg128")
    work = Workload("drawn", int(prompt or 0), int(new or 0), int(depth or 0))
    if (prompt and not work.prompt) or (new and not work.new):
        raise InputError(f"{name} measures nothing", where="workloads", fix="take lengths from 1")
    return work


def _spread(work: Workload, depths: Sequence[int], batches: Sequence[int]) -> list[Workload]:
    if work.through_session:
        return [work]
    at = [work.depth] if work.depth else list(depths or (0,))
    return [replace(work, depth=depth, batch=batch) for depth in at for batch in batches or (1,)]


def fitted(works: Sequence[Workload], context: int, where: str) -> tuple[list[Workload], list[str]]:
    """The work as far as it fits into a context, and what was cut or left out.

    Depths are cut to what the context holds; prompt and answer are not. What goes through a session shows its length later.

    Raises:
        DoesNotFit: nothing of it does.
        InputError: nothing is left: several rows cannot be read behind others (ONNX Runtime GenAI takes the prompts of a
            batch in one call).
    """
    found: list[Workload] = []
    notes: list[str] = []
    missed: list[DoesNotFit] = []
    for work in works:
        if work.kind == "drawn":
            bare = replace(work, depth=0)
            if bare.length > context:
                what = f"{bare.name} needs a context of {bare.length:,} tokens, the artifact's holds {context:,}"
                fix = "take fewer prompt tokens or new tokens, or export with a larger export.max_length"
                missed.append(DoesNotFit(what, where=where, fix=fix))
                notes.append(left_out(work.name, what))
                continue
            if work.length > context:
                depth = context - (work.length - work.depth)
                cut = replace(work, depth=depth)
                notes.append(
                    f"{work.name} was not measured: the artifact's context holds {context:,} tokens, so the depth is "
                    f"{depth:,}, not {work.depth:,} ({cut.name} in its place)"
                )
                work = cut
            if work.batch > 1 and work.depth and work.prompt:
                notes.append(
                    f"{work.name} is left out: a batch reads its prompts in one call, so nothing can stand before"
                )
                continue
        if work not in found:
            found.append(work)
    if not found and missed:
        raise missed[0]
    if not found:
        raise InputError(notes[-1], where="workloads", fix="measure ppN with a batch at depth 0, or tgN at a depth")
    return found, notes


def left_out(name: str, why: str) -> str:
    """The note on a workload that was asked for beside others, and is not measured."""
    return f"{name} was not measured: {why}"
