"""One of several processes that train. Run as `python -m edgetune.train.worker ASSIGNMENT`, under torchrun's agent."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from edgetune.errors import FAILED, INTERRUPTED, EdgetuneError, first_line, from_system_error
from edgetune.files import read_json, write_json
from edgetune.train import distributed
from edgetune.train.distributed import Place

# How the transports say that another process is gone: then this process's failure is not the one to tell of.
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValue failed", "NCCL")


def take_part(assignment: dict[str, Any], place: Place, store: Any = None) -> None:
    """Train as one of several processes. The first writes what one process alone would.

    Args:
        assignment: as `Pipeline` writes it.
        place: of this process.
        store: where the processes meet; torchrun's when None.
    """
    from edgetune.pipeline import Pipeline
    from edgetune.recipe import Recipe
    from edgetune.recipe_file import LoadedRecipe

    recipe = Recipe.model_validate(assignment["recipe"])
    distributed.join(place, recipe.train.distributed.engine if recipe.train.distributed else "ddp", store)
    try:
        if distributed.agreed(assignment["key"]) != assignment["key"]:
            raise EdgetuneError("the machines were given different trainings", fix="start the same command on each")
        Pipeline(LoadedRecipe(recipe=recipe, path=Path(assignment["path"]))).take_part(assignment)
        distributed.wait()
    finally:
        distributed.leave()


def main() -> None:
    """Entry point: ends with the exit code of what went wrong, which is written down for the agent's process."""
    if len(sys.argv) == 3:  # a machine that was started through ssh
        from edgetune.train.launch import agent_of

        try:
            agent_of(Path(sys.argv[1]), int(sys.argv[2]))
        except EdgetuneError as error:
            sys.exit(error.exit_code)
        return
    assignment = read_json(Path(sys.argv[1]))
    place = Place(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        take_part(assignment, place)
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - whatever it is, the leader must hear of it
        write_json(Path(assignment["notes"]) / f"error-{place.rank}.json", _note(error, place))
        _end(getattr(error, "exit_code", FAILED))
    _end(0)


def _end(code: int) -> None:
    """At once: other processes may be gone, and whoever waits for them on the way out waits long."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(FAILED)


def peer_gone(error: Exception) -> bool:
    """Whether this is what follows from another process's end."""
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _PEER_GONE)


def _note(error: Exception, place: Place) -> dict[str, Any]:
    known = error if isinstance(error, EdgetuneError) else from_system_error(error)
    follows = known is None and peer_gone(error)
    note = {"rank": place.rank, "at": time.time(), "follows": follows, "expected": True}
    if known:
        return {**note, "what": known.what, "where": known.where, "fix": known.fix, "exit_code": known.exit_code}
    if follows:
        return {**note, "what": "another process is gone", "where": "train", "fix": None, "exit_code": FAILED}
    with tempfile.NamedTemporaryFile("w", prefix="edgetune-", suffix=".log", delete=False, encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    what = f"unexpected {type(error).__name__}: {first_line(error)}"
    return {**note, "what": what, "where": None, "fix": None, "exit_code": FAILED, "expected": False, "log": log.name}


if __name__ == "__main__":
    main()
