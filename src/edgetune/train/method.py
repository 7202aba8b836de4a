"""What is trained: an adapter on a frozen base, or all weights; how it is built, saved and handed on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.data.batch import Encoded
from edgetune.errors import InputError, first_line
from edgetune.files import read_json, write_json, write_text
from edgetune.models import Base, load_model
from edgetune.recipe import TrainSection
from edgetune.train import initialize, neftune, quantize

if TYPE_CHECKING:
    import torch

QUANTIZATION = "quantization.json"  # beside a qlora adapter: which 4-bit weights it was trained against


def base_dtype(section: TrainSection) -> torch.dtype:
    """The dtype that the base computes in: bfloat16 where the processor multiplies it natively, else float32."""
    import torch

    if section.dtype != "auto":
        return torch.bfloat16 if section.dtype == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        native = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
    return torch.bfloat16 if native else torch.float32


def require_installed(section: TrainSection) -> None:
    """Raise InputError unless all that the method and the optimizer need is installed. Nothing heavy is imported."""
    if section.method == "qlora":
        quantize.require_bitsandbytes("train.method")
    if section.optimizer == "adamw_8bit":
        quantize.require_bitsandbytes("train.optimizer")


def build(
    section: TrainSection,
    base: Base,
    *,
    trust_remote_code: bool,
    attention: str | None,
    rows: Sequence[Encoded],
    resumed: bool = False,
) -> Any:
    """Load the base and make trainable what the method trains. Draws from torch's random state.

    Args:
        section: the recipe's `train`.
        base: the base model.
        trust_remote_code: run code that the base brings.
        attention: transformers' name of the attention; its own choice when None.
        rows: training rows, from which `eva` takes the adapter's first directions.
        resumed: the adapter's weights are about to come from a checkpoint, so that none need be worked out; the base
            is what it was all the same.

    Returns:
        For `full` the model, all of it trainable, in float32. Otherwise peft's model: the base frozen, in `base_dtype`
        (its linear layers in NF4 for `qlora`); what is trained in float32.

    Raises:
        InputError: a layer that the model does not have, or one that cannot be adapted.
    """
    import torch

    dtype = base_dtype(section)
    if section.method == "full":
        model: Any = load_model(
            base.path, dtype=torch.float32, trust_remote_code=trust_remote_code, attention=attention
        ).requires_grad_(True)
    elif section.method == "qlora":
        model = quantize.load_quantized(
            base, dtype, trust_remote_code=trust_remote_code, attention=attention, keep=section.modules_to_save
        )
    else:
        model = load_model(base.path, dtype=dtype, trust_remote_code=trust_remote_code, attention=attention)
    if section.method != "full":
        _check_layers(model, section)
        model = _with_adapter(model, section)
        if section.initialization == "eva" and not resumed:
            initialize.from_data(model, rows)
        if section.initialization == "loftq" and not resumed:
            initialize.from_quantization_error(model, base, trust_remote_code)
        if dtype != torch.float32:
            _in_float32(model, dtype)
    if section.neftune_alpha:
        neftune.add_noise(model, section.neftune_alpha)
    return model


def save(model: Any, folder: Path, *, state: dict[str, Any] | None = None) -> None:
    """Save what was trained, so that it works on the base as it was published.

    Args:
        model: from `build`, unwrapped.
        folder: existing folder. Gets peft's adapter (config and safetensors; for `qlora` also quantization.json), or,
            of a model that is trained whole, config and safetensors.
        state: the model's state on this process, where an engine has divided it; read from the model when None.
    """
    given = {} if state is None else {"state_dict": state}
    if not hasattr(model, "peft_config"):
        model.save_pretrained(folder, safe_serialization=True, **given)
        return
    # peft asks the hub about embeddings unless it is told; those that are trained are saved as modules_to_save.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False, **given)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form; the artifact carries the model card
    if initialize.taken_from_base(model):
        initialize.onto_published_base(model, folder)
    if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        layer = quantize.layers(model)[0][1]
        told = {"type": "nf4", "double": True, "dtype": str(layer.compute_dtype).removeprefix("torch.")}
        kept = model.peft_config["default"].modules_to_save or []
        write_json(folder / QUANTIZATION, {**told, "keep": sorted(kept), "sha256": quantize.fingerprint(model)})


def publish(best: Path, out: Path, *, base: Base, tokenizer: Any) -> None:
    """Put what `save` wrote into the training's output folder, in words that hold on any machine.

    Args:
        best: folder that `save` wrote; files ending in `.json` that are not the model's own stay behind.
        out: existing folder. Gets the adapter with its chat template, or the whole model with its tokenizer.
        base: the base, whose id takes the place of its folder here.
        tokenizer: the one that the rows were encoded with.
    """
    for file in sorted(best.iterdir()):
        if file.suffix == ".safetensors" or file.name.endswith(".index.json"):
            link(file, out / file.name)
        elif file.name in ("config.json", "generation_config.json", QUANTIZATION):
            shutil.copyfile(file, out / file.name)
    if (best / "adapter_config.json").is_file():
        config = read_json(best / "adapter_config.json")
        config |= {"base_model_name_or_path": base.id, "revision": base.revision}
        for name in ("target_modules", "modules_to_save"):  # sets in peft, so in another order each time
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])
        write_json(out / "adapter_config.json", config)
        if tokenizer.chat_template:  # so that whoever merges the adapter gives the model what it was trained with
            write_text(out / "chat_template.jinja", tokenizer.chat_template)
    else:
        tokenizer.save_pretrained(out)
        portable(out, base)


def link(old: Path, new: Path) -> None:
    """A file under a second name; a copy where the file system cannot. Nothing in edgetune writes into a finished file."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def portable(folder: Path, base: Base) -> None:
    """Take paths of this machine out of a saved model's configuration; keep the base's id."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        values = read_json(path)
        for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "is_local", "local_files_only"):
            values.pop(key, None)
        if name == "config.json" and base.source in ("hub", "package"):
            values["_name_or_path"] = base.id
        write_json(path, values)


def _with_adapter(model: Any, section: TrainSection) -> Any:
    from peft import EvaConfig, LoraConfig, get_peft_model

    kind = section.initialization
    head_or_embedding = {name.rsplit(".", 1)[-1] for name in section.modules_to_save} & _tied(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        use_dora=section.method == "dora",
        target_modules=section.target_modules,
        modules_to_save=list(section.modules_to_save) or None,
        ensure_weight_tying=bool(head_or_embedding),  # both are trained as the one matrix that they are
        init_lora_weights=initialize.PEFT_NAMES[kind],
        eva_config=EvaConfig(rho=1.0) if kind == "eva" else None,  # all ranks stay the recipe's
    )
    if section.quantization_aware:
        from edgetune.train.grids import register
    elif section.method == "lora":
        from edgetune.train.lora import register
    elif section.method == "dora":
        from edgetune.train.dora import register
    else:
        from edgetune.train.lora4 import register
    register(config)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"no adapter fits: {first_line(error)}",
            where="train.target_modules",
            fix="use all-linear, or names of linear layers",
        ) from error
    if kind in ("pissa", "olora"):
        initialize.remember(adapted)
    return adapted


def _check_layers(model: Any, section: TrainSection) -> None:
    """Refuse names that the model does not have, what takes no adapter, and what cannot be merged."""
    modules = dict(model.named_modules())
    weighted = {name for name, module in modules.items() if getattr(module, "weight", None) is not None}
    matrices = {name for name in weighted if modules[name].weight.ndim > 1}
    targets = [] if section.target_modules == "all-linear" else section.target_modules
    _check_names(modules, matrices, targets, "target_modules", "to which no adapter can be put", ", or all-linear")
    _check_names(modules, weighted, section.modules_to_save, "modules_to_save", "no single layer", "")
    both = sorted({name.rsplit(".", 1)[-1] for name in targets} & _tied(model))
    if both:
        raise InputError(
            f"this model's embedding and head are one matrix: an adapter on {both[0]} would be merged into both",
            where="train.target_modules",
            fix=f"leave it out; train.modules_to_save: [{both[0]}] trains that matrix whole",
        )
    if section.initialization not in ("default", "gaussian"):
        _check_rank(modules, section, targets)


def _named(full: str, name: str) -> bool:
    """Whether a module of this full name is meant by `name`, as peft reads it."""
    return full == name or full.endswith(f".{name}")


def _check_names(
    modules: dict[str, Any], fit: Collection[str], names: Sequence[str], key: str, otherwise: str, also: str
) -> None:
    """Refuse names of no module, and of a module that is not among those that `fit`."""
    choice = sorted({name.rsplit(".", 1)[-1] for name in fit if not name.rsplit(".", 1)[-1].isdigit()})
    where, fix = f"train.{key}", f"choose from {', '.join(choice)}{also}"
    for name in names:
        found = [full for full in modules if full and _named(full, name)]
        if not found:
            raise InputError(f"the model has no layer `{name}`", where=where, fix=fix)
        wrong = next((full for full in found if full not in fit), None)
        if wrong is not None:
            raise InputError(f"{wrong} is a {type(modules[wrong]).__name__}, {otherwise}", where=where, fix=fix)


def _check_rank(modules: dict[str, Any], section: TrainSection, targets: Sequence[str]) -> None:
    for name, module in modules.items():
        size = min(getattr(module, "in_features", section.rank), getattr(module, "out_features", section.rank))
        wanted = not targets or any(_named(name, target) for target in targets)
        if wanted and size < section.rank:
            raise InputError(
                f"{section.initialization} takes {section.rank} directions from each layer, {name} has {size}",
                where="train.rank",
                fix=f"use at most {size}, or train.initialization: default",
            )


def _tied(model: Any) -> set[str]:
    """The last names of embedding and head where they are one matrix, else nothing."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is embedding or module is head}


def _in_float32(model: Any, dtype: torch.dtype) -> None:
    """Have all that is trained in float32, where peft leaves what is trained whole in the base's dtype."""
    from peft.utils import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                _between(module, dtype)


def _between(module: Any, dtype: torch.dtype) -> None:
    """Let a float32 module stand between modules of another dtype."""
    import torch

    def convert(values: Any, to: torch.dtype) -> Any:
        if isinstance(values, tuple):
            return tuple(convert(value, to) for value in values)
        return values.to(to) if isinstance(values, torch.Tensor) and values.is_floating_point() else values

    def losing(module: Any) -> bool:  # a head that computes the loss (loss.py) converts by itself
        return getattr(module, "targets", None) is not None

    module.register_forward_pre_hook(lambda m, args: None if losing(m) else convert(args, torch.float32))
    module.register_forward_hook(lambda m, args, out: None if losing(m) else convert(out, dtype))
