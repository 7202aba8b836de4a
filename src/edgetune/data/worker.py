"""A process that encodes rows: `python -m edgetune.data.worker`, started by `parallel`.

It reads pickles from stdin, first the job and then chunks of rows, and answers each with one on stdout. When its stdin
closes, because the work is done or the parent is no more, it ends.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core; threads would only be in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        _answer(pickle.load(sys.stdin.buffer), answers)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # the parent has closed its end, or is gone: nothing is left to say


def _answer(job: dict[str, Any], answers: Any) -> None:
    from edgetune.data.fingerprint import fingerprint
    from edgetune.data.parallel import encode_rows
    from edgetune.data.render import Renderer
    from edgetune.errors import EdgetuneError
    from edgetune.models import load_tokenizer

    def say(value: object) -> None:
        pickle.dump(value, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    try:
        tokenizer = load_tokenizer(Path(job["folder"]), trust_remote_code=job["trust_remote_code"])
    except EdgetuneError:
        say(None)  # the parent has it loaded, so it goes on alone
        return
    tokenizer.chat_template = job["chat_template"]
    renderer = Renderer(tokenizer, job["stop_ids"])
    say(fingerprint(renderer))
    while True:
        say(encode_rows(renderer, pickle.load(sys.stdin.buffer), job["train_on"], job["limit"], job["token_bytes"]))


if __name__ == "__main__":
    main()
