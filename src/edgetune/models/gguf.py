"""GGUF files: dequantized to float32 once, and kept as a transformers folder.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; transformers reads and dequantizes it.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.errors import InputError, first_line, need
from edgetune.files import HashCache, read_json, require_space, staged_folder, write_json
from edgetune.models import store
from edgetune.models.base import Base, Source, file_hashes
from edgetune.models.check import check_folder
from edgetune.models.quiet import bars_swallowed, paced, quiet
from edgetune.progress import Task, task

MAGIC = b"GGUF"
_FLOAT32_BYTES = 4
_WEIGHTS_TO_TOKENIZER = 3.5  # time to load the one over time to load the other, as measured


@dataclass(frozen=True)
class Origin:
    """Where a GGUF file came from."""

    name: str  # of the kept folder
    id: str
    source: Source = "gguf"
    revision: str | None = None
    license: str | None = None
    upstream: str | None = None


def from_file(file: Path) -> Base:
    """A GGUF file of the user's as a transformers folder, converted once. Raises InputError."""
    _require_file(file)
    return converted(file, sha256_of(file), Origin(name=file.stem, id=str(file)))


def cached(file: Path) -> Base | None:
    """The conversion of a GGUF file if there is one. Raises InputError: no such file, or it is broken."""
    _require_file(file)
    found = store.lookup(store.entry_for(file.stem, sha256_of(file)))
    if found is None:
        _inspect(file)
        return None
    return replace(found, id=str(file), source="gguf")


def _require_file(file: Path) -> None:
    if not file.exists():
        raise InputError("no such file", where=file, fix="check `model.id`")
    if not file.is_file():
        raise InputError("is no file", where=file, fix="give the .gguf file itself")


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file; an unchanged one is not read again."""
    cache = HashCache()
    value = cache.file(file)
    cache.save()
    return value


def converted(file: Path, sha: str, origin: Origin) -> Base:
    """The kept conversion of a GGUF file; made now when there is none, or when it is damaged.

    Args:
        file: the GGUF file.
        sha: its SHA-256, hex.
        origin: what is recorded of it.

    Raises:
        InputError: broken, truncated or unsupported file, or no room on the disk.
    """
    entry = store.entry_for(origin.name, sha)
    found = store.lookup(entry)
    if found is None:
        with store.locked(entry):
            found = store.lookup(entry) or convert(file, entry, origin)
    return replace(found, id=origin.id, source=origin.source)


def convert(file: Path, entry: Path, origin: Origin) -> Base:
    """Convert `file` into the folder `entry`, whose lock is held. Raises InputError."""
    need("torch", "transformers")
    elements, license = _inspect(file)
    require_space(entry, int(elements * _FLOAT32_BYTES * 1.05), f"the float32 copy of {file.name}")
    origin = replace(origin, license=origin.license or license)
    with task(f"convert {origin.name}", total=100) as shown, staged_folder(entry) as staged:
        _to_folder(file, staged, shown)
        _clean(staged)
        check_folder(staged)
        base = Base(
            path=entry,
            id=origin.id,
            source=origin.source,
            revision=origin.revision,
            license=origin.license,
            files=file_hashes(staged),
            upstream=origin.upstream,
        )
        store.seal(staged, base)
    return base


def _inspect(file: Path) -> tuple[int, str | None]:
    """Number of weights and stated licence; checks the header, and that all tensors lie within the file."""
    with file.open("rb") as handle:
        magic = handle.read(4)
    if magic != MAGIC:
        raise InputError(
            "is no GGUF file",
            where=file,
            fix="download or copy it again; a transformers model is given as its folder",
        )
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise InputError(
            "is one part of a split GGUF", where=file, fix="join the parts with `llama-gguf-split --merge`"
        )
    need("gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
        field = reader.get_field("general.license")
        license = str(field.contents()) if field else None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, MemoryError) as error:
        raise InputError(
            "the GGUF file is truncated or broken", where=file, fix="download or copy it again, whole"
        ) from error
    if elements == 0:
        raise InputError("the GGUF file holds no weights", where=file, fix="give the file of a whole model")
    return elements, license


def _to_folder(file: Path, out: Path, shown: Task) -> None:
    """Dequantize to float32 and save; `shown` goes from 0 to 100."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = 0.0

    def at(share: float, note: str) -> None:
        nonlocal done
        if share > done:
            shown.advance(100 * (share - done), note)
            done = share

    at(0.02, "tokenizer")
    try:
        start = time.monotonic()
        with quiet(), bars_swallowed():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            at(0.2, "weights")
            # Most of the time goes into reading the header, which loading the weights does several times.
            expected = _WEIGHTS_TO_TOKENIZER * (time.monotonic() - start)
            with paced(expected, lambda share: at(0.2 + 0.65 * share, "weights")):
                model, info = AutoModelForCausalLM.from_pretrained(
                    file.parent,
                    gguf_file=file.name,
                    dtype=torch.float32,
                    local_files_only=True,
                    output_loading_info=True,
                )
    except OSError as error:
        if error.errno is not None:
            raise
        raise _not_convertible(file, error) from error
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
    ) as error:
        raise _not_convertible(file, error) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        first = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])[0]
        raise InputError(
            f"the GGUF file lacks weights, first {first}", where=file, fix="give the file of a whole model"
        )
    broken = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if broken:
        raise InputError(
            f"weights are not numbers (NaN or infinite), first {broken}", where=file, fix="download it again"
        )
    at(0.85, "saving")
    _forget_quantization(model)
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    for weights in out.glob("*.safetensors"):  # written for their owner only; like the rest, the umask decides
        shutil.copymode(out / "config.json", weights)


def _not_convertible(file: Path, error: Exception) -> InputError:
    return InputError(
        f"transformers cannot convert this GGUF file: {first_line(error)}",
        where=file,
        fix="give the model as a transformers folder or hub id",
    )


def _forget_quantization(model: Any) -> None:
    """The weights are float32 now; a model that still carries its quantizer refuses to be saved."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _clean(folder: Path) -> None:
    """Take out what the conversion left in the JSON files and is untrue elsewhere: options, names, paths."""
    noise = {
        "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path", "gguf_file"),
        "config.json": ("_name_or_path", "_model_name_or_path", "quantization_config"),
        "generation_config.json": ("_from_model_config",),
    }
    for name, keys in noise.items():
        path = folder / name
        if path.is_file():
            cleaned = {
                key: value
                for key, value in read_json(path).items()
                if key not in keys and not (isinstance(value, str) and Path(value).is_absolute())
            }
            write_json(path, cleaned)
