"""A run: each stage in order, redone only where its inputs or options changed."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import progress
from edgetune.errors import GateError, InputError
from edgetune.files import require_space, staged_folder, write_json
from edgetune.recipe_file import LoadedRecipe
from edgetune.run import MANIFEST, STAGES, Result, RunFolder, Work, seal
from edgetune.runtime.memory import trim
from edgetune.stage_work import left_out, look_before, runs_on, stage_work, with_target_limits

if TYPE_CHECKING:
    from edgetune.data.render import Encoded
    from edgetune.export.adapters.read import Adapter
    from edgetune.export.quantized import Examples
    from edgetune.export.targets import Target
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
            if "export" in wanted:
                self._require_room()
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

    def _missed(self, stage: str, report: dict[str, Any]) -> GateError | None:
        """What is said where a stage's result misses limits; None where it keeps them."""
        from edgetune.export.package import size_error
        from edgetune.export.verify import gate_error

        artifact = self.folder.output("export")
        if stage == "export" and report.get("failures"):
            return size_error(report, artifact)
        return gate_error(report, artifact) if stage == "verify" and not report["passed"] else None

    def _require_room(self) -> None:
        """Refuse a run that would train first and then have no memory or disk for the export (InputError)."""
        from edgetune.export.needs import needs, require_room
        from edgetune.export.targets import target_of
        from edgetune.runtime.hardware import total_memory

        if any(self.folder.stale(self.work(stage)) for stage in ("data", "train")):
            export = self.recipe.export
            found = needs(self.base().path, target_of(export), steps=export.heal.steps)
            require_room(found, self.folder.path, memory=total_memory(), before=4 * found.parameters)

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
            progress.say(f"{stage}: {why}")
            self._do[stage](work)
            gc.collect()
            trim()  # what the stage used does not count against the next one
        elif any(result.done.values()):
            progress.say(f"{stage}: unchanged")
        result.reports[stage] = self.folder.report(stage)
        for warning in result.reports[stage].get("warnings", []) if why and stage != "data" else []:
            progress.say(f"{stage}: warning: {warning}")
        result.missed = self._missed(stage, result.reports[stage])

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

    def _tokenizer(self) -> Any:
        from edgetune.models import load_tokenizer

        model = self.recipe.model
        return load_tokenizer(
            self.base().path, trust_remote_code=model.trust_remote_code, chat_template=model.chat_template
        )

    def _encoded(self, which: str, rows: int | None = None) -> Sequence[Encoded]:
        """The first `rows` prepared rows, or all of them."""
        from edgetune.data.batch import encode_file
        from edgetune.data.render import Renderer
        from edgetune.models import context_length, stop_ids

        path = self.base().path
        renderer = Renderer(self._tokenizer(), set(stop_ids(path)))
        longest = self.recipe.data.max_length or context_length(path)
        return encode_file(
            self.folder.output("data") / f"{which}.jsonl", renderer, self.recipe.data.train_on, longest, rows
        )

    def _data(self, work: Work) -> None:
        from edgetune.data.prepare import prepare
        from edgetune.models import context_length, stop_ids

        path = self.base().path
        with staged_folder(self.folder.output("data")) as out:
            prepare(
                self.recipe.data,
                seed=self.recipe.seed,
                tokenizer=self._tokenizer(),
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
                    self._encoded(which)
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
        from edgetune.export.targets import trained_through
        from edgetune.models import stop_ids
        from edgetune.train.trainer import Job

        turn = self.folder.report("data").get("turn")
        return Job(
            base=self.base(),
            tokenizer=self._tokenizer(),
            train=self._encoded("train"),
            validation=self._encoded("validation"),
            seed=self.recipe.seed,
            key=key,
            trust_remote_code=self.recipe.model.trust_remote_code,
            place=self._place,
            stop_ids=frozenset([*stop_ids(self.base().path), *([turn["stop_id"]] if turn else [])]),
            name=self.name,
            grids=trained_through(self.recipe),
        )

    def _place(self, row: int) -> str:
        """Where a training row comes from, as file:line."""
        with (self.folder.output("data") / "train.jsonl").open(encoding="utf-8") as file:
            return str(json.loads(next(itertools.islice(file, row, None)))["where"])

    def _merge(self, work: Work) -> None:
        from edgetune.chain import of_run
        from edgetune.train.merge import LOSS_ROWS, merge

        require_space(self.folder.path, 4 * int(self.folder.report("train")["parameters"]), "the merged model")
        rows = [row.ids[:512] for row in self._encoded("validation", self.recipe.merge.rows)]
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
                validation=self._encoded("validation", LOSS_ROWS),
            )

    def _export(self, work: Work) -> None:
        from edgetune.chain import of_run
        from edgetune.export.package import export
        from edgetune.export.targets import target_for

        target = target_for(self.recipe)
        chain = of_run(self.folder, self.recipe, self.base())
        for stage in ("verify", "bench"):  # what they say is about an artifact that is about to go
            shutil.rmtree(self.folder.output(stage), ignore_errors=True)
        report, artifact = self.folder.folders("export")
        with (
            staged_folder(report) as first,
            staged_folder(artifact) as second,
            self._exported() as (model, adapters),
        ):
            export(
                model,
                target,
                self.recipe.export.max_length,
                name=self.name,
                chain=chain,
                work=work,
                trust_remote_code=self.recipe.model.trust_remote_code,
                artifact=second,
                report=first,
                examples=self._examples(target, work),
                adapters=adapters,
            )
            seal(first, work)
        shutil.rmtree(self._healing, ignore_errors=True)

    @contextlib.contextmanager
    def _exported(self) -> Iterator[tuple[Path, list[Adapter]]]:
        """The model whose weights are exported, and the adapters beside it: the merged one alone, or base and adapter."""
        if self.recipe.export.adapters == "merged":
            yield self.folder.output("merge"), []
            return
        from edgetune.export.adapters.base import adapted_base

        given, trusted = [(self.name, self.folder.output("train"))], self.recipe.model.trust_remote_code
        with adapted_base(
            self.base(), given, self.folder.path, onto=self.recipe.merge.onto, trust_remote_code=trusted
        ) as found:
            yield found

    @property
    def _healing(self) -> Path:
        return self.folder.path / ".healing"

    def _examples(self, target: Target, work: Work) -> Examples:
        """What the export learns from, and where its repair goes on after a crash."""
        from edgetune.export.quantized import Examples

        heal = self.recipe.export.heal
        rows = Examples.wanted(target, heal)
        kept = self._healing / work.key[:16]  # another recipe's checkpoints are not gone on from
        kept.mkdir(parents=True, exist_ok=True)
        return Examples(() if rows == 0 else self._encoded("train", rows), heal, self.recipe.seed, kept)

    def _verify(self, work: Work) -> None:
        from edgetune.export.verify import verify
        from edgetune.runtime.artifact import open_artifact

        artifact = open_artifact(self.folder.output("export")).path
        with staged_folder(self.folder.output("verify")) as out:
            rows = self._encoded("validation", self.recipe.verify.rows)
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
