"""The rows of capitals.jsonl, found beside this file wherever the command is run."""

from pathlib import Path

from datasets import Dataset


def rows(**_):
    """The harness' data set: one split."""
    return {"test": Dataset.from_json(str(Path(__file__).with_suffix(".jsonl")))}
