"""Loading a checked model folder: the tokenizer, the weights, and the facts that other stages ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import InputError, first_line, need
from edgetune.files import read_json
from edgetune.models.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def load_tokenizer(
    path: Path, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; nothing is downloaded.

    Args:
        path: the model folder.
        trust_remote_code: run tokenizer code that the folder brings.
        chat_template: a Jinja file that takes the place of the model's own chat template.

    Raises:
        InputError: the tokenizer cannot be read; the template is missing, broken or omits the messages.
    """
    need("torch", "transformers")
    from transformers import AutoTokenizer

    with quiet(), explained(path, "the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        _replace_template(tokenizer, Path(chat_template))
    return tokenizer


def _replace_template(tokenizer: Any, file: Path) -> None:
    import jinja2

    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("no such chat template file", where=file, fix="check `model.chat_template`") from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=file, fix="save the template as UTF-8") from error
    words = "What is the capital of France?"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"not a valid Jinja template: {error.message}", where=f"{file}:{error.lineno}") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"the chat template fails on a user message: {error}", where=file) from error
    if words not in text:
        raise InputError(
            "the chat template does not put out the user's message",
            where=file,
            fix="loop over `messages` and print each message['content']",
        )


def load_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """transformers' configuration of a model folder.

    Raises:
        InputError: unknown architecture, or numbers that contradict each other.
    """
    need("torch", "transformers")
    from transformers import AutoConfig

    with quiet(), explained(path, "config.json cannot be used"):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: str | None = None,
    quantization: Any = None,
    device: str = "cpu",
    loader: str = "AutoModelForCausalLM",
    optional: str | None = None,
) -> PreTrainedModel:
    """Load a model, a causal language model unless told otherwise, from safetensors, ready for inference (`eval`).

    Args:
        path: the model folder; nothing is downloaded and no pickle is opened.
        dtype: of the weights in memory.
        trust_remote_code: run model code that the folder brings.
        attention: transformers' name of the attention; its own choice when None.
        quantization: a transformers quantization configuration; weights are quantized while they are read.
        device: where the weights go when they are quantized; otherwise they stay on the CPU.
        loader: transformers' class that loads it.
        optional: weights whose names begin so may be missing; they are random then.

    Raises:
        InputError: unknown architecture, weights that are missing, of a wrong shape or unreadable, or not enough memory.
    """
    need("torch", "transformers")
    import transformers

    with quiet(), explained(path, "the model cannot be loaded"):
        # Wrong shapes are let through here, so that all of them can be named at once below.
        model, info = getattr(transformers, loader).from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({"attn_implementation": attention} if attention else {}),
            **({"quantization_config": quantization, "device_map": {"": device}} if quantization else {}),
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, found, expected = wrong[0]
        raise InputError(
            f"{len(wrong)} weights have another shape than config.json says, first {name}: "
            f"{list(found)} in the file, {list(expected)} expected",
            where=path,
            fix="config.json and the weights do not belong together: copy both from the same place",
        )
    missing = sorted(name for name in info["missing_keys"] if optional is None or not name.startswith(optional))
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing from the files, first {missing[0]}; they would be random",
            where=path,
            fix="copy the model again, whole, or correct config.json",
        )
    return model.eval()


def stop_ids(path: Path) -> list[int]:
    """Token ids that end an answer: `eos_token_id` of generation_config.json, else of config.json.

    Raises InputError when neither says."""
    for name in ("generation_config.json", "config.json"):
        if not (path / name).is_file():
            continue
        found = read_json(path / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if all(isinstance(i, int) for i in ids) and ids:
            return list(ids)
    raise InputError(
        "neither generation_config.json nor config.json names an `eos_token_id`",
        where=path,
        fix='add "eos_token_id" to generation_config.json: the id of the token that ends an answer',
    )


def context_length(path: Path) -> int:
    """Longest sequence, in tokens, that the model was made for, from config.json. Raises InputError."""
    config = read_json(path / "config.json")
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 0:
                return int(part[key])
    raise InputError(
        "does not say the model's context length",
        where=path / "config.json",
        fix='add "max_position_embeddings": the longest sequence in tokens',
    )


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Turn what transformers and its libraries raise on a bad folder into an InputError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno is not None:  # the operating system's own refusal: no permission, disk error
            raise
        raise _input_error(path, what, error) from error
    except ImportError as error:
        raise InputError(f"{what}: {first_line(error)}", where=path, fix="install what is named") from error
    except RuntimeError as error:
        if "allocate" in str(error):
            raise InputError(
                f"{what}: not enough memory", where=path, fix="close other programs, or take a smaller model"
            ) from error
        raise _input_error(path, what, error) from error
    except StrictDataclassError as error:  # its first line names a validator, the cause says what is wrong
        raise _input_error(path, what, error.__cause__ if isinstance(error.__cause__, Exception) else error) from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
        raise _input_error(path, what, error) from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises the base class itself
            raise
        raise _input_error(path, what, error) from error


def _input_error(path: Path, what: str, error: Exception) -> InputError:
    if "does not recognize this architecture" in str(error):
        import transformers

        kind = read_json(path / "config.json").get("model_type")
        return InputError(
            f"transformers {transformers.__version__} does not know the architecture `{kind}`",
            where=path,
            fix="check `model_type` in config.json, or install a newer transformers",
        )
    if "Unrecognized configuration class" in str(error):
        return InputError(
            "is no causal language model",
            where=path,
            fix="give a model that generates text, such as SmolLM2 or Phi-3",
        )
    config = path / "config.json"
    if isinstance(error, ZeroDivisionError):
        sizes = ", ".join(f"`{key}`" for key, value in _values(config) if value == 0 and key.startswith(_SIZES))
        return InputError(f"{what}: a size is 0", where=config, fix=f"correct {sizes or 'the sizes in it'}")
    if isinstance(error, KeyError) and (named := [key for key, value in _values(config) if (value,) == error.args]):
        return InputError(
            f"{what}: transformers does not know the `{named[0]}` {error}",
            where=config,
            fix="check how it is written, or install a newer transformers",
        )
    return InputError(f"{what}: {first_line(error)}", where=path, fix="copy or download the model again, whole")


_SIZES = ("num_", "head_", "hidden_", "n_")


def _values(config: Any) -> list[tuple[str, Any]]:
    """The keys and values in a config.json, those of its sections, too; none where it cannot be read."""
    if isinstance(config, Path):
        try:
            config = read_json(config)
        except InputError:
            return []
    if not isinstance(config, dict):
        return []
    inner = [pair for part in config.values() for pair in _values(part)]
    return [(key, value) for key, value in config.items() if type(value) in (int, str)] + inner
