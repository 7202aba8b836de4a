"""Device profiles: the settings that `edgetune tune` measured to be best for one artifact on one machine.

They lie in `home()/profiles/`, outside the artifact, whose hashed files stay as they are. A profile counts only for
the artifact, the processor and the versions of ONNX Runtime that it was measured with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgetune.errors import InputError
from edgetune.files import digest, home, read_json, write_json
from edgetune.progress import say
from edgetune.runtime.artifact import Artifact
from edgetune.runtime.hardware import checked_threads, cpu, versions

FORMAT = "edgetune/profile/1"
_ENGINE = ("onnxruntime", "onnxruntime-genai")
# Values that a profile may set. ONNX Runtime warns of others or fails late, and some name files.
_SESSION_KEYS = {
    "session.intra_op.allow_spinning",
    "session.intra_op.spin_duration_us",
    "session.force_spinning_stop",
    "session.dynamic_block_base",
    "session.intra_op_thread_affinities",
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
}


@dataclass(frozen=True)
class Settings:
    """How a session runs an artifact.

    Attributes:
        threads: CPU threads; all cores when None.
        session: further session options of ONNX Runtime, as genai_config.json has them.
        prefill_tokens: tokens of a prompt that go through the model in one call; the artifact's own number when None.
        row_costs: steps that reading 1, 2, … tokens at once takes, for guessing ahead; None where nobody measured.
        huge_pages: move the weights to pages of 2 MB after loading, where the system has them (`memory.use_huge_pages`).
    """

    threads: int | None = None
    session: dict[str, str | bool] = field(default_factory=dict)
    prefill_tokens: int | None = None
    row_costs: dict[int, float] | None = None
    huge_pages: bool = True

    def overlay(self) -> dict[str, Any]:
        """The `session_options` of genai_config.json that these settings make. Raises InputError for wrong threads."""
        return {"log_severity_level": 3, "intra_op_num_threads": checked_threads(self.threads), **self.session}


@dataclass(frozen=True)
class Profile:
    """Settings, and what they were measured on.

    Attributes:
        artifact, name: digest of the artifact's files, and its name.
        processor: `hardware.cpu()` there.
        engine: versions of ONNX Runtime and ONNX Runtime GenAI.
        settings: what was best.
        measured: what each setting brought, for people and `--json`; see `tune.tune`.
    """

    artifact: str
    name: str
    processor: dict[str, Any]
    engine: dict[str, str]
    settings: Settings
    measured: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"format": FORMAT, **asdict(self)}


def engine() -> dict[str, str]:
    """Versions of what runs the graphs."""
    return versions(*_ENGINE)


def artifact_digest(artifact: Artifact) -> str:
    """Digest of an artifact's files by content. The card is left out: it is rewritten after measurements."""
    outputs = artifact.manifest["outputs"]
    return digest({name: entry["sha256"] for name, entry in outputs.items() if name != "README.md"})


def profile_path(artifact: Artifact) -> Path:
    """Where the profile of this artifact for this machine lies."""
    return home() / "profiles" / f"{artifact_digest(artifact)[:16]}-{digest(cpu())[:8]}.json"


def save(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    write_json(path, profile.as_dict())


def read(path: Path) -> Profile:
    """Read a profile's file.

    Raises:
        InputError: it is missing, no profile, or sets what a profile may not set.
    """
    found = read_json(path)
    fix = "measure again: `edgetune tune ARTIFACT`"
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"is not a device profile of the format {FORMAT!r}", where=path, fix=fix)
    try:
        given = found["settings"]
        costs = given["row_costs"]
        settings = Settings(
            given["threads"],
            dict(given["session"]),
            given["prefill_tokens"],
            None if costs is None else {int(rows): float(cost) for rows, cost in costs.items()},
            given["huge_pages"],
        )
        profile = Profile(
            str(found["artifact"]),
            str(found["name"]),
            dict(found["processor"]),
            dict(found["engine"]),
            settings,
            dict(found["measured"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"is not a whole device profile ({error!r})", where=path, fix=fix) from error
    _check(settings, path, fix)
    return profile


def _check(settings: Settings, path: Path, fix: str) -> None:
    for name, value in (("threads", settings.threads), ("prefill_tokens", settings.prefill_tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{name} must be a whole number from 1, not {value!r}", where=path, fix=fix)
    if not isinstance(settings.huge_pages, bool):
        raise InputError(f"huge_pages must be true or false, not {settings.huge_pages!r}", where=path, fix=fix)
    for rows, cost in (settings.row_costs or {1: 1.0}).items():
        if rows < 1 or not 0 < cost < 1e6:
            raise InputError(f"says that {rows} rows cost {cost} steps", where=path, fix=fix)
    for name, given in settings.session.items():
        if name not in _SESSION_KEYS or not isinstance(given, str | bool):
            raise InputError(f"sets {name!r}, which a device profile may not", where=path, fix=fix)


def why_not(profile: Profile, artifact: Artifact) -> str | None:
    """Why a profile does not count for this artifact here; None where it does."""
    if profile.artifact != artifact_digest(artifact):
        return f"it was measured with another artifact ({profile.name})"
    here = cpu()
    if profile.processor != here:
        there = profile.processor
        same = there.get("model") == here["model"]
        cores = f"{there.get('usable_cores')} cores of {there.get('model')}"
        return f"it was measured on {cores}" + (f", not {here['usable_cores']}" if same else "")
    if profile.engine != engine():
        return "it was measured with " + ", ".join(f"{name} {version}" for name, version in profile.engine.items())
    return None


def find(artifact: Artifact) -> tuple[Profile | None, str | None]:
    """This artifact's profile for this machine, and a sentence on one that is there and does not count."""
    own = profile_path(artifact)
    try:
        known = sorted(own.parent.glob(f"{artifact_digest(artifact)[:16]}-*.json"), key=lambda path: path != own)
    except OSError:
        return None, None
    note = None
    for path in known:
        try:
            profile = read(path)
            reason = why_not(profile, artifact)
        except (InputError, OSError) as error:
            reason = error.what if isinstance(error, InputError) else str(error)
        else:
            if reason is None:
                return profile, None
        note = note or f"the device profile {path} is not used: {reason}; `edgetune tune` makes one for this machine"
    return None, note


def settings_for(artifact: Artifact, threads: int | None = None, use_profile: bool = True) -> Settings:
    """The settings of a session: a device profile's where there is one, unless told otherwise.

    Says on stderr when a profile is there and does not count.

    Args:
        artifact: what is to run.
        threads: a number given by the person; the profile is then left aside.
        use_profile: False leaves it aside, too.
    """
    if threads is not None or not use_profile:
        return Settings(threads)
    profile, note = find(artifact)
    if note:
        say(note)
    return profile.settings if profile else Settings()
