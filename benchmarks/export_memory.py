"""Export a large model's shape with random weights: memory and time of edgetune's quantization beside the model builder's.

    python benchmarks/export_memory.py [--layers 32] [--work FOLDER] [--only edgetune|edgetune-128|builder]

The shape is Phi-3-mini's published configuration (3.8 billion parameters, 7.6 GB of bfloat16 weights, made here in two
minutes); int4 in blocks of 32, rounded to nearest on both sides, and of 128 with zero points with `--only edgetune-128`. Memory is that of all processes added up, every tenth of a
second. Answers of earlier calls are kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from quantization import make

CONFIG: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}
SIDES: dict[str, dict[str, Any]] = {
    "edgetune": {
        "precision": "int4",
        "options": {"prune_lm_head": True},
        "quantization": {"method": "min_max", "bits": 4, "block_size": 32},
    },
    "edgetune-128": {  # as GPTQ and AWQ models of this size are published: what `runtime_vs.py --shape` can compare, too
        "precision": "int4",
        "options": {"prune_lm_head": True},
        "quantization": {"method": "min_max", "bits": 4, "block_size": 128, "zero_points": True},
    },
    "builder": {"precision": "int4", "options": {}},
}


def write_model(folder: Path, layers: int, tokenizer: Path) -> None:
    """Random weights of the shape, a layer a file, and the tokenizer of another folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    width, inner, words = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    made = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=made) * 0.02).to(torch.bfloat16)

    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    write(
        "ends.safetensors", {"model.embed_tokens.weight": matrix(words, width), "lm_head.weight": matrix(words, width)}
    )
    write("norm.safetensors", {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16)})
    for layer in range(layers):
        name = f"model.layers.{layer}"
        write(
            f"layer-{layer}.safetensors",
            {
                f"{name}.self_attn.qkv_proj.weight": matrix(3 * width, width),
                f"{name}.self_attn.o_proj.weight": matrix(width, width),
                f"{name}.mlp.gate_up_proj.weight": matrix(2 * inner, width),
                f"{name}.mlp.down_proj.weight": matrix(width, inner),
                f"{name}.input_layernorm.weight": torch.ones(width, dtype=torch.bfloat16),
                f"{name}.post_attention_layernorm.weight": torch.ones(width, dtype=torch.bfloat16),
            },
        )
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}), encoding="utf-8")
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat_template", "vocab", "merges")):
            shutil.copyfile(path, folder / path.name)


def main() -> None:
    """Make the model, export it on both sides, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("export_memory"))
    parser.add_argument("--tokenizer", type=Path, required=True, help="a transformers folder of at most 32,064 tokens")
    parser.add_argument("--only", choices=tuple(SIDES))
    args = parser.parse_args()
    model = args.work / "model"
    if not (model / "config.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        write_model(model, args.layers, args.tokenizer)
    for name, body in SIDES.items():
        if name != args.only and (args.only or name == "edgetune-128"):
            continue
        folder = args.work / name
        kept = folder / "point.json"
        if not kept.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            target = folder / "target.yaml"
            text = {"description": name, "needs": "a CPU", "provider": "cpu", **body}
            target.write_text(yaml.safe_dump(text), encoding="utf-8")
            job = {
                "merged": str(model),
                "out": str(folder / "artifact"),
                "train": None,
                "target": str(target),
                "steps": 0,
            }
            kept.write_text(json.dumps(make(name, job, folder)), encoding="utf-8")
        point = json.loads(kept.read_text(encoding="utf-8"))
        if "failed" in point:
            print(f"{name}: {point['failed']}")
        else:
            print(
                f"{name}: {point['export_s']:,.0f} s, {point['export_mb']:,.0f} MB, artifact {point['size_mb']:,.0f} MB"
            )


if __name__ == "__main__":
    main()
