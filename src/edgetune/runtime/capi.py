"""ONNX Runtime GenAI by its C interface: the classes of its Python module that sessions use, under the same names.

Its Python module holds Python's lock through each call, so nothing else of a program moves while a prompt's piece is read: no other
thread, no event loop, and nobody who could interrupt it. Here the lock is given away in what takes time, and `Generator.interrupt` ends
a call from another thread. Errors are RuntimeError, as there.

A call of C is made with the lock held where it takes microseconds: giving it away could cost a switch to another thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError
from edgetune.runtime import genai

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NAMES = {"win32": "onnxruntime-genai.dll", "darwin": "libonnxruntime-genai.dylib"}
# Element types of tensors, as numpy has them.
_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
# What functions give back, where it is no result; what they take is of the types that are given.
_GIVES: dict[str, Any] = {
    "OgaResultGetError": c_char_p,
    "OgaSequencesGetSequenceCount": c_size_t,
    "OgaSequencesGetSequenceData": POINTER(c_int32),
    "OgaGenerator_IsDone": c_bool,
    "OgaGenerator_TokenCount": c_size_t,
    "OgaGenerator_GetSequenceCount": c_size_t,
    "OgaGenerator_GetSequenceData": POINTER(c_int32),
}


class Interrupted(Exception):
    """`Generator.interrupt` ended the call."""


class _Library:
    """The library's functions: `fast` with Python's lock held, `slow` without."""

    def __init__(self) -> None:
        package = genai().__file__
        path = str(Path(package).parent / _NAMES.get(sys.platform, "libonnxruntime-genai.so"))
        try:
            self.fast, self.slow = ctypes.PyDLL(path), ctypes.CDLL(path)
        except OSError as error:
            raise EdgetuneError(
                f"onnxruntime-genai's library does not load: {error}",
                where=path,
                fix="`pip install --force-reinstall onnxruntime-genai`; `edgetune doctor` checks the installation",
            ) from error
        for name, gives in _GIVES.items():
            getattr(self.fast, name).restype = gives

    def call(self, name: str, *given: Any, slow: bool = False) -> None:
        """Call a function that gives a result. Raises RuntimeError."""
        function = getattr(self.slow if slow else self.fast, name)
        function.restype = c_void_p
        if found := function(*given):
            text = self.fast.OgaResultGetError(c_void_p(found)).decode("utf-8", "replace")
            self.destroy("Result", found)
            raise RuntimeError(text)

    def make(self, name: str, *given: Any, slow: bool = False) -> c_void_p:
        """Call a function whose last argument is where it puts a handle. Raises RuntimeError."""
        found = c_void_p()
        self.call(name, *given, byref(found), slow=slow)
        return found

    def destroy(self, kind: str, handle: Any) -> None:
        function = getattr(self.slow, f"OgaDestroy{kind}")
        function.restype = None
        function(handle if isinstance(handle, c_void_p) else c_void_p(handle))


@functools.cache
def _library() -> _Library:
    return _Library()


class _Owned:
    """Something native that is freed with its object."""

    def __init__(self, kind: str, handle: c_void_p) -> None:
        self.handle = handle
        weakref.finalize(self, _library().destroy, kind, handle).atexit = False


class Config(_Owned):
    """The settings of a folder's model.

    Args:
        folder: holds genai_config.json.
    """

    def __init__(self, folder: str) -> None:
        super().__init__("Config", _library().make("OgaCreateConfig", folder.encode(), slow=True))

    def overlay(self, settings: str) -> None:
        """Lay JSON over the folder's genai_config.json."""
        _library().call("OgaConfigOverlay", self.handle, settings.encode())

    def clear_providers(self) -> None:
        """Ask for the CPU."""
        _library().call("OgaConfigClearProviders", self.handle)

    def append_provider(self, name: str) -> None:
        """Ask for an execution provider."""
        _library().call("OgaConfigAppendProvider", self.handle, name.encode())

    def set_provider_option(self, name: str, key: str, value: str) -> None:
        """Set an option of a provider."""
        _library().call("OgaConfigSetProviderOption", self.handle, name.encode(), key.encode(), value.encode())


class Model(_Owned):
    """A loaded model. It lives as long as what was made with it."""

    def __init__(self, config: Config) -> None:
        super().__init__("Model", _library().make("OgaCreateModelFromConfig", config.handle, slow=True))


class Tokenizer(_Owned):
    """The tokenizer and the chat template of a folder's model."""

    def __init__(self, config: Config) -> None:
        super().__init__("Tokenizer", _library().make("OgaCreateTokenizerFromConfig", config.handle, slow=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        library = _library()
        found = library.make("OgaCreateSequences")
        try:
            library.call("OgaTokenizerEncode", self.handle, text.encode(), found)
            count = library.fast.OgaSequencesGetSequenceCount(found, c_size_t(0))
            return library.fast.OgaSequencesGetSequenceData(found, c_size_t(0))[:count] if count else []
        finally:
            library.destroy("Sequences", found)

    def apply_chat_template(self, messages: str, *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, which is given as JSON."""
        library = _library()
        given = (self.handle, None, messages.encode(), None, c_bool(add_generation_prompt))
        found = library.make("OgaTokenizerApplyChatTemplate", *given)
        try:
            return ctypes.string_at(found.value or 0).decode()
        finally:
            library.destroy("String", found)

    def create_stream(self) -> TokenizerStream:
        """What makes text of single tokens."""
        return TokenizerStream(self)


class TokenizerStream(_Owned):
    """Makes text of tokens as they come: whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__("TokenizerStream", _library().make("OgaCreateTokenizerStream", tokenizer.handle))

    def decode(self, token: int) -> str:
        """What a next token adds."""
        found = _library().make("OgaTokenizerStreamDecode", self.handle, c_int32(token))
        return ctypes.string_at(found.value or 0).decode()


class Adapters(_Owned):
    """A model's adapters that generators can switch on."""

    def __init__(self, model: Model) -> None:
        super().__init__("Adapters", _library().make("OgaCreateAdapters", model.handle))

    def load(self, file: str, name: str) -> None:
        """Read an adapter's file."""
        _library().call("OgaLoadAdapter", self.handle, file.encode(), name.encode(), slow=True)


class GeneratorParams(_Owned):
    """What a generator is made with."""

    def __init__(self, model: Model) -> None:
        super().__init__("GeneratorParams", _library().make("OgaCreateGeneratorParams", model.handle))

    def set_search_options(self, **options: float) -> None:
        """Set numbers and switches of genai_config.json's `search`."""
        for name, value in options.items():
            if isinstance(value, bool):
                _library().call("OgaGeneratorParamsSetSearchBool", self.handle, name.encode(), c_bool(value))
            else:
                _library().call("OgaGeneratorParamsSetSearchNumber", self.handle, name.encode(), c_double(value))

    def set_guidance(self, kind: str, data: str) -> None:
        """Set a constraint: json_schema, regex or lark_grammar."""
        given = (kind.encode(), data.encode(), c_bool(False))
        _library().call("OgaGeneratorParamsSetGuidance", self.handle, *given)


@contextlib.contextmanager
def _tensor_over(values: NDArray[Any]) -> Iterator[c_void_p]:
    """A native tensor over the memory of an array, which has no gaps."""
    library, shape = _library(), (c_int64 * values.ndim)(*values.shape)
    kind = next(number for number, name in _TYPES.items() if name == values.dtype.name)
    data = (c_void_p(values.ctypes.data), shape, c_size_t(values.ndim), c_int(kind))
    tensor = library.make("OgaCreateTensorFromBuffer", *data)
    try:
        yield tensor
    finally:
        library.destroy("Tensor", tensor)


class Generator(_Owned):
    """Tokens that are read and generated, and their KV cache. One thread at a time, but for `interrupt`."""

    def __init__(self, model: Model, params: GeneratorParams) -> None:
        super().__init__("Generator", _library().make("OgaCreateGenerator", model.handle, params.handle, slow=True))
        self._interrupted = False
        self._inputs: list[NDArray[Any]] = []  # whose memory the graph sees
        self._lock = threading.Lock()  # a generator that is interrupted must not be asked whether it is done

    def interrupt(self) -> None:
        """End the call that runs, and all that follow, with `Interrupted`, until `resume`. From any thread."""
        with self._lock:
            self._interrupted = True
            self._option(b"terminate_session", b"1")

    def resume(self, length: int) -> None:
        """Go on after `interrupt`, with the first `length` tokens."""
        with self._lock:
            self._interrupted = False
            self._option(b"terminate_session", b"0")
        self.rewind_to(length)

    def append_tokens(self, ids: Any) -> None:
        """Read tokens: a sequence, or an int32 array of a batch."""
        flat = [int(token) for row in ids for token in row] if getattr(ids, "ndim", 1) > 1 else ids
        array = (c_int32 * len(flat))(*flat)
        self._run("OgaGenerator_AppendTokens", array, c_size_t(len(flat)))

    def generate_next_token(self) -> None:
        """Choose the next token, after reading the last one where that was not read yet."""
        self._run("OgaGenerator_GenerateNextToken")

    def get_next_tokens(self) -> Sequence[int]:
        """The token that was chosen last, of each row."""
        found, count = POINTER(c_int32)(), c_size_t()
        _library().call("OgaGenerator_GetNextTokens", self.handle, byref(found), byref(count))
        return found[: count.value]

    def get_sequence(self, row: int) -> Sequence[int]:
        """All tokens of a row."""
        library, place = _library().fast, c_size_t(row)
        count = library.OgaGenerator_GetSequenceCount(self.handle, place)
        return library.OgaGenerator_GetSequenceData(self.handle, place)[:count] if count else []

    def is_done(self) -> bool:
        """Whether there is nothing to add."""
        with self._lock:
            if self._interrupted:
                raise Interrupted
            return bool(_library().fast.OgaGenerator_IsDone(self.handle))

    def token_count(self) -> int:
        """Tokens of the sequence."""
        return int(_library().fast.OgaGenerator_TokenCount(self.handle))

    def get_logits(self) -> NDArray[np.float32]:
        """Logits (rows, 1, vocabulary) of the next token."""
        return self._tensor("OgaGenerator_GetLogits")

    def get_output(self, name: str) -> NDArray[Any]:
        """A copy of an output of the graph's last run."""
        return self._tensor("OgaGenerator_GetOutput", name.encode())

    def set_logits(self, logits: NDArray[np.float32]) -> None:
        """Put others in the place of the next token's logits; float32."""
        import numpy as np

        with _tensor_over(np.ascontiguousarray(logits, np.float32)) as tensor:
            _library().call("OgaGenerator_SetLogits", self.handle, tensor)

    def get_input(self, name: str) -> NDArray[Any]:
        """A copy of an input of the graph's next run."""
        return self._tensor("OgaGenerator_GetInput", name.encode())

    def set_input(self, name: str, values: NDArray[Any]) -> None:
        """Set a further input of the graph, for all runs; before anything is read. The graph sees this memory, not a copy."""
        with _tensor_over(values) as tensor:
            _library().call("OgaGenerator_SetModelInput", self.handle, name.encode(), tensor)
        self._inputs.append(values)

    def rewind_to(self, length: int) -> None:
        """Forget what follows the first `length` tokens."""
        _library().call("OgaGenerator_RewindTo", self.handle, c_size_t(length))

    def set_active_adapter(self, adapters: Adapters, name: str) -> None:
        """Switch an adapter on."""
        _library().call("OgaSetActiveAdapter", self.handle, adapters.handle, name.encode())

    def _option(self, key: bytes, value: bytes) -> None:
        _library().call("OgaGenerator_SetRuntimeOption", self.handle, key, value)

    def _run(self, name: str, *given: Any) -> None:
        with self._interruptible():
            _library().call(name, self.handle, *given, slow=True)

    def _tensor(self, name: str, *given: Any) -> NDArray[Any]:
        import numpy as np

        library = _library()
        with self._interruptible():
            tensor = library.make(name, self.handle, *given, slow=True)
        try:
            kind, rank, data = c_int(), c_size_t(), c_void_p()
            library.call("OgaTensorGetType", tensor, byref(kind))
            library.call("OgaTensorGetShapeRank", tensor, byref(rank))
            shape = (c_int64 * rank.value)()
            library.call("OgaTensorGetShape", tensor, shape, rank)
            library.call("OgaTensorGetData", tensor, byref(data))
            if kind.value not in _TYPES:
                raise RuntimeError(f"unsupported type of tensor {kind.value}")
            found = np.empty(tuple(shape), _TYPES[kind.value])
            if found.size:
                ctypes.memmove(found.ctypes.data, data, found.nbytes)
            return found
        finally:
            library.destroy("Tensor", tensor)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            if self._interrupted:
                raise Interrupted from None
            raise
