"""A run: each stage in order, redone only where its inputs or options changed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import GateError, InputError
from edgetune.files import digest, require_space, sha256_file, staged_folder, write_json
from edgetune.recipe_file import LoadedRecipe
from edgetune.run import FOLDERS, RunFolder, Work, seal

if TYPE_CHECKING:
    from edgetune.models import Base

STAGES = tuple(FOLDERS)


@dataclass
class Result:
    """What a run did: for each stage why it was done, or None where it was fresh."""

    path: Path
    done: dict[str, str | None] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


class Pipeline:
    """The stages of one recipe in one run folder."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self.recipe = loaded.recipe
        self.folder = RunFolder(loaded.run_dir)
        self._base: Base | None = None
        self._do: dict[str, Callable[[Work, bool], None]] = {
            "data": self._data,
            "train": self._train,
            "merge": self._merge,
            "export": self._export,
            "verify": self._verify,
            "bench": self._bench,
        }

    def base(self) -> Base:
        """The base model, fetched if need be."""
        from edgetune.models import resolve

        if self._base is None:
            self._base = resolve(self.recipe.model)
        return self._base

    def run(
        self, *, first: str | None = None, until: str = STAGES[-1], force: bool = False, resume: bool = True
    ) -> Result:
        """Do what is stale.

        Args:
            first: redo this stage and all after it, fresh or not.
            until: the last stage to do.
            force: redo every stage.
            resume: go on from a training's last checkpoint where one lies.

        Raises:
            GateError: the artifact misses a limit; all is kept, and bench is not run.
        """
        wanted = STAGES[: STAGES.index(until) + 1]
        if first and first not in wanted:
            raise InputError(f"--from {first} lies after --until {until}", fix=f"stages in order: {', '.join(STAGES)}")
        self._look_before()
        result = Result(self.folder.path)
        forced = force
        with self._no_empty_run(), self.folder.locked(), self._held(self.base()):
            for stage in wanted:
                forced = forced or stage == first
                self._one(stage, result, forced, resume and not force)
                if stage == "verify":
                    self._gate(result)
            self._card(result)
        return result

    @contextlib.contextmanager
    def _no_empty_run(self) -> Iterator[None]:
        """Remove the run folder again where a failure left nothing in it but the recipe."""
        from edgetune.leases import forget_run

        try:
            yield
        except BaseException:
            path = self.folder.path
            if path.is_dir() and {found.name for found in path.iterdir()} <= {"recipe.json", ".lock"}:
                shutil.rmtree(path, ignore_errors=True)
                forget_run(path.absolute())
            raise

    def _look_before(self) -> None:
        """Refuse what is sure to fail later, before anything is fetched or written."""
        from edgetune.data.examine import train_files
        from edgetune.export.targets import load_target

        load_target(self.recipe.export.target)
        held_out = self.recipe.data.validation
        for path in [
            *train_files(self.recipe.data),
            *([Path(held_out)] if isinstance(held_out, str) else []),
        ]:
            self._hash(path)
        if self.recipe.model.chat_template and not Path(self.recipe.model.chat_template).is_file():
            raise InputError(
                "no such file", where="model.chat_template", fix=f"check {self.recipe.model.chat_template}"
            )

    def _one(self, stage: str, result: Result, forced: bool, resume: bool) -> None:
        work = self.work(stage)
        why = "asked for" if forced else self.folder.stale(work)
        result.done[stage] = why
        if why:
            progress.say(f"{stage}: {why}")
            self._do[stage](work, resume)
            _release_memory()
        elif any(result.done.values()):
            progress.say(f"{stage}: unchanged")
        result.reports[stage] = self.folder.report(stage)
        for warning in result.reports[stage].get("warnings", []) if why and stage != "data" else []:
            progress.say(f"{stage}: warning: {warning}")

    def work(self, stage: str) -> Work:
        """What `stage` would do now. The stages before it must have been done."""
        recipe, base, content = self.recipe, self.base(), self.folder.content
        base_id = {"id": base.id, "revision": base.revision, "sha256": base.digest}
        template = sha256_file(Path(recipe.model.chat_template)) if recipe.model.chat_template else None
        if stage == "data":
            from edgetune.data.examine import train_files

            reading = {name: value for name, value in base.files.items() if not name.endswith((".safetensors", ".py"))}
            options = recipe.data.model_dump(exclude={"train", "validation"})
            if not isinstance(recipe.data.validation, str):
                options["validation"] = recipe.data.validation.model_dump()
            files = {"train": [self._hash(path) for path in train_files(recipe.data)]}
            if isinstance(recipe.data.validation, str):
                files["validation"] = [self._hash(Path(recipe.data.validation))]
            return Work(
                stage,
                {"rows": files, "tokenizer": digest(reading), "chat_template": template},
                {**options, "seed": recipe.seed},
            )
        if stage == "train":
            options = {**recipe.train.model_dump(), "seed": recipe.seed, "train_on": recipe.data.train_on}
            return Work(stage, {"base": base_id, "data": content("data")}, options)
        if stage == "merge":
            return Work(
                stage,
                {"base": base_id, "adapter": content("train"), "chat_template": template},
                recipe.merge.model_dump(),
            )
        if stage == "export":
            from edgetune.export.targets import load_target

            target = load_target(recipe.export.target).model_dump(exclude={"description", "needs"})
            options = {"target": target, "max_length": recipe.export.max_length, "name": self.name}
            return Work(stage, {"merged": content("merge")}, options)
        if stage == "verify":
            inputs = {"artifact": content("export"), "merged": content("merge"), "data": content("data")}
            return Work(stage, inputs, recipe.verify.model_dump())
        from edgetune.runtime.hardware import cpu

        return Work(stage, {"artifact": content("export")}, {**recipe.bench.model_dump(), "cpu": digest(cpu())})

    @property
    def name(self) -> str:
        """The run's and the artifact's name."""
        return self.folder.path.name

    def _hash(self, path: Path) -> str:
        if not path.is_file():
            raise InputError("no such data file", where=path, fix="check `data.train` and `data.validation`")
        return self.folder.hashes.file(path)

    @contextlib.contextmanager
    def _held(self, base: Base) -> Iterator[Base]:
        """The base, kept from being deleted while the block runs, and known as the base of this run afterwards."""
        from edgetune.leases import lease, remember_run

        write_json(self.folder.path / "recipe.json", self.recipe.model_dump())
        remember_run(self.folder.path.absolute(), base.path)
        with lease(base.path, "edgetune run"):
            yield base

    def _encoded(self, which: str) -> list[Any]:
        from edgetune.data.batch import encode_file
        from edgetune.models import context_length, load_tokenizer

        recipe, base = self.recipe, self.base()
        tokenizer = load_tokenizer(
            base.path,
            trust_remote_code=recipe.model.trust_remote_code,
            chat_template=recipe.model.chat_template,
        )
        longest = recipe.data.max_length or context_length(base.path)
        return encode_file(self.folder.output("data") / f"{which}.jsonl", tokenizer, recipe.data.train_on, longest)

    def _data(self, work: Work, resume: bool) -> None:
        from edgetune.data.prepare import prepare
        from edgetune.models import context_length, load_tokenizer, stop_ids

        model, base = self.recipe.model, self.base()
        tokenizer = load_tokenizer(
            base.path, trust_remote_code=model.trust_remote_code, chat_template=model.chat_template
        )
        with staged_folder(self.folder.output("data")) as out:
            prepare(
                self.recipe.data,
                seed=self.recipe.seed,
                tokenizer=tokenizer,
                context=context_length(base.path),
                stop_ids=set(stop_ids(base.path)),
                out=out,
            )
            seal(out, work)

    def _train(self, work: Work, resume: bool) -> None:
        from edgetune.train.trainer import Job, train

        checkpoints = self.folder.path / "checkpoints"
        job = Job(
            self.base(),
            self._encoded("train"),
            self._encoded("validation"),
            self.recipe.seed,
            work.key,
            self.recipe.model.trust_remote_code,
        )
        with self._staged("train", work) as (report, adapter):
            train(self.recipe.train, job, report=report, adapter=adapter, checkpoints=checkpoints, resume=resume)
        shutil.rmtree(checkpoints)

    def _merge(self, work: Work, resume: bool) -> None:
        from edgetune.train.merge import merge

        require_space(self.folder.path, 4 * self._parameters(), "the merged model")
        rows = [row.ids[:512] for row in self._encoded("validation")[: self.recipe.merge.rows]]
        turn = self.folder.report("data").get("turn")  # absent for plain text
        with self._staged("merge", work) as (report, merged):
            merge(
                self.recipe.merge,
                self.recipe.model,
                self.base(),
                self.folder.output("train"),
                rows,
                stop_id=turn["stop_id"] if turn else None,
                report=report,
                merged=merged,
            )

    def _export(self, work: Work, resume: bool) -> None:
        from edgetune.export.package import export
        from edgetune.export.targets import load_target

        chain = {
            "base": describe(self.base()),
            "data": self.folder.content("data"),
            "adapter": self.folder.content("train"),
        }
        report, artifact = self.folder.folders("export")
        with staged_folder(report) as first, staged_folder(artifact) as second:
            export(
                self.folder.output("merge"),
                load_target(self.recipe.export.target),
                self.recipe.export.max_length,
                name=self.name,
                chain=chain,
                work=work,
                artifact=second,
                report=first,
            )
            seal(first, work)

    def _verify(self, work: Work, resume: bool) -> None:
        from edgetune.export.verify import verify
        from edgetune.runtime.artifact import open_artifact

        artifact = open_artifact(self.folder.output("export")).path
        with staged_folder(self.folder.output("verify")) as out:
            verify(artifact, self.folder.output("merge"), self._encoded("validation"), self.recipe.verify, out)
            seal(out, work)

    def _bench(self, work: Work, resume: bool) -> None:
        from edgetune.runtime.bench import bench

        with staged_folder(self.folder.output("bench")) as out:
            bench(self.folder.output("export"), self.recipe.bench, out)
            seal(out, work)

    @contextlib.contextmanager
    def _staged(self, stage: str, work: Work) -> Iterator[tuple[Path, Path]]:
        """The stage's two folders, sealed and put in place when the block ends well."""
        report, output = self.folder.folders(stage)
        with staged_folder(report) as first, staged_folder(output) as second:
            yield first, second
            seal(first, work)
            seal(second, work)

    def _gate(self, result: Result) -> None:
        report = result.reports["verify"]
        if not report["passed"]:
            self._card(result)
            raise GateError(
                f"the gate is not passed: {'; '.join(report['failures'])}",
                where=self.folder.output("export"),
                fix=advice(report),
            )

    def _card(self, result: Result) -> None:
        from edgetune.export.card import card, rewrite_card
        from edgetune.export.targets import load_target

        if "export" in result.reports:
            text = card(self.name, describe(self.base()), load_target(self.recipe.export.target), result.reports)
            rewrite_card(self.folder.output("export"), text)

    def _parameters(self) -> int:
        return int(self.folder.report("train")["parameters"])


def _release_memory() -> None:
    """Give memory that the stage used back to the system, so that it does not count against the next one."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def advice(report: dict[str, Any]) -> str:
    """What to try when the gate is not passed."""
    ruined = report["kld_mean"] > 0.2 or report["top1_agreement"] < 0.8
    says = "at this precision it is another model than the one that was trained; " if ruined else ""
    if report["precision"] == "fp32":
        return f"{says}an export without rounding should pass: please report this model"
    more = "export.target=cpu-int8" if report["precision"] == "int4" else "export.target=cpu-fp32"
    return f"{says}choose more bits ({more}), or set verify.limits if this loss is acceptable to you"


def describe(base: Base) -> dict[str, Any]:
    """The base model as an artifact's manifest and card tell of it."""
    found = {name: value for name, value in asdict(base).items() if name not in ("path", "files")}
    if base.source in ("folder", "gguf"):
        found["id"] = Path(base.id).name  # an artifact carries no path of this machine
    return {**found, "sha256": base.digest}
