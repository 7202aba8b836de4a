"""`edgetune serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli._common import Json, NoProfile
from edgetune.cli._generation import PromptCache, Threads


def command(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder, such as runs/quickstart/artifact.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. There is no authentication: keep to loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8080,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; the artifact's own when not given.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="How many requests may wait while one is answered.")] = 16,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|TEXT",
            help="System prompt of conversations that bring none of their own; read before the first request.",
        ),
    ] = None,
    prompt_cache: PromptCache = False,
    threads: Threads = None,
    no_profile: NoProfile = False,
    as_json: Json = False,
) -> None:
    """Serve an artifact to OpenAI clients: /v1/chat/completions, /v1/models, /health.

    One answer at a time, the others wait in a queue; a full queue is answered with 429. Ctrl-C ends it. The adapters of an
    artifact are models of their own, NAME:ADAPTER; NAME:none is its base.

    \b
    Examples:
      edgetune serve runs/quickstart/artifact
      edgetune serve runs/quickstart/artifact --port 0 --json
      edgetune serve runs/quickstart/artifact --name my-model --queue 4 --threads 2
      edgetune serve runs/quickstart/artifact --system rules.txt
    """
    import json
    import shlex

    from edgetune.progress import say
    from edgetune.runtime.prompt import read_system
    from edgetune.serve.server import serve

    def ready(url: str, model: str) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "model": model}, ensure_ascii=False))  # one line: programs wait for it
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
        say(f"serving {model} at {url}, Ctrl-C ends it")
        say(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")
        say(f'  or in Python: openai.OpenAI(base_url="{url}/v1", api_key="none")')

    serve(
        artifact,
        host=host,
        port=port,
        name=name,
        queue=queue,
        system=None if system is None else read_system(system),
        prompt_cache=prompt_cache,
        threads=threads,
        use_profile=not no_profile,
        ready=ready,
    )
