"""The same benchmark over HTTP, of any OpenAI-compatible service: ours, llama-server, Ollama, vLLM.

What a client sees: time to first token from the request to the first piece of text, time per output token from the
service's own count of tokens. Where it counts none, pieces are taken for tokens, and the report says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import queue
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgetune import progress
from edgetune.errors import EdgetuneError, InputError
from edgetune.files import digest
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench.client import Answer, Service, ask, checked, connect
from edgetune.runtime.bench.measure import writable, write
from edgetune.runtime.bench.prompts import Conversation, read_prompts, words_prompt
from edgetune.runtime.bench.report import FORMAT, cached_share, machine_now, noise, summaries, top
from edgetune.runtime.bench.schedule import Rounds
from edgetune.runtime.bench.watch import MemoryCurve, Meter
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
        clients: numbers of clients that ask at once, each asking `section.repetitions` times; measured in this order.
        section: words of a prompt (about as many tokens), most tokens of an answer, rounds.
        options: `prompts`: your own, taken in turn.
        timeout_s: how long the service may say nothing.

    Returns:
        The report, as `schema.json` describes it, a workload for each number of clients.

    Raises:
        InputError: no service there, or none that is OpenAI-compatible; a number of clients out of range.
        EdgetuneError: it gives no answer.
    """
    writable(out)
    for count in clients:
        if not 1 <= count <= _MOST_CLIENTS:
            raise InputError(f"must be 1 to {_MOST_CLIENTS}, not {count}", where="concurrency")
    texts = read_prompts(Path(options.prompts)) if options and options.prompts else None
    service = connect(url, model, timeout_s)
    before, machine = load_average(), hardware()
    source = _Source(texts, section.prompt_tokens)
    notes: list[str] = []
    with progress.task("bench", total=section.warmup + sum(clients) * section.repetitions) as shown:
        service = _warmed(service, source, section, shown)
        pid = _listener(service.base)
        curve = MemoryCurve(pid) if pid else None
        levels = []
        for count in dict.fromkeys(clients):
            if curve:
                curve.mark(f"{count} at once")
            levels.append(_level(service, count, source, section, (pid, shown)))
    entries, samples, said = [], [], []
    for count, (answers, wall, meter) in zip(dict.fromkeys(clients), levels, strict=True):
        entry, rounds = _entry(count, answers, wall, meter)
        entries.append(entry)
        samples += [{"workload": entry["name"], "round": n, **s} for n, part in enumerate(rounds, 1) for s in part]
        said += [answer for part in answers for answer in part]
    notes += _notes(said, texts, sum(clients) * section.repetitions)
    memory = [curve.stop()] if curve else []
    peak = max((mb for part in memory for _, mb in part["points"]), default=None)
    report = {
        "format": FORMAT,
        "artifact": service.model,
        "target": {"kind": "http", "url": service.base, "model": service.model},
        **dict.fromkeys(("files", "size_mb", "verify_s", "load_s", "threads", "load")),
        "warmup": section.warmup,
        "repetitions": section.repetitions,
        **top(entries),
        "peak_rss_mb": peak,
        **dict.fromkeys(("peak_pss_mb", "energy_j", "read_bytes_per_step")),
        "tokens": sum(entry["tokens"] for entry in entries),
        "tokens_sha256": digest([answer.text for answer in said]),
        "device_profile": None,
        "hardware": machine_now(machine),
        "bandwidth_gb_s": None,
        "load_average": {"before": before, "after": load_average()},
        "versions": versions(),
        "quality": None,
        "siblings": [],
        "workloads": entries,
        "memory": memory,
        "samples": samples,
        "warnings": [*notes, *noise(entries, machine["cpu"]["logical_cores"])],
        **dict.fromkeys(("scaling", "stress", "comparison")),
    }
    write(report, out)
    return report


class _Source:
    """Prompts, no two alike from the first words on, unless they are your own and fewer than the requests."""

    def __init__(self, texts: list[Conversation | str] | None, words: int) -> None:
        self._texts, self._words, self._given, self._lock = texts, words, 0, threading.Lock()

    def messages(self, name: str) -> Conversation:
        """The next of your own, else words that are drawn by `name`."""
        text: Conversation | str = words_prompt(name, self._words)
        if self._texts:
            with self._lock:
                text = self._texts[self._given % len(self._texts)]
                self._given += 1
        return [{"role": "user", "content": text}] if isinstance(text, str) else text


def _warmed(service: Service, source: _Source, section: BenchSection, shown: progress.Task) -> Service:
    """Ask once at least, so that a service that cannot answer is told of before it is measured."""
    for number in range(max(1, section.warmup)):
        while (
            other := checked(service, ask(service, source.messages(f"warm-up {number}"), section.new_tokens))
        ) is not None:
            service = other
        if section.warmup:
            shown.advance()
    return service


Level = tuple[list[list[Answer]], float, dict[str, Any]]


def _level(
    service: Service, count: int, source: _Source, section: BenchSection, around: tuple[int | None, progress.Task]
) -> Level:
    """So many clients at once. Returns the answers round by round, the seconds in all, and what the machine did."""
    pid, shown = around
    done: queue.Queue[tuple[int, int, Answer]] = queue.Queue()
    together = threading.Barrier(count)
    stop = threading.Event()

    def client(index: int) -> None:
        together.wait()
        for number in range(section.repetitions):
            if stop.is_set():
                return
            messages = source.messages(f"{count} clients, client {index}, round {number}")
            done.put((number, index, ask(service, messages, section.new_tokens)))

    meter = Meter([os.getpid(), *([pid] if pid else [])])
    came: list[dict[int, Answer]] = [{} for _ in range(section.repetitions)]
    with meter.round():
        start = time.perf_counter()
        for index in range(count):
            threading.Thread(target=client, args=(index,), daemon=True).start()
        try:
            for _ in range(count * section.repetitions):
                number, index, answer = done.get()
                came[number][index] = answer
                shown.advance(note=f"{count} at once")
        finally:
            stop.set()
        wall = time.perf_counter() - start
    found = [[part[index] for index in sorted(part)] for part in came]  # not in the order of their ends
    if all(answer.error for part in found for answer in part):
        raise EdgetuneError(f"no request of {count} at once was answered: {found[0][0].error}", where=service.base)
    result = meter.result()
    return found, wall, result if pid else {**result, "others_busy_cores": None}


def _entry(
    count: int, answers: list[list[Answer]], wall: float, meter: dict[str, Any]
) -> tuple[dict[str, Any], Rounds]:
    rounds = [[_sample(answer) for answer in part if answer.error is None] for part in answers]
    good = [answer for part in answers for answer in part if answer.error is None]
    failed = [answer.error for part in answers for answer in part if answer.error]
    tokens = sum(_tokens(answer) for answer in good)
    counts = [answer.prompt_tokens for answer in good if answer.prompt_tokens]
    lengths = sorted(_tokens(answer) for answer in good)
    return {
        "name": f"{count} client{'s' * (count != 1)}",
        "kind": "http",
        "prompt_tokens": sorted(counts)[len(counts) // 2] if counts else None,
        "new_tokens": lengths[len(lengths) // 2],
        "depth": 0,
        "batch": 1,
        "concurrency": count,
        "rounds": len(rounds),
        "requests": len(good) + len(failed),
        "errors": len(failed),
        "error": failed[0] if failed else None,
        **summaries(rounds),
        "total_tokens_per_s": round(tokens / wall, 3),
        "requests_per_s": round(len(good) / wall, 4),
        "tokens": tokens,
        "tokens_sha256": digest([answer.text for answer in good]),
        "peak_rss_mb": None,
        "peak_pss_mb": None,
        **meter,
        "cached": cached_share(rounds),
        **dict.fromkeys(("energy_j_per_token", "bandwidth_share", "quoted")),
    }, rounds


def _tokens(answer: Answer) -> int:
    return answer.completion_tokens or len(answer.stamps) or 1


def _sample(answer: Answer) -> dict[str, Any]:
    first = answer.stamps[0] - answer.sent if answer.stamps else None
    tokens, writing = _tokens(answer), answer.stamps[-1] - answer.stamps[0] if answer.stamps else 0.0
    tpot = writing / (tokens - 1) if tokens > 1 and writing else None
    return {
        "ttft_ms": None if first is None else round(first * 1e3, 3),
        "itl_ms": [round((b - a) * 1e3, 3) for a, b in pairwise(answer.stamps)],
        "tpot_ms": None if tpot is None else round(tpot * 1e3, 4),
        "e2e_ms": round((answer.ended - answer.sent) * 1e3, 3),
        "prefill_tokens_per_s": round(answer.prompt_tokens / first, 3) if first and answer.prompt_tokens else None,
        "decode_tokens_per_s": round(1 / tpot, 3) if tpot else None,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "new_tokens": tokens,
        "text_sha256": hashlib.sha256(answer.text.encode()).hexdigest(),
    }


def _notes(answers: Sequence[Answer], texts: list[Any] | None, requests: int) -> list[str]:
    good = [answer for answer in answers if answer.error is None]
    found = []
    if failed := len(answers) - len(good):
        first = next(answer.error for answer in answers if answer.error)
        found.append(f"{failed} of {len(answers)} requests failed, the first with: {first}")
    if any(not answer.streamed for answer in good):
        found.append("the service does not stream, so there is no time to first token and none between tokens")
    if any(answer.completion_tokens is None for answer in good):
        found.append("the service does not count tokens: each piece that it sent is taken for one")
    if any(answer.prompt_tokens is None for answer in good):
        found.append("the service does not count the prompts' tokens, so there is no prefill rate")
    if texts and len(texts) < requests:
        found.append(
            f"{len(texts)} prompts for {requests} requests: a service that keeps prompts answers repeated ones faster"
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
