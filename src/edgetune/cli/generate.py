"""`edgetune generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli._common import Json, print_json
from edgetune.runtime.options import DEFAULT_MAX_TOKENS, GenerationOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgetune.runtime.session import Completion, Message, Session

_DEFAULT = GenerationOptions()

# Shared with chat.
Folder = Annotated[Path, typer.Argument(help="An artifact or a run folder.", show_default=False)]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=f"Most tokens of an answer; up to {DEFAULT_MAX_TOKENS} when not given.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(metavar="0..2", help="0 takes the likeliest token and repeats itself; higher varies more."),
]
TopP = Annotated[
    float,
    typer.Option(metavar="0..1", help="With a temperature: draw from the likeliest tokens of this total."),
]
TopK = Annotated[
    int, typer.Option(metavar="N", help="With a temperature: draw from the N likeliest tokens; 0: from all.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="With a temperature: makes drawing repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text. May be repeated.")
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads; all cores when not given.")]


def command(
    artifact: Folder,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from --file or a pipe when not given.")] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = _DEFAULT.temperature,
    top_p: TopP = _DEFAULT.top_p,
    top_k: TopK = _DEFAULT.top_k,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="Let the answer be JSON that fits this JSON Schema."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without the model's chat template.")
    ] = False,
    threads: Threads = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and token counts on stderr.")] = False,
    json: Json = False,
) -> None:
    """Answer one prompt.

    The answer streams to stdout. The prompt is one user turn, put into the model's chat template; one line
    end at its end is dropped.

    \b
    Examples:
      edgetune generate runs/quickstart/artifact "What is the capital of France?"
      edgetune generate runs/quickstart --file question.txt --max-tokens 100 --stats
      cat notes.txt | edgetune generate runs/quickstart --system "Sum this up." --stop "\\n\\n"
      edgetune generate runs/quickstart "A story, please." --temperature 0.8 --seed 7
      edgetune generate runs/quickstart "Name a city." --json-schema '{"type": "object"}'
    """
    from edgetune.errors import InputError
    from edgetune.leases import lease
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.prompt import read_prompt, read_schema
    from edgetune.runtime.session import Session

    if raw and system is not None:
        raise InputError("--raw sends no system prompt", fix="leave --raw or --system out")
    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        json_schema=None if json_schema is None else read_schema(json_schema),
    )
    text = read_prompt(prompt, file)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    found = open_artifact(artifact)
    with lease(found.path, "edgetune generate"), Session(found, threads=threads) as session:
        asked = text if raw else messages
        answer = session.generate(asked, options) if json else _print_stream(session, asked, options)
    if json:
        print_json(answer.as_dict())
    if stats:
        typer.echo(answer.describe(), err=True)
    if answer.finish_reason == "length":
        _tell_cut(answer, options)


def _print_stream(session: Session, prompt: str | Sequence[Message], options: GenerationOptions) -> Completion:
    """Print the answer as it comes. A terminal gets a line end and no control characters, a pipe the text
    itself."""
    from edgetune.runtime.terminal import printable

    terminal, last = sys.stdout.isatty(), "\n"
    answer = None
    try:
        for piece in session.stream(prompt, options):
            text = printable(piece.text) if terminal else piece.text
            last = text[-1:] or last
            print(text, end="", flush=True)
            answer = piece.completion
    finally:
        if terminal and last != "\n":
            print(flush=True)
    assert answer is not None
    return answer


def _tell_cut(answer: Completion, options: GenerationOptions) -> None:
    from edgetune.errors import EdgetuneError

    if options.json_schema is not None:
        raise EdgetuneError(
            f"the answer was cut after {answer.completion_tokens} tokens, so its JSON is not complete",
            fix="give more --max-tokens, or a schema that bounds lengths (maxLength, maxItems)",
        )
    typer.echo(f"(cut after {answer.completion_tokens} tokens; --max-tokens allows more)", err=True)
