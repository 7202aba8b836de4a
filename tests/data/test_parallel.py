"""Encoding in several processes: the same rows in the same order, and a clean end whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from chat_templates import chat

from edgetune.data import parallel
from edgetune.data.fingerprint import fingerprint
from edgetune.data.parallel import Encoder, Tokens, most_workers
from edgetune.data.problems import RowProblem
from edgetune.data.render import Renderer
from edgetune.errors import EdgetuneError, InputError

# Stands in for a worker: greets with a fingerprint and then does as it is told.
STUB = """
import os, pickle, signal, sys, time
job = pickle.load(sys.stdin.buffer)
def say(value):
    pickle.dump(value, sys.stdout.buffer)
    sys.stdout.flush()
say({greeting!r})
while True:
    rows = pickle.load(sys.stdin.buffer)
    {then}
"""


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows of many lengths, some of which cannot be encoded."""
    return [
        chat("Q", f"A {n} <|im_end|>") if n % 41 == 7 else chat(f"Q {n}?", f"A{n} " * (n % 90)) for n in range(count)
    ]


def encoded(renderer: Renderer, rows: list[Any], workers: int | None, limit: int | None = 100) -> list[Any]:
    with Encoder(renderer, "assistant", limit, workers) as encoder:
        found = list(encoder.encode(((row, n) for n, row in enumerate(rows)), len(rows)))
    assert [n for n, _ in found] == list(range(len(rows)))
    return [(x.what, x.fix) if isinstance(x, RowProblem) else x for _, x in found]


def stub(monkeypatch: pytest.MonkeyPatch, greeting: str | None, then: str) -> None:
    monkeypatch.setattr(parallel, "_COMMAND", (sys.executable, "-c", STUB.format(greeting=greeting, then=then)))


def wait_until_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode nothing here: all rows but the first are left to the workers."""
    ready = parallel._Pool.ready

    def wait(pool: Any) -> bool:
        while any(not start.done() for start in pool._starting):
            time.sleep(0.01)
        return ready(pool)

    monkeypatch.setattr(parallel._Pool, "ready", wait)


@pytest.fixture
def no_worker_stays() -> Any:
    yield
    assert [child for child in psutil.Process().children() if "edgetune" in " ".join(child.cmdline())] == []


@pytest.mark.usefixtures("no_worker_stays")
def test_workers_give_bit_for_bit_what_one_process_gives(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ready(monkeypatch)
    renderer, rows = Renderer(tiny, {2}), rows_of(400)
    alone = encoded(renderer, rows, 1)
    monkeypatch.setattr(Encoder, "_here", lambda self, rows: alone[:1] if rows == rows_of(1) else pytest.fail("here"))
    assert encoded(renderer, rows, 2) == alone
    assert sum(isinstance(found, Tokens) for found in alone) == 390
    assert {len(found.learned) for found in alone if isinstance(found, Tokens) and found.whole > 100} == {100}


def test_rows_are_encoded_here_until_the_workers_are_ready(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "greeting", "time.sleep(60)")
    monkeypatch.setattr(parallel._Pool, "ready", lambda pool: False)
    rows = rows_of(200)
    assert encoded(Renderer(tiny, {2}), rows, 3) == encoded(Renderer(tiny, {2}), rows, 1)


@pytest.mark.parametrize("greeting", ["another fingerprint", None])
def test_a_worker_with_another_tokenizer_is_not_used(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, greeting: str | None
) -> None:
    wait_until_ready(monkeypatch)
    stub(monkeypatch, greeting, "say(None)")
    rows = rows_of(100)
    assert encoded(Renderer(tiny, {2}), rows, 2) == encoded(Renderer(tiny, {2}), rows, 1)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("print('out of luck', file=sys.stderr); sys.exit(7)", r"\(exit code 7\)\n  out of luck"),
        ("sys.stdout.buffer.write(b'x'); sys.exit(1)", r"\(exit code 1\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, as the system does when memory runs out"),
    ],
)
def test_a_worker_that_dies(tiny: Any, monkeypatch: pytest.MonkeyPatch, then: str, words: str) -> None:
    wait_until_ready(monkeypatch)
    renderer = Renderer(tiny, {2})
    stub(monkeypatch, fingerprint(renderer), then)
    with pytest.raises(EdgetuneError, match=words) as error:
        encoded(renderer, rows_of(1000), 2)
    assert error.value.fix
    assert error.value.exit_code == 1


def test_a_worker_that_does_not_start(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ready(monkeypatch)
    monkeypatch.setattr(parallel, "_COMMAND", (sys.executable, "-c", "import nonsense_that_is_not_there"))
    with pytest.raises(EdgetuneError, match="nonsense_that_is_not_there"):
        encoded(Renderer(tiny, {2}), rows_of(100), 2)


def test_a_useless_template_is_said_as_ever(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, None, "time.sleep(60)")
    monkeypatch.setattr(tiny, "chat_template", "nothing")
    with pytest.raises(InputError, match="leaves the answer out"):
        encoded(Renderer(tiny, {2}), rows_of(100), 2)


def test_workers_are_started_when_it_is_worth_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(Encoder, "_start", lambda self, workers: started.append(workers))
    monkeypatch.setattr(parallel, "most_workers", lambda: 5)
    encoded(Renderer(tiny), rows_of(50), None)
    assert started == []
    monkeypatch.setattr(parallel, "_SETTLED_S", 0)
    monkeypatch.setattr(parallel, "_WORTH_S", 1e-9)
    encoded(Renderer(tiny), rows_of(50), None)
    assert started == [5]
    assert 1 <= most_workers() <= 12


def test_a_worker_ends_with_its_parent() -> None:
    worker = subprocess.run(parallel._COMMAND, input=b"", timeout=60, check=False)
    assert worker.returncode == 0


INTERRUPTED = """
import sys
from pathlib import Path
from edgetune.cli._common import guarded
from edgetune.data import parallel
from edgetune.data.parallel import Encoder
from edgetune.data.render import Renderer
from edgetune.models import load_tokenizer
import psutil, typer
parallel._COMMAND = (sys.executable, "-c", sys.argv[2])
parallel._Pool.ready = lambda pool: all(start.result() for start in pool._starting)
row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
try:
  with guarded():
    with Encoder(Renderer(load_tokenizer(Path(sys.argv[1])), {2}), "assistant", None, 2) as encoder:
        print(*[child.pid for child in psutil.Process().children()], flush=True)
        print(len(list(encoder.encode(((row, n) for n in range(1000)), 1000))))
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed(tiny_model: Path, number: signal.Signals) -> None:
    worker = STUB.format(greeting="x", then=f"time.sleep({3600 if number == signal.SIGINT else 2}); say([])")
    command = [sys.executable, "-c", INTERRUPTED, str(tiny_model), worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1)
        parent.send_signal(number)
        errors = parent.stderr.read()
    assert parent.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert "interrupted" in errors or number == signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
