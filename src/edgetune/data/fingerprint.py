"""What decides which tokens a row becomes, as one hash: equal hashes, equal tokens."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgetune.data.render import Renderer
from edgetune.files import digest

# Raised when `Renderer` gives other tokens, or learns others, for the same row.
RENDERING = 1


def folder_of(tokenizer: Any) -> Path | None:
    """The folder that a tokenizer was loaded from, None when it is there no longer or was never loaded."""
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name).absolute() if name and (Path(name) / "tokenizer_config.json").is_file() else None


def brings_code(tokenizer: Any) -> bool:
    """Whether it is the model's own Python code (loaded with `trust_remote_code`)."""
    return type(tokenizer).__module__.split(".")[0] == "transformers_modules"


def fingerprint(renderer: Renderer) -> str | None:
    """Hex SHA-256 of the tokenizer, its chat template, the stop ids and the versions of what runs them.

    None when it cannot be told: a tokenizer written in Python whose files are gone.
    """
    tokenizer = renderer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not brings_code(tokenizer):
        backend.no_truncation()  # what the last call asked for; each call sets it anew
        backend.no_padding()
        content: Any = hashlib.sha256(backend.to_str().encode()).hexdigest()
    else:
        from edgetune.models.base import file_hashes

        folder = folder_of(tokenizer)
        if folder is None:
            return None
        content = file_hashes(folder)
    return digest(
        {
            "rendering": RENDERING,
            "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
            "class": type(tokenizer).__qualname__,
            "content": content,
            "added": {str(i): repr(token) for i, token in sorted(tokenizer.added_tokens_decoder.items())},
            "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
            "chat_template": tokenizer.chat_template,
            "stop_ids": sorted(renderer.stop_ids),
        }
    )
