"""`edgetune chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli.generate import Folder, MaxTokens, Seed, Stop, System, Temperature, Threads, TopK, TopP
from edgetune.runtime.options import GenerationOptions

_DEFAULT = GenerationOptions()


def command(
    artifact: Folder,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = _DEFAULT.temperature,
    top_p: TopP = _DEFAULT.top_p,
    top_k: TopK = _DEFAULT.top_k,
    seed: Seed = None,
    stop: Stop = None,
    load: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with the last conversation that /save wrote to FILE."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Talk with an artifact.

    Enter sends; Alt-Enter, a line that ends in a backslash, or a block in triple double quotes goes on with a
    new line. Ctrl-C stops an answer, Ctrl-D leaves. /help shows the commands: /system, /reset, /save, /stats.
    Through a pipe each line is a turn, and stdout has the answers only.

    \b
    Examples:
      edgetune chat runs/quickstart/artifact
      edgetune chat runs/quickstart --system "You answer in one sentence."
      edgetune chat runs/quickstart --temperature 0.7 --seed 1
      edgetune chat runs/quickstart --load chats.jsonl
      printf 'Name a city.\\nAnother one.\\n' | edgetune chat runs/quickstart
    """
    from edgetune.leases import lease
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.chat import run
    from edgetune.runtime.conversation import Conversation
    from edgetune.runtime.session import Session

    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    conversation = Conversation(system)
    if load is not None:
        conversation.load(load)
    found = open_artifact(artifact)
    with lease(found.path, "edgetune chat"), Session(found, threads=threads) as session:
        run(session, conversation, options)
