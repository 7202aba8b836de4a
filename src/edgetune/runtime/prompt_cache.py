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
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError, first_line
from edgetune.files import TMP_PREFIX, digest, home, require_space, staged_file
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
MOST_LOGITS = 128 << 20  # bytes: taking a prompt up makes logits of all its tokens, where the head is not pruned
_ABANDONED_S = 3600  # files under temporary names are of dead processes after that
_LONGEST_HEADER = 16 << 20
_ALIGNED = 64
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{24}\.safetensors")
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
        begin: where the tensor begins in it.
        told: all that it says of itself.
    """

    path: Path
    ids: list[int]
    cuts: list[int]
    adapter: str | None
    begin: int
    told: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What of a prompt need not be read.

    Attributes:
        ids: its first tokens.
        cuts: where whole pieces end.
        states: their cache (2 × layers, heads, tokens, head size).
    """

    ids: list[int]
    cuts: list[int]
    states: NDArray[Any]


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
            fix="leave the prompt cache out; or export it again, if it is older than this file: graphs of fixed shapes, with a cache "
            "that slides, or with layers of several shapes have none",
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

        self.folder = Path(folder) if folder else home() / "prompts"
        self._pasts, self._presents = state_names(artifact.config["model"]["decoder"])
        self._empty: NDArray[Any] | None = None  # a cache without tokens
        self._way = digest([FORMAT, artifact_digest(artifact), cpu(), engine(), settings.overlay(), piece])[:16]
        self._most = artifact.max_length
        if not artifact.last_logits_only:
            self._most = MOST_LOGITS // (4 * int(artifact.config["model"]["vocab_size"]))
        self._known: dict[tuple[str, int], Kept] = {}
        self._said = self._full = False

    def find(self, ids: list[int], adapter: str | None, least: int = 0) -> Found | None:
        """The longest kept beginning of a prompt, in whole pieces.

        Args:
            ids: the prompt; its last token is read in any case.
            adapter: the one that is on.
            least: more tokens than these.
        """
        fitting = []
        for kept in self._all():
            most = min(len(kept.ids), len(ids) - 1, self._most)
            common = next((place for place in range(most) if kept.ids[place] != ids[place]), most)
            cuts = [cut for cut in kept.cuts if cut <= common]
            if kept.adapter == adapter and cuts and cuts[-1] > least:
                fitting.append((cuts, kept))
        for cuts, kept in sorted(fitting, key=lambda one: -one[0][-1]):
            if (states := self._read(kept)) is not None:
                return Found(kept.ids[: cuts[-1]], cuts, states[:, :, : cuts[-1]])
        return None

    def attach(self, generator: Any, found: Found | None) -> None:
        """Give a new generator of the graph, which has read nothing, its further inputs, and the cache that was found."""
        import numpy as np

        if self._empty is None:
            states = generator.get_input(self._pasts[0])
            self._empty = np.empty((len(self._pasts), states.shape[1], 0, states.shape[3]), states.dtype)
        switch = np.array([found is not None])
        generator.set_input(SWITCH, switch)
        generator.set_input(GIVEN, self._empty if found is None else np.ascontiguousarray(found.states))
        if found is not None:
            generator.append_tokens(found.ids)
            switch[0] = False  # the generator sees this memory: what comes next is read

    def save(self, generator: Any, ids: list[int], cuts: list[int], adapter: str | None) -> None:
        """Keep what a generator has read: of the tokens `ids`, which end pieces at `cuts`, and maybe of others behind them."""
        cuts = [cut for cut in cuts if cut <= self._most]
        if self._full or not cuts or cuts[-1] < LEAST_TOKENS:
            return
        try:
            self._write(generator, ids[: cuts[-1]], cuts, adapter)
        except (
            OSError,
            ValueError,
            MemoryError,
            RuntimeError,
            InputError,
        ) as error:  # the answer is made: it counts more
            self._full = True
            self._say(f"prompts are not kept in {self.folder}: {first_line(error)}")

    def _write(self, generator: Any, ids: list[int], cuts: list[int], adapter: str | None) -> None:
        import numpy as np

        path = self.folder / f"{self._way}-{_name(ids, adapter)}"
        if path.is_file():
            return
        states: NDArray[Any] | None = None
        for place, name in enumerate(self._presents):  # each is a copy of a whole cache
            one = generator.get_output(name)[0, :, : len(ids)]
            if states is None:
                states = np.empty((len(self._presents), *one.shape), one.dtype)
            states[place] = one
        assert states is not None
        kind = next((name for name, numpys in _TYPES.items() if numpys == states.dtype.name), None)
        if kind is None or states.nbytes > MOST_BYTES:
            return
        told = {
            "format": FORMAT,
            "ids": ids,
            "cuts": cuts,
            "adapter": adapter,
            "dtype": kind,
            "shape": list(states.shape),
        }
        data = states.data.cast("B")
        told["sha256"] = _hash(told, data)
        tensor = {"dtype": kind, "shape": told["shape"], "data_offsets": [0, data.nbytes]}
        header = json.dumps({"__metadata__": {"edgetune": json.dumps(told)}, "kv": tensor}).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNED)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_space(self.folder, data.nbytes, "keeping a prompt")
        self._make_room(data.nbytes)
        with staged_file(path) as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def _all(self) -> list[Kept]:
        known = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{self._way}-*"):
                with self._reading(path):
                    key = path.name, path.stat().st_size
                    known[key] = self._known.get(key) or _header(path)
        self._known = known
        return list(known.values())

    def _read(self, kept: Kept) -> NDArray[Any] | None:
        """The cache in a file, checked and mapped; None where that cannot be."""
        states = None
        with self._reading(kept.path):
            states = _mapped(kept)
            with contextlib.suppress(OSError):
                os.utime(kept.path)  # those not used for longest go first
        return states

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """What is damaged is removed; what cannot be read, or is gone meanwhile, is left alone."""
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            self._say(f"{path} cannot be read: {error}")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self._say(f"{path} is damaged, and read anew: {first_line(error)}")
            with contextlib.suppress(OSError):
                path.unlink()

    def _make_room(self, needed: int) -> None:
        """Remove the files, of any artifact, that were not used for longest, until another one may be there."""
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                found = path.stat()
                if path.name.startswith(TMP_PREFIX) and _NAME.search(path.name):
                    if time.time() - found.st_mtime > _ABANDONED_S:
                        path.unlink()
                elif _NAME.fullmatch(path.name):
                    files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files) + needed
        for _, size, path in sorted(files):
            if total <= MOST_BYTES:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size

    def _say(self, words: str) -> None:
        if not self._said:
            self._said = True
            say(words)


def _name(ids: list[int], adapter: str | None) -> str:
    return f"{digest([ids, adapter])[:24]}.safetensors"


def _hash(told: dict[str, Any], data: memoryview) -> str:
    """SHA-256 of all that a file says of itself, and of the tensor's bytes."""
    found = hashlib.sha256(json.dumps({key: value for key, value in told.items() if key != "sha256"}).encode())
    found.update(data)
    return found.hexdigest()


def _header(path: Path) -> Kept:
    """Read what a file says of itself. Raises OSError; ValueError, LookupError, TypeError and others: it is not whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError("its header has no length")
        told = json.loads(json.loads(file.read(length))["__metadata__"]["edgetune"])
    if told["format"] != FORMAT or not path.name.endswith(_name(told["ids"], told["adapter"])):
        raise ValueError("its name is not that of its tokens")
    return Kept(path, told["ids"], told["cuts"], told["adapter"], 8 + length, told)


def _mapped(kept: Kept) -> NDArray[Any]:
    """The cache, checked and mapped. Raises OSError; ValueError: the file is another one, or not whole."""
    import numpy as np

    with kept.path.open("rb") as file:
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    data = whole[kept.begin :]
    if _hash(kept.told, data.data) != kept.told["sha256"]:
        raise ValueError("its SHA-256 is another one")
    return data.view(_TYPES[kept.told["dtype"]]).reshape(kept.told["shape"])
