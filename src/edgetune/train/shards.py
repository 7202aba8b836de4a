"""Whole weights and a whole optimizer state from engines that divide them, and back.

Checkpoints hold what one process would have written, whichever engine trained and on how many processes: so any
number of processes can go on from them. Everything here is called by all processes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from edgetune.train.distributed import place

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's: the only optimizer that these engines are given


def divided(trainer: Any) -> bool:
    """Whether the engine divides weights or optimizer state, so that a checkpoint is gathered here."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def device(model: Any) -> torch.device:
    """Where the model computes; an engine that offloads weights keeps them elsewhere."""
    p = next(model.parameters())
    if _divided(p) and torch.cuda.is_available():
        return torch.device("cuda", place().local_rank)
    return p.device


def parameters(model: Any, trained_only: bool = False) -> int:
    """Parameters of the model, or those that are trained, wherever they lie; a tied matrix counts once."""
    chosen = (p for p in model.parameters() if p.requires_grad or not trained_only)
    return sum(int(getattr(p, "ds_numel", 0)) or p.numel() for p in chosen)


def whole_weights(model: Any) -> dict[str, torch.Tensor] | None:
    """The trained weights by name, on the CPU of the first process; None where each process has them whole."""
    # A tied matrix under each of its names: peft looks for all of them.
    learned = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not any(_divided(p) for _, p in learned):
        return None
    found: dict[str, torch.Tensor] = {}
    for name, p in learned:
        value = _whole(p)
        if place().first:
            found[name] = value.detach().cpu().clone()
    return found


def _divided(p: Any) -> bool:
    return hasattr(p, "ds_id") or hasattr(p, "full_tensor")


def _whole(p: Any) -> torch.Tensor:
    if hasattr(p, "full_tensor"):
        whole: torch.Tensor = p.full_tensor()
        return whole
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p


def put_weights(model: Any, whole: dict[str, torch.Tensor]) -> None:
    """Give a model its trained weights by name, whoever holds them; what `whole_weights` gives, on every process."""
    here = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in whole.items():
            p: Any = here[name]
            if hasattr(p, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                    if place().first:
                        p.copy_(value)
            elif hasattr(p, "full_tensor"):
                p.copy_(_distributed(value, p))
            else:
                p.copy_(value)


def _distributed(value: torch.Tensor, like: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_weights(model: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights on a model that the engine does not hold yet."""
    from safetensors.torch import load_file

    adapter = checkpoint / "adapter_model.safetensors"
    if adapter.is_file():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(adapter))
        return
    for file in sorted(checkpoint.glob("*.safetensors")):
        model.load_state_dict(load_file(file), strict=False)


def save_state(trainer: Any, folder: Path, groups: Sequence[Sequence[Any]]) -> None:
    """Write optimizer.pt and scheduler.pt, as Trainer does for one process."""
    whole = _whole_optimizer(trainer, groups)
    if place().first:
        torch.save(whole, folder / "optimizer.pt")
        torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")


def load_state(trainer: Any, folder: Path, groups: Sequence[Sequence[Any]]) -> None:
    """Read them, once the engine holds model and optimizer."""
    _load_optimizer(trainer, groups, torch.load(folder / "optimizer.pt", weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def _whole_optimizer(trainer: Any, groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The optimizer's state as torch's own `state_dict` of one process has it; on the first process.

    Args:
        trainer: transformers' Trainer, with its engine.
        groups: the parameters of each group, as the optimizer was given them.
    """
    if not trainer.is_deepspeed_enabled:
        given = trainer.optimizer.state_dict()
        held = {
            number: {name: _cpu(value) for name, value in one.items()} for number, one in sorted(given["state"].items())
        }
        return {"state": held, "param_groups": given["param_groups"]}
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = trainer.deepspeed.optimizer
    _link(zero)
    step = next(zero.optimizer.state[flat]["step"] for flat in _flat(zero))
    state: dict[int, Any] = {}
    described: list[dict[str, Any]] = []
    for number, p, one in _numbered(groups):
        moments = {name: safe_get_full_optimizer_state(p, name).cpu().clone() for name in _MOMENTS}
        state[number] = {"step": torch.as_tensor(step).clone().cpu(), **moments}
        if one == len(described):
            hyper = {name: value for name, value in zero.optimizer.param_groups[one].items() if name != "params"}
            described.append({**hyper, "params": []})
        described[one]["params"].append(number)
    return {"state": state, "param_groups": described}


def _cpu(value: Any) -> Any:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu() if torch.is_tensor(value) else value


def _load_optimizer(trainer: Any, groups: Sequence[Sequence[Any]], whole: dict[str, Any]) -> None:
    """Give each process its part of a whole optimizer state."""
    if not trainer.is_deepspeed_enabled:
        _load_fsdp(trainer.optimizer, whole)
        return
    zero = trainer.deepspeed.optimizer
    first = whole["state"][0]
    for flat in _flat(zero):
        zero.optimizer.state[flat] = {
            "step": first["step"].clone(),
            **{name: torch.zeros_like(flat) for name in _MOMENTS},
        }
    for group, saved in zip(zero.optimizer.param_groups, whole["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    _link(zero)
    for number, p, _ in _numbered(groups):
        for name in _MOMENTS:
            _set(p, whole["state"][number][name], name)


def _set(p: Any, value: torch.Tensor, name: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(p, "ds_id"):
        safe_set_full_optimizer_state(p, value.to(p.device), name)
        return
    part = p.ds_tensor.numel()  # the last part is filled up
    padded = torch.nn.functional.pad(value.flatten(), (0, part * place().size - value.numel()))
    safe_set_local_optimizer_state(p, padded.narrow(0, part * place().rank, part), name)


def _load_fsdp(optimizer: Any, whole: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for number, p in enumerate(parameters):
        state[number] = {
            name: _distributed(value, p) if torch.is_tensor(value) and value.shape == p.shape else value
            for name, value in whole["state"][number].items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _link(zero: Any) -> None:
    """Have ZeRO-1 and 2 find each weight's moments. They do so by themselves after the first group's first step, when
    the other groups have none yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _flat(zero: Any) -> list[Any]:
    """The flat float32 parts that the optimizer under ZeRO works on."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _numbered(groups: Sequence[Sequence[Any]]) -> Iterator[tuple[int, Any, int]]:
    """Each parameter with its number in torch's state dictionaries, and the number of its group."""
    number = 0
    for one, group in enumerate(groups):
        for p in group:
            yield number, p, one
            number += 1
