"""The same benchmark over HTTP, of any OpenAI-compatible service: ours, llama-server, Ollama, vLLM.

What a client sees: time to first token from the request to the first piece of text, time per output token from the
service's own count of tokens. Where it counts none, pieces are taken for tokens, and the report says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgetune import progress
from edgetune.errors import InputError
from edgetune.files import digest
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench.burst import Level, Reply, Talks, take_turns
from edgetune.runtime.bench.client import Answer, Service, ask, checked, connect
from edgetune.runtime.bench.measure import writable, write
from edgetune.runtime.bench.prompts import quoted, read_prompts
from edgetune.runtime.bench.report import (
    FORMAT,
    cached_share,
    machine_now,
    noise,
    per_token,
    quoted_share,
    summaries,
    top,
)
from edgetune.runtime.bench.sample import sha256
from edgetune.runtime.bench.schedule import Rounds
from edgetune.runtime.bench.watch import MemoryCurve
from edgetune.runtime.bench.workloads import DoesNotFit, Workload, left_out, parse
from edgetune.runtime.hardware import hardware, load_average, versions

_MOST_CLIENTS = 1024


def bench_url(
    url: str,
    model: str | None,
    clients: Sequence[int],
    section: BenchSection,
    out: Path | None = None,
    options: BenchOptions | None = None,
    timeout_s: float = 300.0,
) -> dict[str, Any]:
    """Measure a service.

    Args:
        url, model: see `client.connect`.
        clients: numbers of clients that ask at once, each `section.repetitions` rounds; measured in this order.
        section: words of a prompt (about as many tokens), most tokens of an answer, rounds.
        options: `workloads`: of ppN N words are sent, of tgN at most N tokens asked for, with `depths` behind so many
            words; `prompts`: your own, which the clients share out in each round.
        timeout_s: how long the service may say nothing.

    Returns:
        The report, as `schema.json` describes it, an entry for each workload and number of clients.

    Raises:
        InputError: no service there, or none that is OpenAI-compatible; a number of clients out of range; other work
            than a service can be given.
        EdgetuneError: it gives no answer.
    """
    writable(out)
    works = asked_of_services(clients, section, options)
    report = measured_services([connect(url, model, timeout_s)], clients, works, section)[0]
    write(report, out)
    return report


def asked_of_services(clients: Sequence[int], section: BenchSection, options: BenchOptions | None) -> list[Workload]:
    """What services are asked for. Raises InputError where it is nothing that they can be given."""
    options = options or BenchOptions()
    for count in clients:
        if not 1 <= count <= _MOST_CLIENTS:
            raise InputError(f"must be 1 to {_MOST_CLIENTS}, not {count}", where="concurrency")
    depths = options.depths or ((0,) if "standard" in options.workloads else ())
    works = parse(options.workloads, depths, (), options.prompts, section)
    if any(work.depth and work.prompt for work in works):
        raise InputError(
            "a service reads a request as a whole, so reading behind a depth cannot be timed",
            where="workloads",
            fix="take depths with tgN only, and a longer prompt such as pp1024",
        )
    if any(work.file for work in works):
        read_prompts(Path(str(options.prompts)))  # what is wrong with them is said before anything is asked
    return works


def measured_services(
    services: Sequence[Service], clients: Sequence[int], works: Sequence[Workload], section: BenchSection
) -> list[dict[str, Any]]:
    """Reports of services; of several, each round is asked of one after the other, in changing order.

    Raises:
        DoesNotFit: one of them refuses all of it; of several workloads those that are refused are left out.
        EdgetuneError: one of them gives no answer.
    """
    before, machine = load_average(), hardware()
    talks = {work: Talks(work) for work in works}
    counts = list(dict.fromkeys(clients))
    requests = section.repetitions * sum(talks[work].requests(count) for work in works for count in counts)
    with progress.task("bench", total=len(services) * (section.warmup + requests)) as shown:
        ready = [_warmed(service, [talks[work] for work in works], section, shown) for service in services]
        pids = [_listener(service.base) for service in ready]
        curves = [MemoryCurve(pid) if pid else None for pid in pids]
        levels: list[list[Level]] = [[] for _ in ready]
        missed: dict[str, DoesNotFit] = {}
        for work in works:
            for count in counts:
                for curve in filter(None, curves):
                    curve.mark(_name(work, count))
                asked = list(zip(ready, pids, strict=True))
                try:
                    turns = take_turns(asked, talks[work], count, section.repetitions, shown)
                except DoesNotFit as error:
                    missed[_name(work, count)] = error
                    continue
                for kept, level in zip(levels, turns, strict=True):
                    kept.append(level)
    if not levels[0]:
        raise next(iter(missed.values()))
    notes = [left_out(name, error.what) for name, error in missed.items()]
    around = {"hardware": machine_now(machine), "load_average": {"before": before, "after": load_average()}}
    return [
        _report(service, found, section, around, [curve.stop()] if curve else [], notes)
        for service, found, curve in zip(ready, levels, curves, strict=True)
    ]


def _warmed(service: Service, talks: Sequence[Talks], section: BenchSection, shown: progress.Task) -> Service:
    """Ask once at least, so that a service that cannot answer is told of before it is measured.

    It is asked for the first of the workloads that it takes.
    """
    for number in range(max(1, section.warmup)):
        for asked in talks:
            try:
                while (other := _asked_once(service, asked, number)) is not None:
                    service = other
            except DoesNotFit:
                if asked is talks[-1]:
                    raise
            else:
                break
        if section.warmup:
            shown.advance()
    return service


def _asked_once(service: Service, asked: Talks, number: int) -> Service | None:
    return checked(service, ask(service, asked.warmup(number), asked.new), asked.work.name)


def _report(
    service: Service,
    levels: Sequence[Level],
    section: BenchSection,
    around: dict[str, Any],
    memory: list[dict[str, Any]],
    notes: list[str],
) -> dict[str, Any]:
    entries, samples = [], []
    for level in levels:
        entry, rounds = _entry(level)
        entries.append(entry)
        samples += [{"workload": entry["name"], "round": n, **s} for n, part in enumerate(rounds, 1) for s in part]
    answers = [reply.answer for level in levels for part in level.rounds for reply in part]
    energies = [entry["energy_j"] for entry in entries]
    return {
        "format": FORMAT,
        "artifact": service.model,
        "target": {"kind": "http", "url": service.base, "model": service.model},
        **dict.fromkeys(("files", "size_mb", "verify_s", "load_s", "threads", "load")),
        "warmup": section.warmup,
        "repetitions": section.repetitions,
        **top(entries),
        "peak_rss_mb": max((mb for part in memory for _, mb in part["points"]), default=None),
        **dict.fromkeys(("peak_pss_mb", "read_bytes_per_step")),
        "energy_j": None if None in energies else round(sum(energies), 3),
        "tokens": sum(entry["tokens"] for entry in entries),
        "tokens_sha256": digest([answer.text for answer in answers]),
        "device_profile": None,
        **around,
        "bandwidth_gb_s": None,
        "versions": versions(),
        "quality": None,
        "siblings": [],
        "workloads": entries,
        "memory": memory,
        "samples": samples,
        "warnings": [*notes, *_notes(answers, levels), *noise(entries, around["hardware"]["cpu"]["logical_cores"])],
        **dict.fromkeys(("scaling", "stress", "comparison")),
    }


def _name(work: Workload, count: int) -> str:
    return f"{work.name}, {count} client{'s' * (count != 1)}"


def _entry(level: Level) -> tuple[dict[str, Any], Rounds]:
    kind = level.work.kind
    rounds = [[_sample(reply, level.work) for reply in part if reply.answer.error is None] for part in level.rounds]
    answers = [reply.answer for part in level.rounds for reply in part]
    good = [answer for answer in answers if answer.error is None]
    failed = [answer.error for answer in answers if answer.error]
    tokens = sum(_tokens(answer) for answer in good)
    counts = [answer.prompt_tokens for answer in good if answer.prompt_tokens]
    lengths = sorted(_tokens(answer) for answer in good)
    return {
        "name": _name(level.work, level.clients),
        "kind": "http" if kind == "drawn" else kind,
        "prompt_tokens": sorted(counts)[len(counts) // 2] if counts else None,
        "new_tokens": lengths[len(lengths) // 2],
        "depth": level.work.depth,
        "batch": 1,
        "concurrency": level.clients,
        "rounds": len(rounds),
        "requests": len(answers),
        "errors": len(failed),
        "error": failed[0] if failed else None,
        **summaries(rounds),
        "total_tokens_per_s": round(tokens / level.wall_s, 3),
        "requests_per_s": round(len(good) / level.wall_s, 4),
        "tokens": tokens,
        "tokens_sha256": digest([answer.text for answer in good]),
        "peak_rss_mb": None,
        "peak_pss_mb": None,
        **level.meter,
        "energy_j_per_token": per_token(level.meter["energy_j"], tokens),
        "bandwidth_share": None,
        "cached": cached_share(rounds),
        "quoted": quoted_share(rounds),
    }, rounds


def _tokens(answer: Answer) -> int:
    return answer.completion_tokens or len(answer.stamps) or 1


def _sample(reply: Reply, work: Workload) -> dict[str, Any]:
    answer = reply.answer
    reads = work.kind != "drawn" or work.prompt  # of tgN, what is read before is not timed
    first = answer.stamps[0] - answer.sent if answer.stamps and reads else None
    tokens, writing = _tokens(answer), answer.stamps[-1] - answer.stamps[0] if answer.stamps else 0.0
    tpot = writing / (tokens - 1) if tokens > 1 and writing else None
    found = {
        "client": reply.client,
        "turn": reply.turn,
        "ttft_ms": None if first is None else round(first * 1e3, 3),
        "itl_ms": [round((b - a) * 1e3, 3) for a, b in pairwise(answer.stamps)],
        "tpot_ms": None if tpot is None else round(tpot * 1e3, 4),
        "e2e_ms": round((answer.ended - answer.sent) * 1e3, 3),
        "prefill_tokens_per_s": (round(answer.prompt_tokens / first, 3) or None)
        if first and answer.prompt_tokens
        else None,
        "decode_tokens_per_s": (round(1 / tpot, 3) or None) if tpot else None,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "new_tokens": tokens,
        "prompt_sha256": sha256(reply.messages),
        "text_sha256": hashlib.sha256(answer.text.encode()).hexdigest(),
    }
    if work.kind == "copy":
        share = quoted(reply.messages[-1]["content"].split(), answer.text.split())
        found["quoted"] = None if share is None else round(share, 4)
    return found


def _notes(answers: Sequence[Answer], levels: Sequence[Level]) -> list[str]:
    good = [answer for answer in answers if answer.error is None]
    found = []
    if failed := len(answers) - len(good):
        first = next(answer.error for answer in answers if answer.error)
        found.append(f"{failed} of {len(answers)} requests failed, the first with: {first}")
    if refused := [text for level in levels for text in level.refused]:
        count = f"{len(refused)} conversation{'s' * (len(refused) > 1)}"
        found.append(f"{count} ended early, as the service did not take the next turn: {refused[0]}")
    if any(not answer.streamed for answer in good):
        found.append("the service does not stream, so there is no time to first token and none between tokens")
    if any(answer.completion_tokens is None for answer in good):
        found.append("the service does not count tokens: each piece that it sent is taken for one")
    if any(answer.prompt_tokens is None for answer in good):
        found.append("the service does not count the prompts' tokens, so there is no prefill rate")
    if any(level.work.kind == "file" and len(level.rounds) > 1 for level in levels):
        found.append(
            "your prompts are the same in each round: a service that keeps prompts answers repeated ones faster"
        )
    return found


def _listener(base: str) -> int | None:
    """The process that listens at an address of this machine, where the system tells."""
    import psutil

    parts = urlsplit(base)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError, psutil.Error, OSError):
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            return None
        port = parts.port or (443 if parts.scheme == "https" else 80)
        for found in psutil.net_connections("tcp"):
            at = found.laddr[1] if found.status == psutil.CONN_LISTEN and found.laddr else None
            if at == port and found.pid not in (None, os.getpid()):
                return found.pid
    return None
