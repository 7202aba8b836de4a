"""Tiny random encoders and sequence-to-sequence models, and artifacts of them: `from plain_models import plain`."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.recipe import ExportSection
from edgetune.standalone import export_model

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}
_HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "embed": ("BertModel", {}),
    "classify": ("BertForSequenceClassification", {"id2label": {0: "bad", 1: "good", 2: "none"}}),
    "tag": ("BertForTokenClassification", {"id2label": LABELS}),
    "answer": ("BertForQuestionAnswering", {}),
}
Made = tuple[Path, Path, dict[str, Any]]  # the model's folder, the artifact, the export's report
Plain = Callable[..., Made]
_made: dict[tuple[str, str], Made] = {}

TEXT = (
    "the a of in on is was and not to for with capital city river mountain parcel box Tuesday late open Paris France Lima "
    "Maria Berlin works lives good bad phone battery what where who when how translate summarize answer question"
)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """`plain(kind, target)` gives a model and its artifact, each made once: embed, classify, tag, answer, t5. Read only."""

    def make(kind: str, target: str = "cpu-fp32") -> Made:
        if (kind, target) not in _made:
            home = tmp_path_factory.mktemp("plain")
            if kind == "t5":
                folder = save_t5(home / "model")
            else:
                head, changes = _HEADS[kind]
                folder = save_encoder(home / "model", head, **changes)
            report = export_model(folder, home / kind, ExportSection(target=target))
            _made[kind, target] = folder, home / kind, report
        return _made[kind, target]

    return make


def save_encoder(folder: Path, head: str = "BertModel", **changes: Any) -> Path:
    """A random BERT of 2 layers with one of transformers' heads, and a WordPiece tokenizer."""
    import torch
    import transformers

    _word_pieces().save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        initializer_range=0.3,
        pad_token_id=0,
        **changes,
    )
    getattr(transformers, head)(config).eval().save_pretrained(folder)
    return folder


def save_t5(folder: Path, **changes: Any) -> Path:
    """A random T5 of 2 layers with gated feed-forward layers, and a Unigram tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _unigrams()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        n_positions=64,
        feed_forward_proj="gated-gelu",
        initializer_factor=1.5,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    T5ForConditionalGeneration(config).eval().save_pretrained(folder)
    return folder


def _word_pieces() -> Any:
    """Single letters and half of the words; the others are pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(string.ascii_letters + string.digits + ".,;:?!'"))
    entries = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *TEXT.split()[::2]]
    raw = Tokenizer(models.WordPiece({text: number for number, text in enumerate(entries)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    raw.enable_truncation(16)  # as published tokenizers have it; the artifact's must not cut
    raw.enable_padding(length=16)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _unigrams() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    entries += [(f"\u2581{word}", -4.0) for word in TEXT.split()[::2]]
    entries += [(letter, -6.0) for letter in string.ascii_letters]
    raw = Tokenizer(models.Unigram(entries, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
