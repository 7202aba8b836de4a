"""A tiny real GGUF file (llama, 2 layers, float32), written from a tiny transformers folder."""

from __future__ import annotations

import json
from pathlib import Path

LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    model: Path, to: Path, *, architecture: str = "llama", leave_out: str = "", license: str = "mit"
) -> Path:
    """Write the weights and the tokenizer of folder `model` as a GGUF file."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(str(to), architecture)
    writer.add_name("/home/someone/tiny")
    writer.add_license(license)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([1] * len(tokenizer["vocab"]))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for n in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{n}.{a}.weight": f"blk.{n}.{b}.weight" for a, b in LAYERS.items()}
    for name, weight in load_file(model / "model.safetensors").items():
        if leave_out and leave_out in name:
            continue
        if "q_proj" in name or "k_proj" in name:  # GGUF stores the rotary halves interleaved
            n = heads if "q_proj" in name else kv_heads
            rows, columns = weight.shape
            weight = weight.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names[name], weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
