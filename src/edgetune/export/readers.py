"""Models that are compared: what stands in a folder is opened as a reader, which gives the logits of every position.

Two kinds: a transformers folder, on PyTorch in float32; and a folder with genai_config.json, whoever made it, on plain
ONNX Runtime. Its layout: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgetune.errors import EdgetuneError, InputError
from edgetune.export.quantize.rows import all_rows
from edgetune.files import read_json
from edgetune.models import context_length, load_model, stop_ids

if TYPE_CHECKING:
    import torch

CONFIG = "genai_config.json"
CHUNK = 256  # positions whose distributions are in memory at once, float32
_MOST_BYTES = 512 << 20  # of logits of a transformers model; longer rows are read in parts, with a KV cache
# Where genai_config.json does not name them.
_PAST = ("past_key_values.%d.key", "past_key_values.%d.value")
_PRESENT = ("present.%d.key", "present.%d.value")
_INTEGERS = {"tensor(int64)": "int64", "tensor(int32)": "int32"}
_CACHE_TYPES = {  # ONNX's numbers of them: some, such as bfloat16, numpy does not have
    "tensor(float)": 1,
    "tensor(uint8)": 2,
    "tensor(int8)": 3,
    "tensor(float16)": 10,
    "tensor(bfloat16)": 16,
}


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


def open_reader(folder: Path, *, adapter: str | None = None, trust_remote_code: bool = False) -> Reader:
    """Load the model in a folder.

    Args:
        folder: what `Reader` names.
        adapter: file in the folder, of the adapter that is switched on; the base's graph alone when None.
        trust_remote_code: run code that a transformers folder brings.

    Raises:
        InputError: it cannot be loaded, or does not give what is compared.
    """
    return Graph(folder, adapter=adapter) if is_graph(folder) else Weights(folder, trust_remote_code)


def longest(folder: Path) -> int:
    """Tokens a row may have. Raises InputError: the folder does not say."""
    if not is_graph(folder):
        return context_length(folder)
    config = read_json(folder / CONFIG)
    lengths = [_at(config, "model", "context_length"), _at(config, "search", "max_length")]
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
    found = _at(read_json(folder / CONFIG), "model", "eos_token_id")
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


class Graph:
    """A folder with genai_config.json on plain ONNX Runtime, on the CPU.

    Where its decoder is one graph for the prompt and one for what follows, a row's first piece goes through the first,
    as in ONNX Runtime GenAI.

    Args:
        folder: the artifact.
        config: its genai_config.json, where it was read already.
        adapter: file in the folder, of the adapter that is switched on.

    Raises:
        InputError: ONNX Runtime cannot load or run it, or it needs inputs that edgetune does not know.
    """

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, *, adapter: str | None = None) -> None:
        config = config or read_json(folder / CONFIG)
        decoder = _at(config, "model", "decoder")
        if not isinstance(decoder, dict):
            raise _odd(folder, 'has no "decoder" in "model"')
        self._first, self._next = _graphs(folder, decoder)
        if adapter is not None:
            for step in (self._first, self._next):
                step.switch_on(folder / adapter)
        self._cache: list[Any] | None = None
        self._length = 0
        self.most: int | None = None
        # Two tokens tell the number of logits, and whether they are those of the last position only.
        shape = self._run([0, 1] if self._first.length != 1 else [0])[0].shape()
        self.vocabulary = int(shape[-1])
        if self._first.length == 1 or shape[-2] == 1:
            self.most = 1
        elif shape[-2] != 2:
            raise _odd(folder, f"gives logits of {shape[-2]} positions for two tokens")
        self.reset()

    def reset(self) -> None:
        """See `Reader`."""
        self._cache, self._length = None, 0

    def feed(self, ids: Sequence[int], last: bool = False) -> torch.Tensor:
        """See `Reader`."""
        import torch

        logits, *self._cache = self._run(ids)
        self._length += len(ids)
        return torch.from_numpy(logits.numpy()[0]).float()

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits (S, V), float32, of a row of S tokens."""
        self.reset()
        return self.feed(ids, last=True)

    def _run(self, ids: Sequence[int]) -> list[Any]:
        return (self._first if self._cache is None else self._next).run(ids, self._cache, self._length)


class _Step:
    """One graph: the names and types of its inputs and outputs.

    Attributes:
        length: tokens that it takes at once where that is fixed, else None.
    """

    def __init__(self, file: Path, folder: Path, decoder: dict[str, Any]) -> None:
        from edgetune.runtime.hardware import default_threads  # first: it switches telemetry off

        import onnxruntime  # isort: skip

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = default_threads()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        with _explained(file, "ONNX Runtime cannot load the graph on the CPU"):
            source = _unpruned(file) or str(file)
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._file, self._decoder = file, decoder
        self._inputs = {found.name: found for found in self._session.get_inputs()}
        names, given = decoder.get("inputs") or {}, decoder.get("outputs") or {}
        self._ids = names.get("input_ids", "input_ids")
        self._mask = names.get("attention_mask", "attention_mask")
        self._positions = names.get("position_ids", "position_ids")
        pasts = names.get("past_key_names", _PAST[0]), names.get("past_value_names", _PAST[1])
        presents = given.get("present_key_names", _PRESENT[0]), given.get("present_value_names", _PRESENT[1])
        if any(name.count("%d") != 1 for name in (*pasts, *presents)):
            raise _odd(folder, f"names its KV cache {pasts[0]}, without the place (%d) of the layer's number")
        layers = range(int(decoder.get("num_hidden_layers") or len(self._inputs)))
        pairs = [(a % i, b % i) for i in layers for a, b in zip(pasts, presents, strict=True)]
        self._past = [(past, present) for past, present in pairs if past in self._inputs]
        self._outputs = [given.get("logits", "logits"), *(present for _, present in self._past)]
        self._check(folder)
        length = self._inputs[self._ids].shape[-1]
        self.length = length if isinstance(length, int) else None
        self._adapter: dict[str, Any] = {}

    def switch_on(self, file: Path) -> None:
        """Run with the values of an `.onnx_adapter` file from now on."""
        import onnxruntime

        with _explained(file, "ONNX Runtime cannot read the adapter"):
            self._adapter = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()

    def _check(self, folder: Path) -> None:
        outputs = {found.name: found.type for found in self._session.get_outputs()}
        if missing := [name for name in self._outputs if name not in outputs]:
            raise _odd(folder, f"{self._file.name} has no output {missing[0]}")
        if (kind := outputs[self._outputs[0]]) not in ("tensor(float)", "tensor(float16)"):
            raise _odd(folder, f"its logits are a {kind}")
        if self._ids not in self._inputs:
            raise _odd(folder, f"{self._file.name} has no input {self._ids}")
        fed = {self._ids, self._mask, self._positions, *(past for past, _ in self._past)}
        if unknown := sorted(self._inputs.keys() - fed):
            raise _odd(folder, f"{self._file.name} needs the input {unknown[0]}, which edgetune does not know")
        for name in fed & self._inputs.keys():
            known = _CACHE_TYPES if name.startswith(tuple(past for past, _ in self._past)) else _INTEGERS
            if self._inputs[name].type not in known:
                raise _odd(folder, f"the input {name} is a {self._inputs[name].type}")
        ids = self._inputs[self._ids].shape
        if len(ids) != 2 or (isinstance(ids[1], int) and ids[1] != 1):
            raise _odd(
                folder, f"{self._file.name} takes tokens of the fixed shape {ids}, so that rows cannot be fed to it"
            )

    def run(self, ids: Sequence[int], cache: list[Any] | None, before: int) -> list[Any]:
        """Logits (1, S or 1, V) and the new KV cache as OrtValues, which keep types that numpy does not have."""
        import numpy as np
        import onnxruntime

        values = {
            self._ids: [ids],
            self._mask: [[1] * (before + len(ids))],
            self._positions: [list(range(before, before + len(ids)))],
        }
        feed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(value, _INTEGERS[self._inputs[name].type]))
            for name, value in values.items()
            if name in self._inputs
        }
        names = [past for past, _ in self._past]
        feed |= self._adapter
        feed |= dict(zip(names, cache or [self._empty(name) for name in names], strict=True))
        with _explained(self._file, "ONNX Runtime cannot run the graph"):
            return self._session.run_with_ort_values(self._outputs, feed)

    def _empty(self, name: str) -> Any:
        import onnxruntime

        shape = self._inputs[name].shape
        heads, size = (
            here if isinstance(here, int) else self._decoder.get(key)
            for here, key in ((shape[1], "num_key_value_heads"), (shape[3], "head_size"))
        )
        if not isinstance(heads, int) or not isinstance(size, int):
            raise _odd(self._file.parent, "does not say num_key_value_heads and head_size")
        kind = _CACHE_TYPES[self._inputs[name].type]
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type((1, heads, 0, size), kind)


def _unpruned(file: Path) -> bytes | None:
    """A graph whose head gets the last position only (the builder's `prune_lm_head`), with a head for all of them.

    What is computed for a position is the same. None where the graph is not pruned.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(file, load_external_data=False)
    except DecodeError:  # ONNX Runtime says what is wrong with it
        return None
    if not (all_rows(graph.graph) or _whole_head(graph.graph)):
        return None
    del graph.graph.value_info[:]  # shapes of one position
    for output in graph.graph.output:
        if output.name == "logits":
            output.type.tensor_type.shape.dim[1].dim_param = "positions"
    return bytes(graph.SerializeToString())


def _whole_head(graph: Any) -> bool:
    nodes = {node.name: node for node in graph.node}
    chosen, shaped = nodes.get("/lm_head/prune/Gather"), nodes.get("/lm_head/prune/Unsqueeze")
    if chosen is None or shaped is None:
        return False
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name == shaped.output[0]:
                node.input[at] = chosen.input[0]
    for node in (chosen, shaped):
        graph.node.remove(node)
    return True


def _graphs(folder: Path, decoder: dict[str, Any]) -> tuple[_Step, _Step]:
    """The graph for a row's first tokens, and the one for those that follow; mostly the same."""
    if not decoder.get("pipeline"):
        one = _Step(_graph(folder, decoder.get("filename")), folder, decoder)
        return one, one
    stages = [stage for part in decoder["pipeline"] for stage in part.values()]
    first = [stage for stage in stages if stage.get("run_on_prompt", True)]
    later = [stage for stage in stages if stage.get("run_on_token_gen", True)]
    if len(first) != 1 or len(later) != 1:
        raise _odd(folder, f"its decoder is a pipeline of {len(stages)} graphs that run one after the other")
    steps = [_Step(_graph(folder, s.get("filename")), folder, {**decoder, **s}) for s in (first[0], later[0])]
    return steps[0], steps[1]


def _graph(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not (folder / name).is_file():
        raise InputError(
            f"names no graph that is there ({name})",
            where=folder / CONFIG,
            fix="copy or make the artifact again, whole",
        )
    return folder / name


def _at(config: Any, *keys: str) -> Any:
    """The value below these keys, None where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _odd(folder: Path, what: str) -> InputError:
    fix = "give a decoder as the ONNX Runtime GenAI model builder or edgetune makes it: ids and KV cache in, logits out"
    return InputError(f"cannot be compared: {what}", where=folder, fix=fix)


@contextlib.contextmanager
def _explained(file: Path, what: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises, which has no class of its own, into an InputError."""
    try:
        yield
    except EdgetuneError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, RuntimeError | ValueError):
            raise
        text = " ".join(str(error).split())[:300]
        fix = "it may be made for another device, or with options that do not fit together: make it again"
        raise InputError(f"{what}: {text}", where=file, fix=fix) from error
