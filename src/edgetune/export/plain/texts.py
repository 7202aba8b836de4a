"""Texts on which an artifact is compared with its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.runtime.plain.description import SEQ2SEQ, Task

Text = str | tuple[str, str]

# Of different kinds and lengths; written for this.
_OWN = (
    "The parcel arrived on Tuesday, two days late, and the box was open.",
    "Please cancel my order.",
    "How do I change the address of an account that I share with my brother?",
    "A river that has no bridge is crossed by those who know where it is shallow.",
    "In 1889 the tower in Paris was, at 300 metres, the tallest building of the world.",
    "The patient was given 20 mg twice a day; after a week the fever had gone.",
    "def mean(values): return sum(values) / len(values)",
    "Great phone, poor battery. I would not buy it again, but my daughter loves the camera.",
    "Naïve café owners in Zürich paid 3,50 € for what costs ¥480 in 東京.",
    "Maria Schmidt moved from Berlin to Lisbon in May and now works for a shipping company there.",
    "Interest rates rose by a quarter of a point, and shares of banks with them.",
    "No.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. "
    "That is why potatoes take longer to cook in La Paz than in Lima, although both are boiled in the same way, and why "
    "cooks who move from one to the other have to learn anew how long things take.",
    "The committee met on Thursday. It heard three reports, of which two were adopted as they stood; the third, on the "
    "state of the roads, was sent back with questions about what the repairs of last year had cost, and who had agreed to "
    "pay for them. The next meeting is on the first of March.",
)
_TASKS = (
    "translate English to German: The house at the end of the street is for sale.",
    "translate English to French: Where can I buy a ticket for the train to Lyon?",
    "summarize: " + _OWN[-1],
    "summarize: " + _OWN[-2],
    "Answer the question. Which city has the higher mountains around it, La Paz or Lima?",
    "Is this review positive or negative? Great phone, poor battery. I would not buy it again.",
    "What is the capital of Portugal?",
    "Write a short sentence about the sea.",
)
_QUESTIONS = (
    ("When did the parcel arrive?", _OWN[0]),
    ("How tall was the tower?", _OWN[4]),
    ("Where does Maria Schmidt work?", _OWN[9]),
    ("Why do potatoes take longer in La Paz?", _OWN[12]),
    ("When is the next meeting?", _OWN[13]),
    ("What was sent back?", _OWN[13]),
)


def texts_for(task: Task, data: Path | None, most: int) -> list[Text]:
    """Texts to compare on: a file's where one is given, else those that come with edgetune.

    Args:
        task: what the model does with them.
        data: rows with `text` (of encoders), with `question` and `context`, or with a prompt (of sequence-to-sequence models: the
            first string of `prompt`, `instruction`, `source` or `text`).
        most: how many.

    Raises:
        InputError: the file cannot be read, or its rows have other keys.
    """
    if data is None:
        own: dict[str, tuple[Text, ...]] = {SEQ2SEQ: _TASKS, "question-answering": _QUESTIONS}
        return list(own.get(task, _OWN))
    from edgetune.data.problems import Problems
    from edgetune.data.read import read

    problems = Problems()
    found: list[Text] = []
    for row in read(data, problems, data.name):
        found.append(_of_row(task, row.values, row.where))
        if len(found) == most:
            break
    problems.raise_any()
    return found


def _of_row(task: Task, values: dict[str, Any], where: str) -> Text:
    keys = {SEQ2SEQ: ("prompt", "instruction", "source", "text"), "question-answering": ("question", "context")}.get(
        task, ("text", "sentence")
    )
    strings = [values[key] for key in keys if isinstance(values.get(key), str) and values[key].strip()]
    if task == "question-answering" and len(strings) == 2:
        return strings[0], strings[1]
    if task != "question-answering" and strings:
        return str(strings[0])
    joined = " and " if task == "question-answering" else " or "
    raise InputError(f"the row has no {joined.join(keys)}", where=where, fix="name a file whose rows have them")
