"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training, alpha / √(length · width) at most."""

from __future__ import annotations

from typing import Any


def add_noise(model: Any, alpha: float) -> None:
    """Have the model's embeddings noisy in training mode.

    transformers' own option takes a pass for one row. Here each row of a packed or padded pass has the noise that its
    own length calls for. It is drawn from torch's random state, which checkpoints hold, so that resuming is exact.

    Args:
        model: a causal language model or peft's; its decoder is told `position_ids` or an `attention_mask` by name.
        alpha: the noise's scale.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    told: dict[str, Any] = {}

    def listen(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told.update({name: kwargs.get(name) for name in ("position_ids", "attention_mask")})

    def noise(module: Any, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        lengths = row_lengths(embedded, told.get("position_ids"), told.get("attention_mask"))
        most = alpha / (lengths * embedded.shape[-1]).sqrt()
        drawn = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device).uniform_(-1, 1)
        return embedded + (drawn * most[..., None]).to(embedded.dtype)

    inner.get_decoder().register_forward_pre_hook(listen, with_kwargs=True)
    inner.get_input_embeddings().register_forward_hook(noise)


def row_lengths(embedded: Any, position_ids: Any, mask: Any) -> Any:
    """For each of the (B, S) tokens the length of the row that it is in, float32.

    Args:
        embedded: (B, S, D).
        position_ids: (B, S), starting anew with each packed row; None where there is no packing.
        mask: (B, S), 1 on tokens, 0 on padding; None where there is no padding.
    """
    import torch

    batch, size = embedded.shape[:2]
    whole = torch.ones(batch, size, device=embedded.device)
    if position_ids is not None and position_ids.shape == (batch, size):
        starts = (position_ids == 0).long()
        starts[:, 0] = 1
        row = starts.flatten().cumsum(0) - 1
        return torch.bincount(row).to(whole)[row].view(batch, size)
    if mask is not None and mask.shape == (batch, size):
        return mask.to(whole).sum(1, keepdim=True).clamp(min=1).expand(batch, size)
    return whole * size
