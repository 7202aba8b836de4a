"""`edgetune chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli._common import NoProfile
from edgetune.cli._generation import (
    DEFAULT,
    Adapter,
    Exact,
    Folder,
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    PresencePenalty,
    PromptCache,
    RepetitionPenalty,
    Seed,
    Speculation,
    Stop,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    read_options,
)


def command(
    artifact: Folder,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = DEFAULT.temperature,
    top_p: TopP = DEFAULT.top_p,
    top_k: TopK = DEFAULT.top_k,
    min_p: MinP = DEFAULT.min_p,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = DEFAULT.repetition_penalty,
    presence_penalty: PresencePenalty = DEFAULT.presence_penalty,
    frequency_penalty: FrequencyPenalty = DEFAULT.frequency_penalty,
    logit_bias: LogitBias = None,
    stop: Stop = None,
    reuse: Annotated[
        str,
        typer.Option(
            metavar="exact|fast|off",
            help="What of the conversation is not read again. exact: whole pieces, the answers are those of a fresh "
            "start; fast: all of it, answers may differ in rounding; off: nothing.",
        ),
    ] = DEFAULT.reuse,
    load: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with the last conversation that /save wrote to FILE."),
    ] = None,
    speculation: Speculation = DEFAULT.speculation,
    exact: Exact = DEFAULT.exact,
    adapter: Adapter = None,
    prompt_cache: PromptCache = False,
    threads: Threads = None,
    no_profile: NoProfile = False,
) -> None:
    """Talk with an artifact.

    Enter sends; Alt-Enter, a line that ends in a backslash, or a block in triple double quotes goes on with a
    new line. Ctrl-C stops an answer, Ctrl-D leaves. /help shows the commands: /system, /adapter, /reset, /save, /stats.
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

    options = read_options(
        stop,
        logit_bias,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        speculation=speculation,
        exact=exact,
        reuse=reuse,
        adapter=adapter,
    )
    conversation = Conversation(system)
    if load is not None:
        conversation.load(load)
    found = open_artifact(artifact)
    found.adapter(adapter)  # refused before the model is loaded
    how: Any = {"use_profile": not no_profile, "prompt_cache": prompt_cache}
    with lease(found.path, "edgetune chat"), Session(found, threads, **how) as session:
        run(session, conversation, options)
