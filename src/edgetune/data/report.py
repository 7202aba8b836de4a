"""What the data stage says of itself: `report.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.data.examine import Examined
from edgetune.data.render import NO_OPENING, NORMALIZED, SPACE_LOST, SPECIAL_IN_TEXT, Renderer
from edgetune.recipe import DataSection

if TYPE_CHECKING:
    import numpy as np

_BARS = 12
_ADVICE = {
    SPACE_LOST: "the model learns these answers without it",
    NORMALIZED: "the model learns the normalized characters",
    NO_OPENING: "data.train_on=last learns only what the runtime asks for",
    SPECIAL_IN_TEXT: "make sure that they are meant",
}


def report(
    examined: Examined, section: DataSection, seed: int, renderer: Renderer | None, stop_ids: set[int]
) -> dict[str, Any]:
    """The report of a data stage.

    Returns:
        `unit` (`tokens`, or `characters` without a tokenizer); `form`; `rows` (read by file, train,
        validation); `tokens` and `learned` by side, after cutting; `length` by side (min, mean, p50, p95,
        max, before cutting); `histogram` of all rows ([from, to) and rows); `too_long`; `duplicates`;
        `overlap`; `extra_keys`; `turn`: how the template ends an answer; `warnings`; `settings`.
    """
    import numpy as np

    sides = {"train": examined.train, "validation": examined.validation}
    counts, limit = examined.counts, examined.limit
    lengths = np.concatenate([side.tokens for side in sides.values()])
    return {
        "unit": "tokens" if renderer else "characters",
        "form": counts.forms,
        "rows": {"read": counts.rows, **{side: len(part) for side, part in sides.items()}},
        "tokens": {
            side: int((part.tokens if limit is None else np.minimum(part.tokens, limit)).sum())
            for side, part in sides.items()
        },
        "learned": {side: int(part.learned.sum()) for side, part in sides.items()},
        "length": {side: _length(part.tokens) for side, part in sides.items() if len(part)},
        "histogram": _histogram(lengths),
        "too_long": {
            "limit": limit,
            "rows": counts.too_long,
            "truncated": counts.too_long if section.too_long == "truncate" else 0,
            "dropped": counts.too_long if section.too_long == "drop" else 0,
        },
        "duplicates": {side: len(part) - len(np.unique(part.keys)) for side, part in sides.items()},
        "overlap": counts.overlap,
        "extra_keys": dict(counts.extra_keys.most_common()),
        "turn": _turn(examined, renderer),
        "warnings": _warnings(examined, section, renderer, stop_ids),
        "settings": {
            "train_on": "all" if counts.forms.get("train") == "text" else section.train_on,
            "max_length": limit,
            "too_long": section.too_long,
            "validation": section.validation
            if isinstance(section.validation, str)
            else {"auto": section.validation.auto},
            "seed": seed,
        },
    }


def _length(lengths: np.ndarray) -> dict[str, float]:
    import numpy as np

    ordered = np.sort(lengths)

    def quantile(share: float) -> int:
        return int(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

    mean = round(int(ordered.sum()) / len(ordered), 1)
    return {"min": int(ordered[0]), "mean": mean, "p50": quantile(0.5), "p95": quantile(0.95), "max": int(ordered[-1])}


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """At most twelve bars, each a power of two wide; the last also takes the longest 1 % of the rows."""
    import numpy as np

    if not len(lengths):
        return []
    ordered, width = np.sort(lengths), 1
    nearly_all = int(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
    while nearly_all // width >= _BARS:
        width *= 2
    last = nearly_all // width
    bars = np.bincount(np.minimum(ordered // width, last)).tolist()
    first = int(ordered[0]) // width
    shown = [{"from": i * width, "to": (i + 1) * width, "rows": bars[i]} for i in range(first, last + 1)]
    shown[-1]["to"] = max(shown[-1]["to"], int(ordered[-1]) + 1)
    return shown


def _turn(examined: Examined, renderer: Renderer | None) -> dict[str, Any] | None:
    if renderer is None or not _is_chat(examined):
        return None
    turn = renderer.turn
    return {"before": turn.before, "after": turn.after, "stop": turn.stop, "stop_id": turn.stop_id}


def _is_chat(examined: Examined) -> bool:
    return any(form != "text" for form in examined.counts.forms.values())


def _warnings(examined: Examined, section: DataSection, renderer: Renderer | None, stop_ids: set[int]) -> list[str]:
    counts, found = examined.counts, []
    if renderer is not None and stop_ids and _is_chat(examined) and renderer.turn.stop_id not in stop_ids:
        turn, known = renderer.turn, ", ".join(str(i) for i in sorted(stop_ids))
        found.append(
            f"the chat template ends an answer with {turn.stop} (id {turn.stop_id}), which is not among the "
            f"model's stop ids ({known}): generation would run on; "
            f"add {turn.stop_id} to eos_token_id in generation_config.json"
        )
    found += [f"{count:,} rows: {note}; {_ADVICE[note]}" for note, count in counts.notes.items()]
    if counts.overlap:
        found.append(f"{counts.overlap:,} training rows are also validation rows: they were left out of training")
    if counts.too_long and section.too_long != "error":
        done = "cut at the end" if section.too_long == "truncate" else "dropped"
        found.append(f"{counts.too_long:,} rows over {examined.limit:,} tokens were {done}")
    if counts.extra_keys:
        keys = ", ".join(f"{key} ({count:,})" for key, count in counts.extra_keys.most_common(8))
        found.append(f"keys that are not used: {keys}")
    if counts.forms.get("train") == "text" and section.train_on != "all":
        found.append("rows of plain text have no turns: every token is learned")
    return found
