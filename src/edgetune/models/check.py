"""Whether a folder can be a base model, told before anything heavy is imported.

Checked are the files, not the numbers in them: config, tokenizer, and that every safetensors file is as long
as its header says (the layout, from https://github.com/huggingface/safetensors: 8 bytes of header length,
little endian, the JSON header, the data).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from edgetune.errors import InputError, need
from edgetune.files import read_json
from edgetune.models.base import model_files

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_MAX_HEADER = 100_000_000  # bytes; the format's own limit

TO_SAFETENSORS = (
    "pickle files can run code, so edgetune does not open them; where you trust them, convert once with "
    "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and the "
    "tokenizer likewise"
)


class Incomplete(InputError):
    """A file that every model has is not there, as in a download that broke off."""


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check that `folder` is a whole transformers model that can be loaded safely.

    Args:
        folder: config.json, *.safetensors, tokenizer files.
        trust_remote_code: accept a model that only works with the Python code in its folder.

    Raises:
        InputError: naming the file and the cure.
    """
    if not folder.exists():
        raise InputError("no such folder", where=folder, fix="check `model.id`; a hub id is written ORGANISATION/NAME")
    if not folder.is_dir():
        raise InputError("is a file; a model is a folder or a .gguf file", where=folder, fix=_for_file(folder))
    _not_something_else(folder)
    _links(folder)
    config = _config(folder)
    for shard in weight_files(folder):
        check_safetensors(shard)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise Incomplete(
            "there is no tokenizer (tokenizer.json, tokenizer.model, vocab.json, …)",
            where=folder,
            fix="copy the tokenizer's files from the model that this one was made from",
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _object(folder / name)
    _code(folder, config, trust_remote_code)


def _for_file(file: Path) -> str:
    if file.suffix in PICKLES:
        return TO_SAFETENSORS
    return f"give the folder that holds it: {file.parent}"


def _not_something_else(folder: Path) -> None:
    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has("adapter_config.json"):
        raise InputError(
            "is an adapter, not a base model",
            where=folder,
            fix="fold it into its base with `edgetune merge`, then give the merged folder",
        )
    if has("genai_config.json"):
        raise InputError(
            "is an exported artifact; it can be run, not trained",
            where=folder,
            fix="give the merged model that it was made from",
        )
    if has("recipe.json") and (folder / "merged").is_dir():
        raise InputError("is a run, not a model", where=folder, fix=f"give its merged model: {folder / 'merged'}")
    if not has("config.json"):
        below = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise Incomplete(
            "there is no config.json, so this is no model folder",
            where=folder,
            fix=f"did you mean {folder / below[0]}?"
            if below
            else "a model folder holds config.json, *.safetensors and the tokenizer's files",
        )


def _links(folder: Path) -> None:
    """No link may lead out of the folder, but for hub snapshots, which consist of links to `../../blobs`."""
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in model_files(folder):
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(
                f"is a link that leads out of the folder, to {target}", where=path, fix="copy the file here"
            )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = _object(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(
            "names no `model_type`",
            where=path,
            fix="take config.json from the model that this one was made from",
        )
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else "unknown method"
        raise InputError(
            f"the weights are already quantized ({method})",
            where=path,
            fix="give the model in full precision; quantization happens in `edgetune export`",
        )
    return config


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError("holds no JSON object", where=path, fix="copy it again from where the model came from")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will load."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        return _shards(index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise InputError(
            f"the weights are called {others[0]}; transformers loads {SINGLE}, or shards that {INDEX} names",
            where=folder,
            fix="rename the file, or copy the index from where the model came from",
        )
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name != "training_args.bin"
    )
    if pickles:
        raise InputError(f"there are only pickle weights ({pickles[0]})", where=folder, fix=TO_SAFETENSORS)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise InputError("there are only GGUF weights", where=folder, fix=f"give the file: {ggufs[0]}")
    raise Incomplete(
        "there are no weights (*.safetensors)", where=folder, fix="download or copy the model again, whole"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = _object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            "holds no `weight_map`", where=index, fix="copy the index again from where the model came from"
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"names {name!r}, which is no safetensors file of this folder",
                where=index,
                fix="do not use this model",
            )
        if not (index.parent / name).is_file():
            raise Incomplete(
                f"{name} is missing ({len(names)} shards belong to this model)",
                where=index.parent,
                fix="copy or download it again",
            )
    return [index.parent / name for name in names]


def check_safetensors(file: Path) -> dict[str, Any]:
    """Check a safetensors file's header, and that the file is as long as it says. Raises InputError.

    Returns:
        What the header says of each tensor: `dtype`, `shape`, `data_offsets`.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise InputError(f"is no safetensors file ({size:,} bytes)", where=file, fix="download or copy it again")
        raw = handle.read(length)
    if len(raw) < length:
        raise _truncated(file, size, 8 + length)
    try:
        header = json.loads(raw)
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            "is no safetensors file: its header is broken", where=file, fix="download or copy it again"
        ) from error
    promised = 8 + length + max(ends, default=0)
    if size < promised:
        raise _truncated(file, size, promised)
    if size > promised:
        raise InputError(
            f"is {size:,} bytes long, its header says {promised:,}",
            where=file,
            fix="download or copy it again",
        )
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _truncated(file: Path, size: int, promised: int) -> InputError:
    return InputError(
        f"is truncated: {size:,} bytes of at least {promised:,}",
        where=file,
        fix="download or copy it again, whole",
    )


def _code(folder: Path, config: dict[str, Any], trusted: bool) -> None:
    """Custom code needs trust, unless transformers has the architecture itself, as it has Phi-3's."""
    # Such models still bring the code that was needed before; transformers then uses its own.
    if trusted or not config.get("auto_map"):
        return
    need("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config["model_type"] not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"the architecture `{config['model_type']}` needs Python code that the model's folder brings",
            where=folder,
            fix="read its *.py files; where you trust them, set `model.trust_remote_code: true`",
        )
