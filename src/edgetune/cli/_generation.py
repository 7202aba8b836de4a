"""Options of `generate` and `chat`: how answers are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.runtime.options import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, GenerationOptions

DEFAULT = GenerationOptions()
_DRAWING = "Drawing (with a temperature)"
_CHANGES = "Changes of probabilities"

Folder = Annotated[Path, typer.Argument(help="An artifact or a run folder.", show_default=False)]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"Most tokens of an answer; up to {DEFAULT_MAX_TOKENS} when not given."),
]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text. May be repeated.")
]
ADAPTER = "The adapter that is on, of an artifact that carries some; `none`: the base; its only one when not given."
Adapter = Annotated[str | None, typer.Option(metavar="NAME", help=ADAPTER)]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="CPU threads; the device profile's, or all cores, when not given.")
]
PromptCache = Annotated[
    bool,
    typer.Option(
        "--prompt-cache",
        help="Keep what conversations begin with, system prompt and tools, on disk, and take it up from there the next time.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(metavar="0..2", help="0 takes the likeliest token and repeats itself; higher varies more."),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="0..1", help="Draw from the likeliest tokens of this total probability.", rich_help_panel=_DRAWING
    ),
]
TopK = Annotated[
    int,
    typer.Option(metavar="N", help="Draw from the N likeliest tokens; 0: from all.", rich_help_panel=_DRAWING),
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="0..1", help="Leave out tokens below this share of the likeliest one.", rich_help_panel=_DRAWING
    ),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes drawing repeatable.", rich_help_panel=_DRAWING)]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        metavar="0..2", help="Over 1: what prompt or answer have becomes less likely.", rich_help_panel=_CHANGES
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(metavar="-2..2", help="Off the logits of tokens that the answer has.", rich_help_panel=_CHANGES),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(metavar="-2..2", help="The same, for each time that it has them.", rich_help_panel=_CHANGES),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=BIAS",
        help="Add BIAS (-100 to 100) to the logit of a token id. May be repeated.",
        rich_help_panel=_CHANGES,
    ),
]
Regex = Annotated[str | None, typer.Option(metavar="REGEX", help="Let the answer fit this regular expression.")]
Grammar = Annotated[
    str | None, typer.Option(metavar="FILE|LARK", help="Let the answer fit this grammar (Lark, begins with `start:`).")
]
Speculation = Annotated[
    str,
    typer.Option(
        metavar="auto|on|off",
        help="Guess tokens ahead from what is there already. auto: where `edgetune tune` measured it, as long as it "
        "pays; answers may differ in rounding.",
    ),
]
Exact = Annotated[bool, typer.Option("--exact", help="The tokens of a fresh start, decoded one by one.")]
LogProbs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar=f"0..{MAX_LOGPROBS}",
        help="With --json: log-probability of each token and of the N likeliest ones.",
    ),
]
PromptLogProbs = Annotated[
    int | None,
    typer.Option("--prompt-logprobs", metavar=f"0..{MAX_LOGPROBS}", help="With --json: the same for the prompt."),
]


def read_bias(given: list[str] | None) -> dict[int, float]:
    """`ID=BIAS` from the command line. Raises InputError."""
    from edgetune.errors import InputError

    found: dict[int, float] = {}
    for text in given or []:
        token, _, bias = text.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise InputError(f"{text!r} is not ID=BIAS", where="--logit-bias", fix="--logit-bias 50=-100") from error
    return found


def read_options(stop: list[str] | None, logit_bias: list[str] | None, **given: Any) -> GenerationOptions:
    """The command line's values, checked. Raises InputError."""
    return GenerationOptions(stop=tuple(stop or ()), logit_bias=read_bias(logit_bias), **given)
