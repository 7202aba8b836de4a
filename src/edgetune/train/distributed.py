"""Several processes train one model: who this process is, what they tell each other, and the engine's settings.

Without `join` there is one process, and everything here does nothing. A step is the same step for any number of
processes: each takes its share of the step's passes, and every loss is divided by the learned tokens of all of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from edgetune.data.render import Encoded
from edgetune.errors import EdgetuneError, InputError
from edgetune.recipe import TrainSection

T = TypeVar("T")

BUCKET = 50_000_000  # numbers that DeepSpeed exchanges at once; it holds room for them all the time
LIVE = 1_000_000_000  # weights that its stage 3 gathers ahead and keeps for a while
PATIENCE = timedelta(minutes=30)  # how long a process waits for another that lives, but says nothing


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train.

    Attributes:
        rank: its number among all, from 0.
        local_rank: its number on this machine.
        size: how many there are.
        here: how many of them share this machine.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


_place = Place()


def place() -> Place:
    """This process's place: the only one, until `join`."""
    return _place


def join(found: Place, engine: str, store: Any = None) -> None:
    """Meet the other processes, and wait for all of them.

    Args:
        found: this process's place.
        engine: the recipe's.
        store: where they meet; MASTER_ADDR:MASTER_PORT, which the environment names, when None.

    Raises:
        InputError: this machine has GPUs, and none for this process.
    """
    global _place
    import torch

    if found.local_rank >= torch.cuda.device_count() > 0:
        raise InputError(
            f"{found.here} processes on a machine that has {torch.cuda.device_count()} GPUs: each needs its own",
            where="--nproc",
            fix=f"start {torch.cuda.device_count()} processes on it at most, or hide the GPUs (CUDA_VISIBLE_DEVICES=)",
        )
    # accelerate and DeepSpeed look here; torchrun has set them, SLURM has other names.
    os.environ |= {"RANK": str(found.rank), "LOCAL_RANK": str(found.local_rank), "WORLD_SIZE": str(found.size)}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if engine == "deepspeed" and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Where there is a compiler it would be made when training starts, and be spoken of on stdout.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, rank=found.rank, world_size=found.size, timeout=PATIENCE, store=store)
    _place = found


def leave() -> None:
    """Part from the other processes."""
    global _place
    import torch

    if _joined():
        torch.distributed.destroy_process_group()
    _place = Place()


def _joined() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def total(values: Sequence[float]) -> list[float]:
    """Each value summed over all processes."""
    import torch

    if _place.size == 1:
        return list(values)
    held = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(held)
    return held.tolist()


def summed(value: Any) -> Any:
    """A tensor on the training device summed over all processes."""
    import torch

    if _place.size > 1:
        torch.distributed.all_reduce(value)
    return value


def agreed(value: T) -> T:
    """The first process's value, for all: of what depends on a clock, or on this machine."""
    import torch

    if _place.size == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The block is run by the first process, then by the others, who find what it left."""
    if not _place.first:
        wait()
    yield
    if _place.first:
        wait()


def wait() -> None:
    """Wait until all processes are here."""
    import torch

    if _place.size > 1:
        torch.distributed.all_reduce(torch.zeros(1))


def share(passes: Sequence[T]) -> list[T]:
    """The passes of this process; their number is a multiple of the number of processes."""
    return list(passes[_place.rank :: _place.size])


def filled(rows: list[Encoded], others: Sequence[Encoded]) -> list[Encoded]:
    """The rows of a pass; where it has none, the beginning of another row of which nothing is learned.

    Engines that divide the weights gather them in each pass: all processes must run the same number of passes.
    """
    return rows or [Encoded(others[0].ids[:2], [False] * len(others[0].ids[:2]))]


def divides_weights(section: TrainSection) -> bool:
    """Whether the engine leaves each process with only a part of the weights."""
    wanted = section.distributed
    if wanted is None or not _joined():
        return False
    return wanted.engine == "fsdp" or (wanted.engine == "deepspeed" and wanted.zero_stage == 3)


@dataclass(frozen=True)
class Shares:
    """What one process holds.

    Attributes:
        weights: the part of all weights that it holds all the time, 0 to 1.
        live: weights that the engine gathers ahead and keeps for a while, at most.
        trained: bytes a trainable parameter beside its weight: gradient, AdamW's moments, what a step needs on the way
            and the engine's own copies, all float32.
    """

    weights: float
    live: int
    trained: float


def shares(section: TrainSection, processes: int) -> Shares:
    """What each of `processes` holds with the recipe's engine."""
    wanted = section.distributed
    gradient, moments, on_the_way, copy = 4, 8, 4, 4
    if wanted is None or wanted.engine == "ddp":
        exchanged = copy if processes > 1 or wanted else 0
        return Shares(1.0, 0, gradient + moments + on_the_way + exchanged)
    if wanted.engine == "fsdp":
        return Shares(1 / processes, 0, (gradient + moments + on_the_way) / processes)
    own = (moments + on_the_way + copy) / processes
    if wanted.zero_stage == 1:
        return Shares(1.0, 0, gradient + own + gradient / processes)
    if wanted.zero_stage == 3:
        return Shares(1 / processes, LIVE, gradient / processes + own)
    return Shares(1.0, 0, gradient / processes + own)


def check(section: TrainSection, processes: int) -> None:
    """Refuse what cannot be, before anything is started.

    Raises:
        InputError: fewer rows in a step than processes, options that the engine cannot carry, or an engine
            that is not installed.
    """
    from edgetune.train.schedule import DEFAULT_ROWS

    if section.batch_tokens is None:
        rows = (section.batch_size or DEFAULT_ROWS) * section.gradient_accumulation
        if rows < processes:
            raise InputError(
                f"{processes} processes would share a step of {rows} rows: some would have none",
                where="train.batch_size",
                fix=f"start {rows} processes at most, or raise train.batch_size",
            )
    wanted = section.distributed
    if wanted and wanted.engine == "fsdp" and section.modules_to_save:
        raise InputError(
            "fsdp is not proved right with modules that are trained whole",
            where="train.modules_to_save",
            fix="leave it out, or use train.distributed.engine: deepspeed or ddp",
        )
    divided = wanted and (wanted.engine == "fsdp" or (wanted.engine == "deepspeed" and wanted.zero_stage == 3))
    if wanted and divided and section.initialization in ("pissa", "olora"):
        raise InputError(
            f"{section.initialization} changes the base's weights, which {wanted.engine} has divided when they are saved",
            where="train.initialization",
            fix="use default, or train.distributed.engine: ddp",
        )
    if wanted and wanted.engine == "deepspeed":
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise InputError(
                "deepspeed is not installed", where="train.distributed.engine", fix="pip install 'edgetune[deepspeed]'"
            )


def training_arguments(section: TrainSection, model: Any) -> dict[str, Any]:
    """What Trainer's arguments say of the engine.

    Args:
        section: the recipe's `train`.
        model: what is trained; FSDP divides it along its layers.
    """
    import torch

    if not _joined():
        return {}
    wanted = section.distributed
    cpu = {} if torch.cuda.is_available() else {"use_cpu": True, "ddp_backend": "gloo"}
    if wanted is None or wanted.engine == "ddp":
        return {**cpu, "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    if wanted.engine == "deepspeed":
        return {**cpu, "deepspeed": _deepspeed(section, sum(p.numel() for p in model.parameters() if p.requires_grad))}
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = {
        "version": 2,
        "transformer_layer_cls_to_wrap": list(whole._no_split_modules or []),
        "reshard_after_forward": True,
        # Without a GPU all lies in main memory anyway, and torch's pinned memory needs one.
        "cpu_offload": wanted.offload == "cpu" and torch.cuda.is_available(),
        "cpu_ram_efficient_loading": False,
    }
    return {**cpu, "fsdp": True, "fsdp_config": settings}


def fsdp_on_cpu(trainer: Any) -> None:
    """Have accelerate use FSDP where it was asked for: without a GPU it falls back to DDP, and does not say so.

    Raises:
        EdgetuneError: accelerate counts other processes than there are, so that each would learn by itself.
    """
    if trainer.accelerator.num_processes != _place.size:
        raise EdgetuneError(
            f"accelerate knows of {trainer.accelerator.num_processes} processes, there are {_place.size}",
            where="train.distributed",
            fix="start them with edgetune train --nproc, torchrun or srun",
        )
    if trainer.args.fsdp_plugin_args is None or trainer.accelerator.state.distributed_type.value == "FSDP":
        return
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def _deepspeed(section: TrainSection, trained: int) -> dict[str, Any]:
    assert section.distributed
    stage, to_cpu = section.distributed.zero_stage or 2, section.distributed.offload == "cpu"
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(trained, BUCKET)}
    if to_cpu:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_max_live_parameters"] = LIVE
        zero["stage3_param_persistence_threshold"] = 10_000  # a LoRA matrix is not worth a message of its own
        if to_cpu:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the trainer says itself which pass is a step's last
        "gradient_clipping": section.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW: DeepSpeed's would have to be compiled
        "steps_per_print": 1_000_000_000,
    }


def backward(trainer: Any, loss: Any, last: bool) -> None:
    """The backward pass of one of a step's passes; gradients are exchanged, and averaged, with the last one.

    Args:
        trainer: transformers' Trainer.
        loss: summed over the pass, over the learned tokens of the whole step, a scalar.
        last: whether this is the step's last pass on this process.
    """
    if trainer.is_deepspeed_enabled:
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        trainer.accelerator.backward(loss * _place.size, scale_wrt_gas=False)
        return
    trainer.accelerator.backward(loss * _place.size if _place.size > 1 else loss)


def one_pass(trainer: Any, model: Any, last: bool) -> Any:
    """Around a pass: its gradients stay on this process until the step's last. DeepSpeed is told in `backward`."""
    if last or trainer.is_deepspeed_enabled:
        return contextlib.nullcontext()
    return trainer.accelerator.no_sync(model)
