"""A merged model as GGUF, for `runtime_vs.py`: Llama's or Phi-3's architecture with a byte-level BPE tokenizer.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of keys and tensors are the package `gguf`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.errors import InputError
from edgetune.files import read_json, staged_file
from edgetune.models.check import weight_files

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
# How a text is cut before the merges, as tokenizer.json has it, and what llama.cpp calls that.
_CUTS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}
_KINDS = ("llama", "phi3")  # GGUF's names are those of config.json


def write_gguf(merged: Path, out: Path, half: bool, words: bool = True) -> None:
    """Write a merged model as one GGUF file, all or nothing.

    Args:
        merged: transformers folder, weights in float32.
        out: the file.
        half: matrices in float16; else in float32. Vectors are float32.
        words: with the tokenizer; without it the file takes token ids alone.

    Raises:
        InputError: another architecture or tokenizer than those that are written here.
    """
    from gguf import GGUFWriter

    config = _config(merged)
    with staged_file(out) as temporary:
        writer = GGUFWriter(temporary, config["model_type"])
        _describe(writer, config, half)
        if words:
            _tokenizer(writer, merged, config)
        else:
            writer.add_tokenizer_model("no_vocab")
        tensors = list(_tensors(merged, config))
        for tensor in tensors:
            kind = np.dtype(np.float16 if half and len(tensor.shape) > 1 else np.float32)
            writer.add_tensor_info(tensor.name, tensor.shape, kind, math.prod(tensor.shape) * kind.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:  # one in memory at a time
            writer.write_tensor_data(tensor.values(half))
        writer.close()


def read_bytes(file: Path) -> int:
    """Bytes of weights that a decoding step reads: all of them, of an embedding that is not the head a row."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = sum(int(tensor.n_bytes) for tensor in tensors.values())
    if "output.weight" in tensors:
        embedding = tensors["token_embd.weight"]
        found -= int(embedding.n_bytes) - int(embedding.n_bytes) // int(embedding.shape[1])
    return found


def _config(merged: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(merged / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wrong = None
    if config.get("model_type") not in _KINDS:
        wrong = f"is a {config.get('model_type')} model"
    elif rope.get("rope_type", "default") != "default":
        wrong = f"has rotary angles of the kind {rope['rope_type']}"
    elif (config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1) != 1:
        wrong = "turns a part of each head only"
    elif config.get("attention_bias") or config.get("mlp_bias"):
        wrong = "has biases"
    if wrong:
        raise InputError(wrong, where=merged, fix="only plain Llama and Phi-3 models are written as GGUF here")
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config


def _describe(writer: Any, config: dict[str, Any], half: bool) -> None:
    writer.add_name("merged")
    writer.add_file_type(1 if half else 0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    if config["model_type"] == "phi3":
        length = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(length)
        if config.get("sliding_window"):
            writer.add_sliding_window(config["sliding_window"])
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _tokenizer(writer: Any, merged: Path, config: dict[str, Any]) -> None:
    found = read_json(merged / "tokenizer.json")
    model, cuts = found["model"], found.get("pre_tokenizer") or {}
    kinds = tuple(part["type"] for part in cuts.get("pretokenizers", [cuts]) if part)
    if model.get("type") != "BPE" or kinds not in _CUTS:
        raise InputError(
            f"has a tokenizer of the kind {model.get('type')} after {', '.join(kinds) or 'nothing'}",
            where=merged / "tokenizer.json",
            fix="only byte-level BPE, digits apart or not, is written as GGUF here",
        )
    size = config["vocab_size"]
    added = found.get("added_tokens", [])
    if (most := max([*model["vocab"].values(), *(token["id"] for token in added)], default=0)) >= size:
        what = f"has a token {most}, and the model {size:,} of them"
        raise InputError(what, where=merged / "tokenizer.json", fix="take the model's own tokenizer")
    tokens, types = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, _NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_CUTS[kinds])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for which in ("bos", "eos", "pad"):
        number = config.get(f"{which}_token_id")
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            getattr(writer, f"add_{which}_token_id")(number)
    template = merged / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the merged model: GGUF's name, and where it lies. `heads`: rows are put in order for so many of them."""

    name: str
    file: Path
    key: str
    shape: tuple[int, ...]
    heads: int | None

    def values(self, half: bool) -> np.ndarray:
        """Its values, matrices in float16 where `half`, else float32."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:  # numpy has no bfloat16
            values = opened.get_tensor(self.key).float().numpy()
        if self.heads is not None:
            values = rotary_pairs(values, self.heads)
        return values.astype(np.float16 if half and values.ndim > 1 else np.float32)


def _tensors(merged: Path, config: dict[str, Any]) -> Iterator[_Tensor]:
    """Each tensor under GGUF's name. Rows of Llama's q and k are put in llama.cpp's order of rotary pairs; Phi-3's, which
    it turns as transformers does, stay as they are."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import safe_open

    llama = config["model_type"] == "llama"
    names = get_tensor_name_map(MODEL_ARCH.LLAMA if llama else MODEL_ARCH.PHI3, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]} if llama else {}
    for file in weight_files(merged):
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                if key == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise InputError(f"has a tensor that a {config['model_type']} model has not: {key}", where=file)
                shape = tuple(opened.get_slice(key).get_shape())
                yield _Tensor(name, file, key, shape, heads.get(key.split(".")[-2]))


def rotary_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix (heads * D, H) with the two halves of each head interleaved.

    transformers turns row i of a head with row i + D/2, llama.cpp with its neighbour.
    """
    rows, width = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def describe(file: Path) -> str:
    """How many matrices of which type a GGUF file has, such as `Q4_0 210, Q8_0 1`."""
    from collections import Counter

    from gguf import GGUFReader

    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


if __name__ == "__main__":
    import sys

    job = json.loads(sys.argv[1])
    write_gguf(Path(job["merged"]), Path(job["out"]), job["half"])
