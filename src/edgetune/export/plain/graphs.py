"""From a torch model to ONNX graphs, by `torch.onnx.export`.

Attention goes into the graph as one operator, `MultiHeadAttention` of ONNX Runtime: through transformers' own
`AttentionInterface`, so that no model is changed. What does not use that interface keeps its own attention.

A sequence-to-sequence model becomes two graphs. `encoder.onnx` gives the keys and values of every decoder layer's attention
over the text (`cross`), which stay the same for a whole answer. `decoder.onnx` reads tokens, `cross`, and keys and values of
the tokens before (`past`, empty at first), and gives logits and these with the new ones (`present`): a step reads one token.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, InputError, first_line
from edgetune.models import load_model
from edgetune.models.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSET = 20
_ATTENTION = "edgetune_graph"
_EXAMPLE = (2, 7)  # batch and length of the inputs that the graph is traced with; sizes stay free


def load_for_graph(folder: Path, loader: str) -> Any:
    """A float32 model whose attention becomes one operator in the graph, where its class allows that.

    Args:
        folder: transformers folder.
        loader: the name of transformers' class that loads it.

    Raises:
        InputError: as `models.load_model`.
    """
    import torch

    _register()
    try:
        return load_model(folder, dtype=torch.float32, loader=loader, attention=_ATTENTION, optional="pooler.")
    except InputError as error:
        if _ATTENTION not in str(error):
            raise
    return load_model(folder, dtype=torch.float32, loader=loader, attention="eager", optional="pooler.")


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])  # masks that are added


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function as `com.microsoft.MultiHeadAttention`, only while a graph is made.

    Args:
        query, key, value: (batch, heads, tokens, head size).
        mask: (batch, 1, tokens, keys) float, added to the scores; all tokens see all keys when None.
        scaling: of the scores; 1/√(head size) when None.
        position_bias: (1, heads, tokens, keys), added likewise.

    Returns:
        (batch, tokens, heads, head size), and no weights.
    """
    import torch

    batch, heads, tokens, size = query.shape
    if key.shape[1] != heads:
        key, value = (one.repeat_interleave(heads // one.shape[1], 1) for one in (key, value))
    bias = mask if position_bias is None else position_bias if mask is None else position_bias + mask
    found = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (query.transpose(1, 2).reshape(batch, tokens, heads * size), key, value, None, None, bias),
        attrs={"num_heads": heads, "scale": float(size**-0.5 if scaling is None else scaling)},
        dtype=query.dtype,
        shape=(batch, tokens, heads * size),
        version=1,
    )
    return found.reshape(batch, tokens, heads, size), None


def encoder_graph(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The graph of an encoder.

    Args:
        model: of `load_for_graph`.
        inputs: names of what it reads, each (batch, length) int64.
        outputs: names of what is taken of its output.
    """
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = self.model(**dict(zip(inputs, values, strict=True)))
            return tuple(found[name] for name in outputs)

    return _graph(Wrapped(), _texts(len(inputs)), inputs, outputs, (_text_shape(inputs),))


def seq2seq_graphs(model: Any) -> tuple[ir.Model, ir.Model]:
    """The encoder's and the decoder's graph; see above.

    Args:
        model: of `load_for_graph`.
    """
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            self.model.get_decoder()(  # of this only what it keeps of the text is used
                input_ids=input_ids[:, :1],
                encoder_hidden_states=hidden,
                encoder_attention_mask=attention_mask,
                use_cache=True,
                **{keyword: cache},
            )
            return _flat(cache.cross_attention_cache)

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            cross: list[torch.Tensor],
            past: list[torch.Tensor],
        ) -> tuple[torch.Tensor, ...]:
            own, of_text = DynamicCache(), DynamicCache()
            for layer in range(len(past) // 2):
                own.update(past[2 * layer], past[2 * layer + 1], layer)
                of_text.update(cross[2 * layer], cross[2 * layer + 1], layer)
            cache = EncoderDecoderCache(own, of_text)
            cache.is_updated = dict.fromkeys(range(len(past) // 2), True)
            unread = attention_mask[:, :, None].to(torch.float32)  # the text's hidden states are in `cross` already
            found = self.model(
                attention_mask=attention_mask,
                decoder_input_ids=input_ids,
                encoder_outputs=(unread,),
                use_cache=True,
                **{keyword: cache},
            )
            return (found.logits, *_flat(own))

    texts = _texts(2)
    encoder = Encoder()
    with torch.no_grad(), own_attention(model):
        cross = list(encoder(*texts))
    layers, (batch, heads, _, size) = len(cross) // 2, cross[0].shape
    past = [torch.randn(batch, heads, 3, size) for _ in cross]
    tokens = torch.randint(1, 9, (batch, 4))
    shapes = (
        {0: _dim("batch"), 1: _dim("tokens")},
        *_text_shape(("attention_mask",)),
        [{0: _dim("batch"), 2: _dim("length")}] * len(cross),
        [{0: _dim("batch"), 2: _dim("past")}] * len(cross),
    )
    texts_in = ("input_ids", "attention_mask")
    return (
        _graph(encoder, texts, texts_in, layer_names("cross", layers), _text_shape(texts_in)),
        _graph(
            Decoder(),
            (tokens, texts[1], cross, past),
            (*texts_in, *layer_names("cross", layers), *layer_names("past", layers)),
            ("logits", *layer_names("present", layers)),
            shapes,
        ),
    )


def layer_names(what: str, layers: int) -> tuple[str, ...]:
    """Names of keys and values of each layer, in the order of the graphs' inputs and outputs."""
    return tuple(f"{what}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))


def _flat(cache: Any) -> tuple[torch.Tensor, ...]:
    return tuple(part for layer in cache.layers for part in (layer.keys, layer.values))


@contextlib.contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Let the model compute with its own attention: the operator cannot."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _texts(count: int) -> tuple[torch.Tensor, ...]:
    """Ids, a mask with padding in it, and type ids, as many of them as are wanted."""
    import torch

    ids, mask = torch.randint(5, 20, _EXAMPLE), torch.ones(_EXAMPLE, dtype=torch.int64)
    mask[-1, -2:] = 0
    return (ids, mask, torch.zeros(_EXAMPLE, dtype=torch.int64))[:count]


def _text_shape(inputs: Sequence[str]) -> tuple[dict[int, Any], ...]:
    return ({0: _dim("batch"), 1: _dim("length")},) * len(inputs)


def _dim(name: str) -> Any:
    import torch

    return torch.export.Dim(name)


def _graph(
    module: torch.nn.Module,
    example: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: tuple[Any, ...],
) -> ir.Model:
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators of packages that are not there
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise EdgetuneError(
            f"torch cannot make a graph of this architecture: {first_line(error)[:300]}", fix="report this model"
        ) from error
    assert program is not None
    return program.model
