"""A run: each stage in order, redone only where its inputs or options changed."""

from __future__ import annotations

import contextlib
import gc
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import InputError
from edgetune.files import require_space, staged_folder, write_json
from edgetune.recipe_file import LoadedRecipe
from edgetune.run import MANIFEST, STAGES, Result, RunFolder, Work, seal
from edgetune.runtime.memory import trim
from edgetune.stage_inputs import Inputs
from edgetune.stage_work import (
    left_out,
    look_at_base,
    look_at_rows,
    look_before,
    missed,
    runs_on,
    stage_work,
    with_target_limits,
)

if TYPE_CHECKING:
    from edgetune.models import Base
    from edgetune.train.crew import Crew
    from edgetune.train.trainer import Job


class Pipeline:
    """The stages of one recipe in one run folder."""

    def __init__(self, loaded: LoadedRecipe, base: Base | None = None, crew: Crew | None = None) -> None:
        self.recipe = with_target_limits(loaded.recipe)
        self._crew = crew  # the processes that train; this one alone when None
        self._path = loaded.path
        self.folder = RunFolder(loaded.run_dir)
        self._named = shlex.join([str(loaded.path), *loaded.overrides])
        self._base = base
        self._inputs = Inputs(self.recipe, self.folder, self.base)
        self._exports = False  # whether what is trained is exported at once
        self._resume = True
        self._do: dict[str, Callable[[Work], None]] = {
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

        Returns:
            What was done. Where the artifact misses a limit, `missed` says which; all is kept, and bench is not run.

        Raises:
            InputError: the recipe's data, model or target cannot be used.
            EdgetuneError: a stage failed.
        """
        wanted = STAGES[: STAGES.index(until) + 1]
        if first and first not in wanted:
            raise InputError(f"--from {first} lies after --until {until}", fix=f"stages in order: {', '.join(STAGES)}")
        self.look_before(wanted)
        self._resume = resume and not force
        result = Result(self.folder.path, self._named)
        with self.folder.locked(), self._no_empty_run(), self._held(self.base()):
            self._exports = "export" in wanted
            if self._exports:
                self.preflight(forced=force or first in ("data", "train"))
            for stage in wanted:
                if stage in ("verify", "bench") and left_out(stage, self.recipe, result.reports["export"]):
                    break
                force = force or stage == first
                self._one(stage, result, force)
                if result.missed:
                    break
            self._card(result)
        return result

    def again(self, *stages: str) -> Result:
        """Do these stages, fresh or not, on what lies in the run; those before them are left as they are.

        Returns:
            As `run`.

        Raises:
            InputError: what they read is not there.
        """
        for stage in STAGES[: STAGES.index(stages[0])]:
            if not (self.folder.output(stage) / MANIFEST).is_file():
                raise InputError(
                    f"the run lacks `{stage}`", where=self.folder.path, fix="finish it: edgetune run RECIPE"
                )
        result = Result(self.folder.path, self._named)
        with self.folder.locked(), self._held(self.base()):
            for stage in stages:
                self._one(stage, result, forced=True)
                if result.missed:
                    break
            self._card(result)
        return result

    def preflight(self, *, forced: bool = False) -> None:
        """Refuse a base that cannot be exported as the recipe wants it (InputError), unless it has been trained already.

        Args:
            forced: it is trained again.
        """
        if forced or any(self.folder.stale(self.work(stage)) for stage in ("data", "train")):
            look_at_base(self.recipe, self.base(), self.folder.path)

    @contextlib.contextmanager
    def _no_empty_run(self) -> Iterator[None]:
        """Remove the run folder again where a failure left nothing in it but the recipe. Its lock is held."""
        from edgetune.leases import forget_run

        try:
            yield
        except BaseException:
            path = self.folder.path
            if {found.name for found in path.iterdir()} <= {"recipe.json", ".lock"}:
                shutil.rmtree(path, ignore_errors=True)
                forget_run(path.absolute())
            raise

    def look_before(self, stages: Sequence[str]) -> None:
        """Refuse what is sure to fail later (InputError), before anything is fetched or written."""
        look_before(self.recipe, self.folder, stages)

    def _one(self, stage: str, result: Result, forced: bool) -> None:
        work = self.work(stage)
        why = self.folder.stale(work)
        if stage == "train" and why is None:  # an interrupted run may have left them after the adapter was in place
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        if forced:
            why = "asked for"
        result.done[stage] = why
        if why:
            if stage == "train" and self._exports:
                look_at_rows(self.recipe, result.reports["data"])
            progress.say(f"{stage}: {why}")
            self._do[stage](work)
            gc.collect()
            trim()  # what the stage used does not count against the next one
        elif any(result.done.values()):
            progress.say(f"{stage}: unchanged")
        result.reports[stage] = self.folder.report(stage)
        for warning in result.reports[stage].get("warnings", []) if why and stage != "data" else []:
            progress.say(f"{stage}: warning: {warning}")
        result.missed = missed(stage, result.reports[stage], self.folder.output("export"))

    def work(self, stage: str) -> Work:
        """What `stage` would do now. The stages before it must have been done."""
        return stage_work(stage, self.recipe, self.base(), self.folder)

    @property
    def name(self) -> str:
        """The run's and the artifact's name."""
        return self.folder.path.name

    @contextlib.contextmanager
    def _held(self, base: Base) -> Iterator[Base]:
        """The base, kept from being deleted while the block runs, and known as the base of this run afterwards."""
        from edgetune.leases import lease, remember_run

        write_json(self.folder.path / "recipe.json", self.recipe.model_dump())
        remember_run(self.folder.path.absolute(), base.path)
        with lease(base.path, "edgetune run"):
            yield base

    @property
    def _checkpoints(self) -> Path:
        return self.folder.path / "checkpoints"

    def _data(self, work: Work) -> None:
        from edgetune.data.prepare import prepare
        from edgetune.models import context_length, stop_ids

        path = self.base().path
        with staged_folder(self.folder.output("data")) as out:
            prepare(
                self.recipe.data,
                seed=self.recipe.seed,
                tokenizer=self._inputs.tokenizer(),
                context=context_length(path),
                stop_ids=set(stop_ids(path)),
                out=out,
            )
            seal(out, work)

    def _train(self, work: Work) -> None:
        from edgetune.chain import of_training

        turn = self.folder.report("data").get("turn")  # absent for plain text
        told = {"stop_id": turn["stop_id"] if turn else None}
        chain = of_training(self.folder, self.recipe, self.base())
        with self._staged("train", work, **told, chain=chain) as (report, adapter):
            assignment = {
                "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
                "path": str(self._path),
                "key": work.key,
                "report": str(report.absolute()),
                "adapter": str(adapter.absolute()),
                "resume": self._resume,
                "notes": str((self.folder.path / ".processes").absolute()),
                "threads": self.recipe.train.threads,
            }
            if self._crew is None:
                self.take_part(assignment)
            else:
                from edgetune.train import launch

                for which in ("train", "validation"):  # kept by content, so that the processes find them encoded
                    self._inputs.encoded(which)
                launch.start(self._crew, self.recipe.train, assignment)
        shutil.rmtree(self._checkpoints)

    def take_part(self, assignment: dict[str, Any]) -> None:
        """Train: alone, or as one of several processes that were given the same assignment. The data is prepared."""
        from edgetune.models.quiet import quiet

        with quiet():  # what it imports speaks, too
            from edgetune.train.trainer import train

        train(
            self.recipe.train,
            self._job(assignment["key"]),
            report=Path(assignment["report"]),
            adapter=Path(assignment["adapter"]),
            checkpoints=self._checkpoints,
            resume=assignment["resume"],
        )

    def _job(self, key: str) -> Job:
        from edgetune.export.targets import target_for
        from edgetune.models import stop_ids
        from edgetune.train.trainer import Job

        turn = self.folder.report("data").get("turn")
        grids: dict[str, Any] = {}
        if self.recipe.train.quantization_aware and (section := target_for(self.recipe).quantization):
            grids = {"grids": section.plan(), "calibration_tokens": section.calibration_tokens}
        return Job(
            base=self.base(),
            tokenizer=self._inputs.tokenizer(),
            train=self._inputs.encoded("train"),
            validation=self._inputs.encoded("validation"),
            seed=self.recipe.seed,
            key=key,
            trust_remote_code=self.recipe.model.trust_remote_code,
            place=self._inputs.place,
            stop_ids=frozenset([*stop_ids(self.base().path), *([turn["stop_id"]] if turn else [])]),
            name=self.name,
            **grids,
        )

    def _merge(self, work: Work) -> None:
        from edgetune.chain import of_run
        from edgetune.train.merge import LOSS_ROWS, merge

        require_space(self.folder.path, 4 * int(self.folder.report("train")["parameters"]), "the merged model")
        rows = [row.ids[:512] for row in self._inputs.encoded("validation", self.recipe.merge.rows)]
        chain = of_run(self.folder, self.recipe, self.base())
        with self._staged("merge", work, chain=chain) as (report, merged):
            merge(
                self.recipe.merge,
                self.base(),
                self.folder.output("train"),
                rows,
                trust_remote_code=self.recipe.model.trust_remote_code,
                report=report,
                merged=merged,
                validation=self._inputs.encoded("validation", LOSS_ROWS),
            )

    def _export(self, work: Work) -> None:
        from edgetune.chain import of_run
        from edgetune.export.package import export
        from edgetune.export.preflight import preflight
        from edgetune.export.targets import target_for

        target = target_for(self.recipe)
        chain = of_run(self.folder, self.recipe, self.base())
        report, artifact = self.folder.folders("export")
        with (
            staged_folder(report) as first,
            staged_folder(artifact) as second,
            self._inputs.exported() as (model, adapters),
        ):
            section, trusted = self.recipe.export, self.recipe.model.trust_remote_code
            preflight(model, target, section.max_length, artifact, steps=section.heal.steps, trust_remote_code=trusted)
            export(
                model,
                target,
                section.max_length,
                name=self.name,
                chain=chain,
                work=work,
                trust_remote_code=trusted,
                artifact=second,
                report=first,
                # another recipe's checkpoints are not gone on from
                examples=self._inputs.examples(target, self._healing / work.key[:16]),
                adapters=adapters,
            )
            for stage in ("verify", "bench"):  # what they say is about an artifact that is about to go
                shutil.rmtree(self.folder.output(stage), ignore_errors=True)
            seal(first, work)
        shutil.rmtree(self._healing, ignore_errors=True)

    @property
    def _healing(self) -> Path:
        return self.folder.path / ".healing"

    def _verify(self, work: Work) -> None:
        from edgetune.export.verify import verify
        from edgetune.runtime.artifact import open_artifact

        artifact = open_artifact(self.folder.output("export")).path
        with staged_folder(self.folder.output("verify")) as out:
            rows = self._inputs.encoded("validation", self.recipe.verify.rows)
            trusted = self.recipe.model.trust_remote_code
            told: dict[str, Any] = {}
            if self.recipe.export.adapters == "separate":
                # A base that was made again from 4 bits lies nowhere to be compared with.
                four_bit = self.recipe.train.method == "qlora" and self.recipe.merge.onto == "trained"
                told = {"adapter": self.name, "base": None if four_bit else self.base().path}
            merged = self.folder.output("merge")
            verify(
                artifact,
                merged,
                rows,
                self.recipe.verify,
                out,
                provider=runs_on(self.recipe),
                trust_remote_code=trusted,
                **told,
            )
            seal(out, work)

    def _bench(self, work: Work) -> None:
        from edgetune.export.adapters.cost import bench_beside_merged
        from edgetune.runtime.bench.measure import bench

        with staged_folder(self.folder.output("bench")) as out:
            measure = bench if self.recipe.export.adapters == "merged" else bench_beside_merged
            measure(self.folder.output("export"), self.recipe.bench, out)
            seal(out, work)

    @contextlib.contextmanager
    def _staged(self, stage: str, work: Work, **extra: Any) -> Iterator[tuple[Path, Path]]:
        """The stage's two folders, sealed (the output with `extra` keys) and put in place when the block ends well."""
        report, output = self.folder.folders(stage)
        with staged_folder(report) as first, staged_folder(output) as second:
            yield first, second
            seal(first, work)
            seal(second, work, **extra)

    def _card(self, result: Result) -> None:
        """Bring the artifact's card up to what is known of it, measurements of earlier runs included."""
        from edgetune.chain import of_folder
        from edgetune.export.card import card, keep_stamp, rewrite_card
        from edgetune.export.targets import target_for

        if "export" not in result.reports:
            return
        known = dict(result.reports)
        for stage in ("verify", "bench"):
            if stage not in known and self.folder.stale(self.work(stage)) is None:
                known[stage] = self.folder.report(stage)
        artifact = self.folder.output("export")
        text = card(self.name, of_folder(self.base())["base"], target_for(self.recipe), known)
        rewrite_card(artifact, keep_stamp((artifact / "README.md").read_text(encoding="utf-8"), text))
