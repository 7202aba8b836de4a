"""Attention that looks back a window of tokens only, where the model builder leaves it out.

The builder knows windows of models whose layers take turns (Gemma). Of those whose layers all have one (Phi-3, Mistral)
it writes graphs that see the whole context, and a configuration by which ONNX Runtime GenAI keeps a KV cache too small for
such a graph. `GroupQueryAttention` counts a window as transformers does, the token itself included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.files import write_bytes
from edgetune.models import load_config


def write_windows(artifact: Path, merged: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
    """Give each attention of a graph the model's window.

    Args:
        artifact: its model.onnx is written anew where that is needed; the weights stay as they are.
        merged: transformers folder that it was made from.
        config: genai_config.json of the artifact; a window that no layer's cache has is taken out.
        trust_remote_code: run code that the merged model's folder brings.
    """
    import onnx

    decoder = config["model"]["decoder"]
    if not decoder.get("sliding_window", {"layers": [0]})["layers"]:
        del decoder["sliding_window"]  # no layer listed is read as all of them
    windows = _windows(merged, trust_remote_code)
    if not any(windows):
        return
    file = artifact / "model.onnx"
    graph = onnx.load(str(file), load_external_data=False)
    attentions = [node for node in graph.graph.node if node.op_type == "GroupQueryAttention"]
    if len(attentions) != len(windows):
        return
    for node, window in zip(attentions, windows, strict=True):
        if window:
            kept = [one for one in node.attribute if one.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("local_window_size", window)])
    write_bytes(file, graph.SerializeToString())


def _windows(merged: Path, trust_remote_code: bool) -> list[int]:
    """How many tokens each layer looks back; 0: all."""

    found = load_config(merged, trust_remote_code=trust_remote_code)
    found = found.get_text_config()
    window, layers = getattr(found, "sliding_window", None) or 0, found.num_hidden_layers
    if getattr(found, "use_sliding_window", True) is False:
        window = 0
    kinds = getattr(found, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]
