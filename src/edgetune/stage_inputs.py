"""What the stages of a run read: tokenizer, encoded rows, the model that is exported and what its export learns from."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.recipe import Recipe
from edgetune.run import RunFolder

if TYPE_CHECKING:
    from edgetune.data.render import Encoded
    from edgetune.export.adapters.read import Adapter
    from edgetune.export.quantized import Examples
    from edgetune.export.targets import Target
    from edgetune.models import Base


class Inputs:
    """What lies in a run and its base, opened.

    Args:
        recipe: the run's.
        folder: the run.
        base: gives its base model.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, base: Callable[[], Base]) -> None:
        self._recipe, self._folder, self._base = recipe, folder, base

    def tokenizer(self) -> Any:
        """The base's tokenizer, with the recipe's chat template."""
        from edgetune.models import load_tokenizer

        model = self._recipe.model
        return load_tokenizer(
            self._base().path, trust_remote_code=model.trust_remote_code, chat_template=model.chat_template
        )

    def encoded(self, which: str, rows: int | None = None) -> Sequence[Encoded]:
        """The first `rows` prepared rows of `train` or `validation`, or all of them."""
        from edgetune.data.batch import encode_file
        from edgetune.data.render import Renderer
        from edgetune.models import context_length, stop_ids

        path, data = self._base().path, self._recipe.data
        renderer = Renderer(self.tokenizer(), set(stop_ids(path)))
        longest = data.max_length or context_length(path)
        return encode_file(self._folder.output("data") / f"{which}.jsonl", renderer, data.train_on, longest, rows)

    def place(self, row: int) -> str:
        """Where a training row comes from, as file:line."""
        with (self._folder.output("data") / "train.jsonl").open(encoding="utf-8") as file:
            return str(json.loads(next(itertools.islice(file, row, None)))["where"])

    @contextlib.contextmanager
    def exported(self) -> Iterator[tuple[Path, list[Adapter]]]:
        """The model whose weights are exported, and the adapters beside it: the merged one alone, or base and adapter."""
        recipe, folder = self._recipe, self._folder
        if recipe.export.adapters == "merged":
            yield folder.output("merge"), []
            return
        from edgetune.export.adapters.base import adapted_base

        given, trusted = [(folder.path.name, folder.output("train"))], recipe.model.trust_remote_code
        with adapted_base(self._base(), given, folder.path, onto=recipe.merge.onto, trust_remote_code=trusted) as found:
            yield found

    def examples(self, target: Target, kept: Path) -> Examples:
        """What the export learns from; `kept` is where its repair goes on after a crash."""
        from edgetune.export.quantize.kept import FILE
        from edgetune.export.quantized import Examples

        heal = self._recipe.export.heal
        rows = Examples.wanted(target, heal)
        kept.mkdir(parents=True, exist_ok=True)
        merged = self._recipe.export.adapters == "merged"
        trained = self._folder.output("train") / FILE if merged and self._recipe.train.quantization_aware else None
        used = () if rows == 0 else self.encoded("train", rows)
        return Examples(used, heal, self._recipe.seed, kept, trained=trained)
