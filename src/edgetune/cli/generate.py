"""`edgetune generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli._common import Json, NoProfile, print_json
from edgetune.cli._generation import (
    DEFAULT,
    Adapter,
    Exact,
    Folder,
    FrequencyPenalty,
    Grammar,
    LogitBias,
    LogProbs,
    MaxTokens,
    MinP,
    PresencePenalty,
    PromptCache,
    PromptLogProbs,
    Regex,
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

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgetune.runtime.completion import Completion, Message, Piece
    from edgetune.runtime.options import GenerationOptions
    from edgetune.runtime.session import Session


def command(
    artifact: Folder,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from --file or a pipe when not given.")] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
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
    json_schema: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="Let the answer be JSON that fits this JSON Schema."),
    ] = None,
    regex: Regex = None,
    grammar: Grammar = None,
    tools: Annotated[
        str | None,
        typer.Option(metavar="FILE|JSON", help="Functions that the model may call, a list as OpenAI's API has it."),
    ] = None,
    logprobs: LogProbs = None,
    prompt_logprobs: PromptLogProbs = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without the model's chat template.")
    ] = False,
    speculation: Speculation = DEFAULT.speculation,
    exact: Exact = DEFAULT.exact,
    adapter: Adapter = None,
    prompt_cache: PromptCache = False,
    threads: Threads = None,
    no_profile: NoProfile = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and token counts on stderr.")] = False,
    json: Json = False,
) -> None:
    """Answer one prompt.

    The answer streams to stdout. The prompt is one user turn, put into the model's chat template; one line
    end at its end is dropped. A sequence-to-sequence model reads it as it is, and answers greedily.

    \b
    Examples:
      edgetune generate runs/quickstart/artifact "What is the capital of France?"
      edgetune generate runs/quickstart --file question.txt --max-tokens 100 --stats
      cat notes.txt | edgetune generate runs/quickstart --system "Sum this up." --stop "\\n\\n"
      edgetune generate runs/quickstart "A story, please." --temperature 0.8 --seed 7
      edgetune generate runs/quickstart "What is our address?" --system "$(cat rules.txt)" --prompt-cache
      edgetune generate skills "Count the orders of May." --adapter sql
      edgetune generate runs/quickstart "Name a city." --json-schema '{"type": "object"}'
      edgetune generate runs/quickstart "Yes or no?" --regex "yes|no" --json --logprobs 5
      edgetune generate flan-t5 "translate English to German: The house is for sale."
    """
    from edgetune.errors import InputError
    from edgetune.leases import lease
    from edgetune.runtime.artifact import Artifact, open_any, require_decoder
    from edgetune.runtime.plain.description import SEQ2SEQ
    from edgetune.runtime.prompt import read_grammar, read_prompt, read_schema, read_tools
    from edgetune.runtime.session import Session

    if raw and system is not None:
        raise InputError("--raw sends no system prompt", fix="leave --raw or --system out")
    if not json and (logprobs is not None or prompt_logprobs is not None):
        raise InputError("log-probabilities are only in the JSON result", fix="add --json")
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
        json_schema=None if json_schema is None else read_schema(json_schema),
        regex=regex,
        grammar=None if grammar is None else read_grammar(grammar),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        adapter=adapter,
        reuse="exact" if prompt_cache else "off",  # where nothing follows, no room is made for it
    )
    functions = [] if tools is None else read_tools(tools)
    text = read_prompt(prompt, file)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    found = open_any(artifact)
    with lease(found.path, "edgetune generate"):
        if not isinstance(found, Artifact) and found.description.task == SEQ2SEQ:
            from edgetune.runtime.plain.seq2seq import Seq2Seq

            if system is not None or functions or prompt_cache:
                what = "neither system prompts nor tools, and keeps no prompts"
                raise InputError(f"a sequence-to-sequence model knows {what}", where=artifact)
            with Seq2Seq(found, threads) as model:
                answer = _shown(model.stream(text, options), silent=json)
        else:
            decoder = require_decoder(found)
            how: Any = {"use_profile": not no_profile, "prompt_cache": prompt_cache}
            with Session(decoder, threads, **how) as session:
                answer = _answer(session, text if raw else messages, options, functions, silent=json)
    if json:
        print_json(answer.as_dict())
    else:
        for call in answer.tool_calls:
            print_json({"name": call.name, "arguments": call.arguments})
    if stats:
        typer.echo(answer.describe(), err=True)
    if answer.finish_reason == "length":
        _tell_cut(answer, options)


def _answer(
    session: Session,
    prompt: str | Sequence[Message],
    options: GenerationOptions,
    tools: Sequence[dict[str, Any]],
    silent: bool,
) -> Completion:
    import threading

    from edgetune.runtime.terminal import ReadingBar, on_interrupt

    cancel = threading.Event()
    with ReadingBar() as bar, on_interrupt(cancel.set):
        return _shown(session.stream(prompt, options, cancel, tools=tools, on_prefill=bar), silent)


def _shown(pieces: Iterator[Piece], silent: bool) -> Completion:
    """Print the answer as it comes, unless `silent`. A terminal gets a line end and no control characters, a pipe the
    text itself."""
    from edgetune.runtime.terminal import printable

    terminal, last = sys.stdout.isatty(), "\n"
    answer = None
    try:
        for piece in pieces:
            answer = piece.completion
            if silent:
                continue
            text = printable(piece.text) if terminal else piece.text
            last = text[-1:] or last
            print(text, end="", flush=True)
    finally:
        if terminal and last != "\n":
            print(flush=True)
    assert answer is not None
    return answer


def _tell_cut(answer: Completion, options: GenerationOptions) -> None:
    from edgetune.errors import EdgetuneError

    cut = f"the answer was cut after {answer.completion_tokens} tokens"
    if options.json_schema is not None:
        bounds = "a schema that bounds lengths (maxLength, maxItems)"
        raise EdgetuneError(f"{cut}, so its JSON is not complete", fix=f"give more --max-tokens, or {bounds}")
    if options.regex is not None or options.grammar is not None:
        what = "regular expression" if options.regex is not None else "grammar"
        raise EdgetuneError(f"{cut}, before it fitted the {what}", fix="give more --max-tokens")
    typer.echo(f"(cut after {answer.completion_tokens} tokens; --max-tokens allows more)", err=True)
