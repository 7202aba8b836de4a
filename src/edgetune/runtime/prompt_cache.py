"""What was read of prompts, kept on disk: a fixed system prompt is read once, and taken up by every process that comes after.

Whole pieces are kept (`prefix.py`), so an answer is bit for bit that of a fresh start. A file counts for one artifact, processor,
version of ONNX Runtime and way of running only, by the digest in its name. It is in the format of safetensors: eight bytes with the length of a JSON
header, the header, then one tensor, `kv`: keys and values of each layer in turn (2 × layers, heads, tokens, head size).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError
from edgetune.files import digest, home, require_space, staged_file
from edgetune.progress import say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgetune.runtime.artifact import Artifact
    from edgetune.runtime.profile import Settings

GRAPH = "restore.onnx"
SWITCH, GIVEN = "restore", "restore.kv"  # its further inputs
FORMAT = "edgetune/prompt/1"
MOST_BYTES = 2_000_000_000  # of all files; those not used for longest go
LEAST_TOKENS = 32  # fewer are as soon read
_LONGEST_HEADER = 16 << 20
_ALIGNED = 64
# Names of types in safetensors' header, and numpy's.
_TYPES = {"F32": "float32", "F16": "float16", "I8": "int8", "U8": "uint8"}


@dataclass(frozen=True)
class Kept:
    """A prompt's beginning on disk.

    Attributes:
        path: its file.
        ids: the tokens.
        cuts: where its whole pieces end.
        adapter: the one that was on.
        kind, shape, begin: of the tensor.
        sha256: of all that is named here, and the tensor's bytes.
    """

    path: Path
    ids: list[int]
    cuts: list[int]
    adapter: str | None
    kind: str
    shape: tuple[int, ...]
    begin: int
    sha256: str


def state_names(decoder: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the graph's caches, inputs and outputs: key and value of each layer in turn, as genai_config.json has them."""
    found = []
    for side, when in (("inputs", "past"), ("outputs", "present")):
        keys, values = (decoder[side][f"{when}_{what}_names"] for what in ("key", "value"))
        layers = range(int(decoder["num_hidden_layers"]))
        found.append([name.replace("%d", str(layer)) for layer in layers for name in (keys, values)])
    return found[0], found[1]


def require(artifact: Artifact, provider: str) -> None:
    """Raise InputError where an artifact cannot take a kept prompt up."""
    if provider != "cpu":
        raise InputError(
            f"prompts are kept on disk for the CPU only, not for {provider}", where="prompt_cache", fix="leave it out"
        )
    if GRAPH not in artifact.manifest["outputs"]:
        raise InputError(
            f"the artifact has no {GRAPH}, which takes up prompts that were read before",
            where=artifact.path,
            fix="export it again (not for static graphs), or leave the prompt cache out",
        )


class PromptCache:
    """The files of one artifact in one way of running it. What cannot be read or written is left out, and said once.

    Args:
        artifact: what reads; `require` has been asked.
        settings: how it runs.
        piece: most tokens of a prompt that are read at once.
        folder: where the files are; edgetune's own folder when None.
    """

    def __init__(self, artifact: Artifact, settings: Settings, piece: int, folder: Path | None = None) -> None:
        from edgetune.runtime.hardware import cpu
        from edgetune.runtime.profile import artifact_digest, engine

        self.folder = folder or home() / "prompts"
        self._pasts, self._presents = state_names(artifact.config["model"]["decoder"])
        self._empty: NDArray[Any] | None = None  # a cache without tokens
        self._way = digest([FORMAT, artifact_digest(artifact), cpu(), engine(), settings.overlay(), piece])[:16]
        self._known: dict[tuple[str, int], Kept] = {}
        self._said = False

    def find(self, ids: list[int], adapter: str | None, least: int = 0) -> tuple[Kept, NDArray[Any]] | None:
        """The longest kept beginning of a prompt, and its cache, mapped from the file.

        Args:
            ids: the prompt; its last token is read in any case.
            adapter: the one that is on.
            least: more tokens than these.
        """
        fitting = [
            kept
            for kept in self._all()
            if kept.adapter == adapter and least < len(kept.ids) < len(ids) and ids[: len(kept.ids)] == kept.ids
        ]
        for kept in sorted(fitting, key=lambda one: -len(one.ids)):
            try:
                states = _mapped(kept)
                os.utime(kept.path)
            except (OSError, ValueError) as error:
                self._drop(kept.path, str(error))
            else:
                return kept, states
        return None

    def attach(self, generator: Any, found: tuple[Kept, NDArray[Any]] | None) -> None:
        """Give a new generator of the graph, which has read nothing, its further inputs, and the cache that was found."""
        import numpy as np

        if self._empty is None:
            states = generator.get_input(self._pasts[0])
            self._empty = np.empty((len(self._pasts), states.shape[1], 0, states.shape[3]), states.dtype)
        switch = np.array([found is not None])
        generator.set_input(SWITCH, switch)
        generator.set_input(GIVEN, self._empty if found is None else found[1])
        if found is not None:
            generator.append_tokens(found[0].ids)
            switch[0] = False  # the generator sees this memory: what comes next is read

    def save(self, generator: Any, ids: list[int], cuts: list[int], adapter: str | None) -> None:
        """Keep what a generator has read: the tokens `ids` and maybe others behind them."""
        import numpy as np

        path = self.folder / f"{self._way}-{_name(ids, adapter)}"
        if len(ids) < LEAST_TOKENS or path.is_file():
            return
        states = np.stack([generator.get_output(name)[0, :, : len(ids)] for name in self._presents])
        kind = next((name for name, numpys in _TYPES.items() if numpys == states.dtype.name), None)
        if kind is None:
            return
        data = np.ascontiguousarray(states).data.cast("B")
        told = {
            "format": FORMAT,
            "ids": ids,
            "cuts": cuts,
            "adapter": adapter,
            "sha256": _hash(ids, cuts, adapter, data),
        }
        tensor = {"dtype": kind, "shape": list(states.shape), "data_offsets": [0, data.nbytes]}
        header = json.dumps({"__metadata__": {"edgetune": json.dumps(told)}, "kv": tensor}).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNED)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(data.nbytes)
            require_space(self.folder, data.nbytes, "keeping a prompt")
            with staged_file(path) as temporary:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(len(header).to_bytes(8, "little") + header)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        except (OSError, InputError) as error:
            self._say(f"the prompt is not kept in {self.folder}: {error}")

    def _all(self) -> list[Kept]:
        known = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{self._way}-*"):
                try:
                    key = path.name, path.stat().st_size
                    known[key] = self._known.get(key) or _header(path)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    self._drop(path, str(error))
        self._known = known
        return list(known.values())

    def _make_room(self, needed: int) -> None:
        """Remove the files, of any artifact, that were not used for longest, until another one may be there."""
        files = sorted(
            ((path.stat(), path) for path in self.folder.glob("*.safetensors")), key=lambda one: one[0].st_mtime
        )
        total = sum(found.st_size for found, _ in files) + needed
        for found, path in files:
            if total <= MOST_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= found.st_size

    def _drop(self, path: Path, why: str) -> None:
        self._say(f"{path} is damaged, and removed: {why}")
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _say(self, words: str) -> None:
        if not self._said:
            self._said = True
            say(words)


def _name(ids: list[int], adapter: str | None) -> str:
    return f"{digest([ids, adapter])[:24]}.safetensors"


def _hash(ids: list[int], cuts: list[int], adapter: str | None, data: memoryview) -> str:
    found = hashlib.sha256(json.dumps([ids, cuts, adapter]).encode())
    found.update(data)
    return found.hexdigest()


def _header(path: Path) -> Kept:
    """Read what a file says of itself. Raises OSError, ValueError, KeyError, TypeError: it is not whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError("its header has no length")
        found = json.loads(file.read(length))
    told, tensor = json.loads(found["__metadata__"]["edgetune"]), found["kv"]
    ids, cuts, adapter, shape = told["ids"], told["cuts"], told["adapter"], tuple(tensor["shape"])
    if told["format"] != FORMAT or not path.name.endswith(_name(ids, adapter)):
        raise ValueError("its name is not that of its tokens")
    if len(shape) != 4 or shape[2] != len(ids) or cuts[-1] != len(ids):
        raise ValueError("its shapes do not fit its tokens")
    return Kept(path, ids, cuts, adapter, _TYPES[tensor["dtype"]], shape, 8 + length, told["sha256"])


def _mapped(kept: Kept) -> NDArray[Any]:
    """The cache, checked and mapped. Raises OSError, ValueError: the file is another one, or not whole."""
    import numpy as np

    with kept.path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = memoryview(whole)[kept.begin :]
    if _hash(kept.ids, kept.cuts, kept.adapter, data) != kept.sha256:
        raise ValueError("its SHA-256 is another one")
    return np.frombuffer(data, kept.kind).reshape(kept.shape)
