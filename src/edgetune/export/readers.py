"""Models that are compared: what stands in a folder is opened as a reader, which gives the logits of every position.

Two kinds: a transformers folder, on PyTorch in float32; and a folder with genai_config.json, whoever made it, on plain
ONNX Runtime (`graph_reader`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgetune.errors import InputError
from edgetune.export.graph_reader import CONFIG, Graph, at
from edgetune.files import read_json
from edgetune.models import context_length, load_model, stop_ids
from edgetune.recipe import ModelSection
from edgetune.run import MANIFEST, read_manifest
from edgetune.runtime.providers import PROVIDERS, named, status

if TYPE_CHECKING:
    import torch

CHUNK = 256  # positions whose distributions are in memory at once, float32
_MOST_BYTES = 512 << 20  # of logits of a transformers model; longer rows are read in parts, with a KV cache


class Reader(Protocol):
    """A model that reads a row from its beginning, in one piece or in several.

    Attributes:
        vocabulary: logits a position.
        most: tokens that may be fed at once; None for any number.
    """

    vocabulary: int
    most: int | None

    def reset(self) -> None:
        """Forget what was fed: the next row begins."""

    def feed(self, ids: Sequence[int], last: bool = False) -> torch.Tensor:
        """Read on. Returns logits (len(ids), V), float32; `last` says that nothing follows."""


def is_graph(folder: Path) -> bool:
    """Whether the folder holds a model for ONNX Runtime GenAI."""
    return (folder / CONFIG).is_file()


def model_at(path: Path, output: Literal["artifact", "merged"]) -> Path:
    """The folder of a model that is to be compared, checked as far as its files can be.

    Args:
        path: a folder with genai_config.json, whose hashes are verified where it has edgetune's manifest; a transformers
            folder; a GGUF file; `package:NAME`; a run.
        output: which of a run's folders is meant.

    Raises:
        InputError: it is none of these, or broken.
    """
    from edgetune.models import resolve
    from edgetune.models.packaged import PREFIX
    from edgetune.runtime.artifact import open_artifact

    if (path / "recipe.json").is_file() and (path / output).is_dir():
        path = path / output
    if is_graph(path):
        made_here = (path / MANIFEST).is_file() and str(_format(path)).startswith("edgetune/")
        return open_artifact(path).path if made_here else path.resolve()
    if path.is_file() or (path / "config.json").is_file() or str(path).startswith(PREFIX):
        return resolve(ModelSection(id=str(path))).path
    if output == "artifact":
        return open_artifact(path).path  # says what it is instead
    return resolve(ModelSection(id=str(path.absolute()))).path  # likewise


def _format(folder: Path) -> Any:
    found = read_json(folder / MANIFEST)
    return found.get("format") if isinstance(found, dict) else None


def adapter_of(folder: Path, asked: str | None = None) -> str | None:
    """The adapter that is on in a model: as `asked`; its only one when None; None for the base. See `Artifact.adapter`."""
    from edgetune.runtime.artifact import Artifact

    return Artifact(folder, read_manifest(folder), {}, {}).adapter(asked)


def open_reader(
    folder: Path, *, provider: str = "cpu", adapter: str | None = None, trust_remote_code: bool = False
) -> Reader:
    """Load the model in a folder.

    Args:
        folder: what `Reader` names.
        provider: where a graph runs, as targets have it.
        adapter: file in the folder, of the adapter that is switched on; the base's graph alone when None.
        trust_remote_code: run code that a transformers folder brings.

    Raises:
        InputError: the provider is missing, or the model cannot be loaded, or does not give what is compared.
    """
    if is_graph(folder):
        return Graph(folder, provider=provider, adapter=adapter)
    return Weights(folder, trust_remote_code)


def provider_of(folder: Path, asked: str | None = None) -> str:
    """Where a model is to run: as `asked`, else on what it was made for. Raises InputError: that provider is missing here."""
    if not is_graph(folder):
        if asked not in (None, "cpu"):
            raise InputError("runs on PyTorch, on the CPU", where=folder, fix="leave out --provider")
        return "cpu"
    name = asked or named(read_json(folder / CONFIG))
    if name not in ("cpu", *PROVIDERS):
        raise InputError(
            f"there is no provider `{name}`", where="--provider", fix=f"one of cpu, {', '.join(PROVIDERS)}"
        )
    here = status(name)
    if not here.runs:
        raise InputError(
            f"needs the execution provider {PROVIDERS[name].ep}, which {here.note} here; the CPU does not take its place",
            where=folder,
            fix=f"{here.fix}; or compare its numbers on the CPU, which says nothing of the device: --provider cpu",
        )
    return name


def longest(folder: Path) -> int:
    """Tokens a row may have. Raises InputError: the folder does not say."""
    if not is_graph(folder):
        return context_length(folder)
    config = read_json(folder / CONFIG)
    lengths = [at(config, "model", "context_length"), at(config, "search", "max_length")]
    found = [value for value in lengths if isinstance(value, int) and value > 0]
    if not found:
        raise InputError(
            "does not say the context length", where=folder / CONFIG, fix='add "context_length" to "model"'
        )
    return min(found)


def ends(folder: Path) -> list[int]:
    """Token ids that end an answer. Raises InputError: the folder does not say."""
    if not is_graph(folder):
        return stop_ids(folder)
    found = at(read_json(folder / CONFIG), "model", "eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(i, int) for i in ids):
        raise InputError("names no stop token", where=folder / CONFIG, fix='add "eos_token_id" to "model"')
    return ids


def pieces(reader: Reader, ids: Sequence[int], step: int | None = None) -> Iterator[torch.Tensor]:
    """Logits of a row, `CHUNK` positions at a time (fewer in the last piece).

    Args:
        reader: the model.
        ids: the row.
        step: tokens that are fed at once; the whole row when None, or as many as the reader takes.
    """
    import torch

    step = min(step or len(ids), reader.most or len(ids))
    held: list[torch.Tensor] = []
    reader.reset()
    for start in range(0, len(ids), step):
        held.append(reader.feed(ids[start : start + step], last=start + step >= len(ids)))
        if sum(map(len, held)) >= CHUNK:
            whole = held[0] if len(held) == 1 else torch.cat(held)
            full = len(whole) // CHUNK * CHUNK
            yield from whole[:full].split(CHUNK)
            held = [whole[full:]] if full < len(whole) else []
    if held:
        yield torch.cat(held)


def greedy(reader: Reader, prompt: Sequence[int], tokens: int, stops: set[int]) -> list[int]:
    """The answer of likeliest tokens, through the first stop token, at most `tokens` long."""
    reader.reset()
    found: list[int] = []
    for ids in _fed(prompt, reader.most):
        logits = reader.feed(ids)
    while True:
        found.append(int(logits[-1].argmax()))
        if len(found) == tokens or found[-1] in stops:
            return found
        logits = reader.feed(found[-1:])


def _fed(ids: Sequence[int], most: int | None) -> Iterator[Sequence[int]]:
    step = most or len(ids)
    for start in range(0, len(ids), step):
        yield ids[start : start + step]


class Weights:
    """A transformers folder on PyTorch, float32."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        import torch

        self._model: Any = load_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
        self._cache: Any = None
        self.vocabulary = int(self._model.config.get_text_config().vocab_size)
        self.most: int | None = max(1, _MOST_BYTES // (4 * self.vocabulary))

    def reset(self) -> None:
        """See `Reader`."""
        self._cache = None

    def feed(self, ids: Sequence[int], last: bool = False) -> torch.Tensor:
        """See `Reader`."""
        import torch

        cached = not last or self._cache is not None
        with torch.inference_mode():
            fed = torch.tensor([list(ids)])
            found = self._model(input_ids=fed, past_key_values=self._cache, use_cache=cached)
        self._cache = found.past_key_values if cached else None
        return found.logits[0].float()
