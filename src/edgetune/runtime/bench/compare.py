"""Two artifacts or two services, or one and a saved report, measured on the same work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.recipe import BenchOptions, BenchSection
from edgetune.runtime.bench.client import connect
from edgetune.runtime.bench.http import asked_of_services, measured_services
from edgetune.runtime.bench.measure import job, measured, writable, write
from edgetune.runtime.bench.report import read_report
from edgetune.runtime.bench.verdict import against


def compare(
    artifact: Path,
    other: Path,
    section: BenchSection,
    out: Path | None = None,
    options: BenchOptions | None = None,
) -> dict[str, Any]:
    """Measure an artifact beside another one, round by round in turn, or against a report that was saved.

    Returns:
        The artifact's report; its `comparison` has the ratios with their intervals, the verdict in words, and the other
        one's report.

    Raises:
        InputError: see `measure.bench`; the saved report is none, or is of other work.
    """
    writable(out, artifact, other)
    options = options or BenchOptions()
    if len(options.threads) > 1:
        raise InputError("takes one number beside --compare", where="--threads", fix="sweep threads without it")
    threads = options.threads[0] if options.threads else section.threads
    if other.is_file():
        before = read_report(other, "artifact")
        report = measured([job(artifact, threads, options, options.adapter)], section, options)[0]
    else:
        jobs = [job(path, threads, options, on) for path, on in ((artifact, options.adapter), (other, None))]
        report, before = measured(jobs, section, options)
    report["comparison"] = against(report, before, interleaved=not other.is_file())
    write(report, out)
    return report


def compare_url(
    url: str,
    model: str | None,
    other: str,
    other_model: str | None,
    clients: Sequence[int],
    section: BenchSection,
    out: Path | None = None,
    options: BenchOptions | None = None,
    timeout_s: float = 300.0,
) -> dict[str, Any]:
    """Measure a service beside another one, round by round in turn, or against a report that was saved.

    Args:
        url, model, clients, section, options, timeout_s: see `http.bench_url`.
        other, other_model: the address of the other service and its model, or the file of a report.

    Returns:
        The service's report; its `comparison` has the ratios with their intervals, the verdict in words, and the other
        one's report.

    Raises:
        InputError: see `http.bench_url`; both are the same; the saved report is none, or is of other work.
        EdgetuneError: one of them gives no answer.
    """
    writable(out)
    works = asked_of_services(clients, section, options)
    if "://" not in other:
        if not Path(other).is_file():
            raise InputError(
                "is neither an address nor a saved report", where=other, fix="such as http://127.0.0.1:8080"
            )
        before = read_report(Path(other), "http")
        report = measured_services([connect(url, model, timeout_s)], clients, works, section)[0]
    else:
        services = [connect(url, model, timeout_s), connect(other, other_model, timeout_s)]
        if services[0] == services[1]:
            raise InputError(
                "is the same service and model: what one round leaves in its cache would speed up the next",
                where=other,
                fix="name another one, or with --compare-model another of its models",
            )
        report, before = measured_services(services, clients, works, section)
    report["comparison"] = against(report, before, interleaved="://" in other)
    write(report, out)
    return report
