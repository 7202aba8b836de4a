"""How many bytes of weights one decoding step reads, out of the graph itself.

Reads just enough of ONNX's protobuf (onnx.proto, fields by number) to know the initializers and who uses them: the
package `onnx` is not part of the runtime.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Inputs of which a step reads one row: tables that are looked up by token or by position.
_LOOKED_UP = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "GroupQueryAttention": {7, 8},
    "RotaryEmbedding": {2, 3},
}
_VIEWS = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}  # folded when the graph is loaded
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}


@dataclass(frozen=True)
class _Weight:
    place: tuple[Any, ...]  # what the bytes are: two names may share them
    dims: tuple[int, ...]
    bits: int

    @property
    def size(self) -> float:
        return math.prod(self.dims) * self.bits / 8

    @property
    def row(self) -> float:
        return self.size / max(self.dims[0] if self.dims else 1, 1)


def weight_bytes(graph: Path) -> int | None:
    """Bytes of weights that a decoding step reads, for one row: every weight once, of looked-up tables a row.

    The KV cache is not counted. None where the file is no ONNX graph.
    """
    try:
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return _count(view)
            finally:
                view.release()
    except (OSError, ValueError, IndexError, BufferError):  # BufferError: what was read when it broke is still held
        return None


def _count(model: memoryview) -> int | None:
    weights: dict[str, _Weight] = {}
    nodes = []
    for body in _parts(model, 7):
        for tensor in _parts(body, 5):
            name, weight = _tensor(tensor)
            weights[name] = weight
        nodes += [_node(node) for node in _parts(body, 1)]
    if not nodes:
        return None
    whole: dict[tuple[Any, ...], float] = {}
    rows: dict[tuple[Any, ...], float] = {}
    for op, inputs, outputs, to in nodes:  # a graph lists its nodes in the order of their work
        for index, name in enumerate(inputs):
            if name not in weights:
                continue
            weight = weights[name]
            if op in _VIEWS:
                if index == 0:
                    dims = weight.dims[::-1] if op == "Transpose" else weight.dims
                    weights[outputs[0]] = replace(weight, dims=dims, bits=_BITS.get(to or 0, weight.bits))
            elif index in _LOOKED_UP.get(op, ()):
                rows[weight.place] = weight.row
            else:
                whole[weight.place] = max(weight.size, whole.get(weight.place, 0))
    return round(sum(whole.values()) + sum(rows.values()))


def _tensor(body: memoryview) -> tuple[str, _Weight]:
    dims: list[int] = []
    kind, name, outside = 0, "", {}
    for number, value in _fields(body):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and not isinstance(value, int):
            name = str(value, "utf-8")
        elif number == 13 and not isinstance(value, int):
            entry = {key: str(text, "utf-8") for key, text in _fields(value) if not isinstance(text, int)}
            outside[entry.get(1, "")] = entry.get(2, "")
    place = (outside["location"], outside.get("offset", "0")) if "location" in outside else (name,)
    return name, _Weight(place, tuple(dims), _BITS.get(kind, 8))


def _node(body: memoryview) -> tuple[str, list[str], list[str], int | None]:
    """Its operator, inputs, outputs, and the type that a Cast makes."""
    names: dict[int, list[str]] = {1: [], 2: [], 4: []}
    to = None
    for number, value in _fields(body):
        if isinstance(value, int):
            continue
        if number in names:
            names[number].append(str(value, "utf-8"))
        elif number == 5:
            attribute = dict(_fields(value))
            if attribute.get(1) == b"to":
                to = attribute.get(3)
    return "".join(names[4]), names[1], names[2], to


def _parts(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in _fields(message):
        if number == wanted and not isinstance(value, int):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or the bytes of what has a length. Fixed-width ones are left out."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        elif kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("cut off")
            yield key >> 3, message[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("not protobuf")


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("not protobuf")
