"""A folder with genai_config.json, whoever made it, on plain ONNX Runtime: what is compared, on the provider that is asked for.

Its layout: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError
from edgetune.export.quantize.rows import all_rows
from edgetune.files import read_json
from edgetune.runtime.kernels import session_options
from edgetune.runtime.providers import open_session, shares

if TYPE_CHECKING:
    import numpy as np
    import torch

CONFIG = "genai_config.json"
_ARITHMETIC = (
    "session.x64quantprecision",
    "session.disable_quant_qdq",
)  # its session options that decide what is computed
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


class Graph:
    """A folder with genai_config.json on plain ONNX Runtime.

    Where its decoder is one graph for the prompt and one for what follows, a row's first piece goes through the first,
    as in ONNX Runtime GenAI. Where the first has a fixed length, whole windows go through it, the last one padded, and
    single tokens through the other.

    Args:
        folder: the artifact.
        config: its genai_config.json, where it was read already.
        provider: where it runs, as targets have it.
        adapter: file in the folder, of the adapter that is switched on.

    Raises:
        InputError: the provider is missing here, ONNX Runtime cannot load or run the graph on it, or the graph needs inputs
            that edgetune does not know.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any] | None = None,
        provider: str = "cpu",
        adapter: str | None = None,
    ) -> None:
        config = config or read_json(folder / CONFIG)
        decoder = at(config, "model", "decoder")
        if not isinstance(decoder, dict):
            raise _odd(folder, 'has no "decoder" in "model"')
        self._first, self._next = _graphs(folder, decoder, provider)
        if adapter is not None:
            for step in (self._first, self._next):
                step.switch_on(folder / adapter)
        self._cache: list[Any] | None = None
        self._length = 0
        self.most: int | None = None
        # Two tokens tell the number of logits, and whether they are those of the last position only.
        shape = self._first.run([0, 1] if self._first.length != 1 else [0], None, 0)[0].shape
        self.vocabulary = int(shape[-1])
        if self._first.length == 1 or shape[-2] == 1:
            self.most = 1
        elif shape[-2] != 2:
            raise _odd(folder, f"gives logits of {shape[-2]} positions for two tokens")

    def reset(self) -> None:
        """See `Reader`."""
        self._cache, self._length = None, 0

    def feed(self, ids: Sequence[int], last: bool = False) -> torch.Tensor:
        """See `Reader`."""
        import torch

        found = []
        while ids:
            step, count = self._reads(len(ids))
            logits, self._cache = step.run(ids[:count], self._cache, self._length)
            found.append(torch.from_numpy(logits[0]).float())
            self._length += len(ids[:count])
            ids = ids[count:]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _reads(self, tokens: int) -> tuple[_Step, int]:
        """Which graph reads on when so many tokens are left, and how many of them."""
        window = self._first.length
        if window is None:
            return (self._first if self._cache is None else self._next), tokens
        # A window begins at a multiple of its length, as padding behind it is written over by what follows.
        return (self._first, window) if tokens > 1 and self._length % window == 0 else (self._next, 1)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits (S, V), float32, of a row of S tokens."""
        self.reset()
        return self.feed(ids, last=True)

    def shares(self) -> dict[str, float]:
        """The share of the nodes that each of ONNX Runtime's providers runs, of all graphs together."""
        return shares(*{id(step): step.session for step in (self._first, self._next)}.values())


class _Step:
    """One graph: the names and types of its inputs and outputs.

    Attributes:
        session: of ONNX Runtime.
        length: tokens that it takes at once where that is fixed, else None.
    """

    def __init__(self, file: Path, folder: Path, decoder: dict[str, Any], provider: str) -> None:
        from edgetune.runtime.hardware import default_threads

        with _explained(file, f"ONNX Runtime cannot load the graph on {provider}"):
            options = decoder.get("session_options") or {}
            own = {key: str(options[key]) for key in _ARITHMETIC if key in options}
            if provider == "cpu":
                own |= session_options(file)
            self.session = open_session(file, provider, default_threads(), _unpruned(file), own)
        self._file, self._decoder = file, decoder
        self._inputs = {found.name: found for found in self.session.get_inputs()}
        names, given = decoder.get("inputs") or {}, decoder.get("outputs") or {}
        self._ids = names.get("input_ids", "input_ids")
        self._mask = names.get("attention_mask", "attention_mask")
        self._positions = names.get("position_ids", "position_ids")
        self._filled = names.get("past_sequence_length", "past_seq_len")
        self._total = names.get("total_sequence_length", "total_seq_len")
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
        outputs = {found.name: found.type for found in self.session.get_outputs()}
        if missing := [name for name in self._outputs if name not in outputs]:
            raise _odd(folder, f"{self._file.name} has no output {missing[0]}")
        if (kind := outputs[self._outputs[0]]) not in ("tensor(float)", "tensor(float16)"):
            raise _odd(folder, f"its logits are a {kind}")
        if self._ids not in self._inputs:
            raise _odd(folder, f"{self._file.name} has no input {self._ids}")
        counts = {self._filled, self._total}
        fed = {self._ids, self._mask, self._positions, *counts, *(past for past, _ in self._past)}
        if unknown := sorted(self._inputs.keys() - fed):
            raise _odd(folder, f"{self._file.name} needs the input {unknown[0]}, which edgetune does not know")
        for name in fed & self._inputs.keys():
            known = _CACHE_TYPES if name.startswith(tuple(past for past, _ in self._past)) else _INTEGERS
            if self._inputs[name].type not in known:
                raise _odd(folder, f"the input {name} is a {self._inputs[name].type}")
        ids = self._inputs[self._ids].shape
        fixed = len(ids) == 2 and isinstance(ids[1], int) and ids[1] != 1
        if len(ids) != 2 or (fixed and not (counts <= self._inputs.keys() and self._left_aligned())):
            raise _odd(
                folder, f"{self._file.name} takes tokens of the fixed shape {ids}, so that rows cannot be fed to it"
            )

    def _left_aligned(self) -> bool:
        """Whether a window's padding lies behind its tokens, and the KV cache stays where it is."""
        window = self._decoder.get("sliding_window") or {}
        return window.get("alignment") == "left" and window.get("slide_key_value_cache") is False

    def run(self, ids: Sequence[int], cache: list[Any] | None, before: int) -> tuple[np.ndarray, list[Any]]:
        """Read on.

        Args:
            ids: S tokens, at most `length` of them.
            cache: the KV cache, None where nothing was read yet.
            before: tokens in it.

        Returns:
            logits (1, S or 1, V), and the new KV cache as OrtValues, which keep types that numpy does not have.
        """
        import numpy as np
        import onnxruntime

        total = before + len(ids)
        padding = [self._decoder.get("sliding_window", {}).get("pad_value", 0)] * ((self.length or 0) - len(ids))
        values = {
            self._ids: [[*ids, *padding]],
            self._mask: [[1] * total],
            self._positions: [list(range(before, total))],
            self._filled: [[total - 1]],
            self._total: [total],
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
            logits, *present = self.session.run_with_ort_values(self._outputs, feed)
        return (logits.numpy()[:, : len(ids)] if padding else logits.numpy()), present

    def _empty(self, name: str) -> Any:
        import numpy as np
        import onnxruntime

        shape = self._inputs[name].shape
        heads, size = (
            here if isinstance(here, int) else self._decoder.get(key)
            for here, key in ((shape[1], "num_key_value_heads"), (shape[3], "head_size"))
        )
        if not isinstance(heads, int) or not isinstance(size, int):
            raise _odd(self._file.parent, "does not say num_key_value_heads and head_size")
        length = shape[2] if isinstance(shape[2], int) else 0  # a fixed one is filled in place
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            (1, heads, length, size), _CACHE_TYPES[self._inputs[name].type]
        )
        if length:
            value.update_inplace(np.zeros_like(value.numpy()))
        return value


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


def _graphs(folder: Path, decoder: dict[str, Any], provider: str) -> tuple[_Step, _Step]:
    """The graph for a row's first tokens, and the one for those that follow; mostly the same."""
    if not decoder.get("pipeline"):
        one = _Step(_graph(folder, decoder.get("filename")), folder, decoder, provider)
        return one, one
    stages = [stage for part in decoder["pipeline"] for stage in part.values()]
    first = [stage for stage in stages if stage.get("run_on_prompt", True)]
    later = [stage for stage in stages if stage.get("run_on_token_gen", True)]
    if len(first) != 1 or len(later) != 1:
        raise _odd(folder, f"its decoder is a pipeline of {len(stages)} graphs that run one after the other")
    steps = [
        _Step(_graph(folder, s.get("filename")), folder, _stage(decoder, s), provider) for s in (first[0], later[0])
    ]
    return steps[0], steps[1]


def _stage(decoder: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage of a pipeline says, and the decoder where it says nothing; a stage only lists its inputs and outputs."""
    return {**decoder, **{key: value for key, value in stage.items() if key not in ("inputs", "outputs")}}


def _graph(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not (folder / name).is_file():
        raise InputError(
            f"names no graph that is there ({name})",
            where=folder / CONFIG,
            fix="copy or make the artifact again, whole",
        )
    return folder / name


def at(config: Any, *keys: str) -> Any:
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
