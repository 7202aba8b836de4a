"""The base of adapters as it is exported: its weights, with the chat template and the stop tokens of their training."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune.export.adapters.read import Adapter, read_adapters
from edgetune.files import TMP_PREFIX, read_json, write_json
from edgetune.models import Base, load_tokenizer, stop_ids
from edgetune.progress import say
from edgetune.run import read_manifest
from edgetune.train.merge import four_bit_base
from edgetune.train.method import QUANTIZATION, link, portable

_CODE = (".py",)


@contextlib.contextmanager
def adapted_base(
    base: Base,
    given: Sequence[tuple[str, Path]],
    beside: Path,
    *,
    onto: str = "trained",
    trust_remote_code: bool = False,
) -> Iterator[tuple[Path, list[Adapter]]]:
    """The base that adapters run on, as a transformers folder while the block runs, and the adapters.

    Its tokenizer has the chat template of the adapters' training, and answers end at their stop tokens, too.

    Args:
        base: the base model.
        given: names and folders of the adapters.
        beside: folder in which a temporary one is made. Weights are linked to, not copied, where they can be.
        onto: of adapters that were trained with qlora, the weights that they run on: `trained` (the 4-bit ones, made
            again, as float32) or `full-precision`. The base as it is for all others.
        trust_remote_code: run code that the base brings.

    Raises:
        InputError: as `read_adapters`.
    """
    adapters = read_adapters(given, base, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix=f"{TMP_PREFIX}base-", dir=beside) as folder:
        for warning in _write(base, [adapter.folder for adapter in adapters], Path(folder), onto, trust_remote_code):
            say(f"export: warning: {warning}")
        yield Path(folder), adapters


def _write(base: Base, adapters: Sequence[Path], out: Path, onto: str, trust_remote_code: bool) -> list[str]:
    """Write weights, tokenizer and configuration. Returns warnings."""
    told: dict[str, Any] = {"warnings": []}
    wanted: tuple[str, ...] = _CODE
    if (adapters[0] / QUANTIZATION).is_file() and onto == "trained":
        model = four_bit_base(base, adapters[0], (), 0.0, trust_remote_code, told)
        model.save_pretrained(out, safe_serialization=True)
    else:
        wanted = (*_CODE, ".safetensors", ".index.json", "config.json")
    for file in base.path.iterdir():
        if file.name.endswith(wanted) and file.name != "tokenizer_config.json":  # written below
            link(file, out / file.name)
    template = adapters[0] / "chat_template.jinja"
    load_tokenizer(
        base.path,
        trust_remote_code=trust_remote_code,
        chat_template=str(template) if template.is_file() else None,
    ).save_pretrained(out)
    _add_stop_ids(base, adapters, out)
    portable(out, base)
    return list(told["warnings"])


def _add_stop_ids(base: Base, adapters: Sequence[Path], out: Path) -> None:
    """An answer ends at the base's stop tokens, and at those that ended answers in training."""
    trained = [read_manifest(folder).get("stop_id") for folder in adapters]
    ids = list(dict.fromkeys([*stop_ids(base.path), *(stop for stop in trained if stop is not None)]))
    file = out / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    write_json(file, {**values, "eos_token_id": ids if len(ids) > 1 else ids[0]})
