"""Guessing ahead: what it brings on copying, quoting, extracting and editing, and what it costs on open writing.

    python benchmarks/speculation.py runs/quickstart/artifact

What reading several tokens at once costs here is read from the artifact's device profile; where there is none, it is tuned
first, as `edgetune tune` does, in under two minutes (without it, `auto` never guesses). Each prompt is answered in every way in turn, so that what else the machine does meets all of them:

- plain: token by token;
- native: ONNX Runtime GenAI's own n-gram decoding, on the same graph with logits of all positions;
- adaptive: `--speculation auto`;
- always: `--speculation on`, that is, without minding whether it pays.

Rates are of decoding, without the prompt; the medians over the rounds are taken for each prompt, then their mean for
each kind of work. `same` counts the answers that are, to the token, those of plain decoding. Under the table stand the
goals of `adaptive`, met or not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import INTERRUPTED, EdgetuneError
from edgetune.runtime.artifact import Artifact, open_artifact
from edgetune.runtime.hardware import cpu, load_average
from edgetune.runtime.options import GenerationOptions
from edgetune.runtime.profile import find, profile_path, save
from edgetune.runtime.session import Session

NATIVE = {"ngram_size": 4, "max_draft_tokens": 8, "ngram_chained_lookup": True, "min_adaptive_k": 2}

REPORT = """\
The harbour of Lindesund was closed on 14 March 2021 after a crane fell onto the northern pier. Nobody was hurt. The
harbour master, Ingrid Solheim, said that the crane had been inspected in January and that "everything was in order".
The repair took eleven weeks and cost 2.4 million kroner. Since 2 June 2021 ships of up to 90 metres can land again.
The fishing company Nordvik moved its three trawlers to Hamnes in the meantime and paid 180,000 kroner in fees there."""
MINUTES = """\
Present: Amara Okafor, Daniel Reyes, Yuki Tanaka. Absent: Peter Lang. 1. The roof of the workshop leaks above the
lathe. Daniel Reyes asks two roofers for an offer by 9 May. 2. The new band saw arrives on 21 May; Yuki Tanaka clears
the corner beside the door. 3. Amara Okafor reports that 4,120 euros are left of this year's budget of 9,000 euros."""
CODE = """\
def total(prices, rate):
    result = 0
    for price in prices:
        result = result + price
    result = result + result * rate
    return result


def average(prices):
    if len(prices) == 0:
        return 0
    result = 0
    for price in prices:
        result = result + price
    return result / len(prices)
"""
TABLE = "\n".join(f"{place}: {low} to {high} degrees, wind {wind} km/h" for place, low, high, wind in (
    ("Bergen", 4, 9, 31), ("Oslo", -2, 6, 12), ("Tromsø", -7, -1, 24), ("Stavanger", 5, 10, 28), ("Bodø", 0, 4, 35),
))  # fmt: skip
OPEN = "open writing"
COPYING = "copying"  # shown, and no goal: what is wanted of it is in the other grounded work
GROUNDED_GOAL, OPEN_GOAL = 2.5, 0.97
WORK = {
    COPYING: [
        f"Repeat this text word for word:\n\n{REPORT}",
        f"Repeat these minutes word for word:\n\n{MINUTES}",
        f"Write this table again, unchanged:\n\n{TABLE}",
    ],
    "summaries with quotes": [
        f"Sum this report up in three sentences taken from it:\n\n{REPORT}",
        f"What was decided? Quote the minutes.\n\n{MINUTES}",
        f"What did the harbour master say, and what did the repair cost? Quote the report.\n\n{REPORT}",
    ],
    "extraction": [
        f"List every date in this report with the sentence that it stands in:\n\n{REPORT}",
        f"List who does what, one a line, in the words of the minutes:\n\n{MINUTES}",
        f"Give this table as JSON with the keys place, low, high, wind:\n\n{TABLE}",
    ],
    "code edits": [
        f"Rename `prices` to `amounts` in this code and give all of it:\n\n```python\n{CODE}```",
        f"Add a docstring to each function of this code and give all of it:\n\n```python\n{CODE}```",
        f"Give this code again with type hints:\n\n```python\n{CODE}```",
    ],
    OPEN: [
        "Write a story about a lighthouse keeper who finds a letter in a bottle.",
        "Explain to a child why the sky is blue and the sunset is red.",
        "Write a letter to a friend about moving to another country.",
        "What makes a good teacher? Give your opinion.",
    ],
}
Way = Callable[[str], tuple[list[int], float, int, int]]


def session_way(session: Session, mode: str, tokens: int) -> Way:
    """Answers as `edgetune generate` does: ids, tokens a second, drafted and accepted tokens."""

    def answer(prompt: str) -> tuple[list[int], float, int, int]:
        options = GenerationOptions(max_tokens=tokens, speculation=mode, reuse="off")  # type: ignore[arg-type]
        found = session.generate([{"role": "user", "content": prompt}], options)
        return list(found.ids), found.decode_tokens_per_s or 0.0, found.drafted_tokens, found.accepted_tokens

    return answer


def native_way(artifact: Artifact, session: Session, folder: Path, tokens: int) -> Way:
    """Answers with ONNX Runtime GenAI's own n-gram decoding."""
    import onnx

    from edgetune.export.quantize.rows import all_rows
    from edgetune.runtime import genai

    for file in artifact.path.iterdir():
        if file.suffix == ".data":
            (folder / file.name).hardlink_to(file) if folder.stat().st_dev == file.stat().st_dev else shutil.copy(
                file, folder
            )
        elif file.name != "model.onnx":
            shutil.copy(file, folder)
    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    if all_rows(model.graph):
        del model.graph.value_info[:]
        for output in model.graph.output:
            if output.name == "logits":
                output.type.tensor_type.shape.dim[1].dim_param = "positions"
    onnx.save(model, folder / "model.onnx")
    og = genai()
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session.settings.overlay()}}}))
    native = og.Model(config)

    def answer(prompt: str) -> tuple[list[int], float, int, int]:
        ids = session.encode(session.render([{"role": "user", "content": prompt}]))
        params = og.GeneratorParams(native)
        params.set_search_options(max_length=len(ids) + tokens, do_sample=False)
        params.set_speculative_options(**NATIVE)
        generator = og.Generator(native, params)
        for start in range(0, len(ids), 64):
            generator.append_tokens(ids[start : start + 64])
        generator.generate_next_token()
        began = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        made = [int(token) for token in generator.get_sequence(0)][len(ids) :]
        speed = (len(made) - 1) / (time.perf_counter() - began)
        stats = generator.get_speculative_stats()
        return made, speed, int(stats.get("drafted_tokens", 0)), int(stats.get("accepted_tokens", 0))

    return answer


def measure(artifact: Artifact, tokens: int, rounds: int, most: int | None) -> Iterator[dict[str, Any]]:
    """A row for each kind of work, of its first `most` prompts."""
    with tempfile.TemporaryDirectory(dir=artifact.path.parent) as folder, Session(artifact) as session:
        ways: dict[str, Way] = {name: session_way(session, mode, tokens) for name, mode in _MODES.items()}
        ways["native"] = native_way(artifact, session, Path(folder), tokens)
        for way in ways.values():
            way("Hello.")
        for kind, whole in WORK.items():
            prompts = whole[:most]
            row: dict[str, Any] = {"kind": kind, "prompts": len(prompts)}
            found: dict[str, list[list[tuple[list[int], float, int, int]]]] = {name: [] for name in ways}
            for prompt in prompts:
                for name in ways:
                    found[name].append([])
                for number in range(rounds):
                    order = list(ways) if number % 2 else list(reversed(ways))
                    for name in order:
                        found[name][-1].append(ways[name](prompt))
            plain = [answers[0][0] for answers in found["plain"]]
            for name, prompts_found in found.items():
                row[name] = {
                    "tokens_per_s": statistics.mean(
                        statistics.median(a[1] for a in answers) for answers in prompts_found
                    ),
                    "factor": statistics.median(
                        mine[1] / theirs[1]
                        for answers, others in zip(prompts_found, found["plain"], strict=True)
                        for mine, theirs in zip(answers, others, strict=True)
                    ),
                    "drafted": sum(answers[0][2] for answers in prompts_found),
                    "accepted": sum(answers[0][3] for answers in prompts_found),
                    "same": sum(answers[0][0] == ids for answers, ids in zip(prompts_found, plain, strict=True)),
                    "repeats": all(a[0] == answers[0][0] for answers in prompts_found for a in answers),
                }
            yield row


_MODES = {"plain": "off", "adaptive": "auto", "always": "on"}


def tuned(artifact: Artifact) -> None:
    """See to it that the artifact's device profile says what reading several tokens at once costs; tunes where it does not.

    Raises:
        EdgetuneError: the graph cannot tell more than the last position's next token, so nothing can be guessed.
    """
    from edgetune.runtime.tune import tune

    profile, note = find(artifact)
    if profile is None:
        print(f"{note or 'there is no device profile'}: tuning, as `edgetune tune` does", file=sys.stderr, flush=True)
        profile = tune(artifact)
        save(profile, profile_path(artifact))
    if profile.settings.row_costs is None:
        raise EdgetuneError(
            "its device profile has no costs of guessing: its graph tells the last position's next token only",
            where=artifact.path,
            fix="export it again with this edgetune, then `edgetune tune` it",
        )


def goals(rows: Sequence[dict[str, Any]]) -> list[tuple[bool, str]]:
    """The goals of adaptive guessing: whether each is met, and in words."""
    said = []
    for row in rows:
        if row["kind"] != COPYING:
            goal = OPEN_GOAL if row["kind"] == OPEN else GROUNDED_GOAL
            factor = row["adaptive"]["factor"]
            said.append((factor >= goal, f"{row['kind']}: {factor:.2f} times plain decoding; goal: {goal:g} times"))
    return said


def main() -> int:
    """Print the table and the goals, or JSON. Returns the exit code."""
    try:
        return run()
    except EdgetuneError as error:
        print(f"error: {error.text()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def run() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="of each kind; all when not given")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    given = parser.parse_args()
    artifact = open_artifact(given.artifact)
    tuned(artifact)
    print(f"{cpu()['model']}, {cpu()['usable_cores']} cores, load {load_average()}")
    print(
        "| work | plain | native | adaptive | always | accepted (adaptive) | same as plain: native, adaptive, always |"
    )
    print("|---|---|---|---|---|---|---|")
    rows = []
    for row in measure(artifact, given.tokens, given.rounds, given.prompts):
        rows.append(row)
        others = [
            f"{row[name]['tokens_per_s']:.0f} ({row[name]['factor']:.2f}×)" for name in ("native", "adaptive", "always")
        ]
        share = f"{row['adaptive']['accepted']} of {row['adaptive']['drafted']}"
        same = ", ".join(f"{row[name]['same']}/{row['prompts']}" for name in ("native", "adaptive", "always"))
        print(
            f"| {row['kind']} | {row['plain']['tokens_per_s']:.0f} | {' | '.join(others)} | {share} | {same} |",
            flush=True,
        )
    for met, words in goals(rows):
        print(f"- {'met' if met else 'NOT MET'}: {words}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
