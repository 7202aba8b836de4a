"""An artifact as one file, and back: the same bytes, and nothing that was tampered with gets through."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from artifacts import copy_of, seal, tiny_artifact  # noqa: F401 - a fixture
from conftest import edgetune
from edgetune.deploy import bundle, members
from edgetune.deploy.bundle import Kind, check, open_bundle, package, unpack
from edgetune.errors import InputError
from edgetune.run import FORMAT

KINDS: tuple[Kind, ...] = ("zip", "oci")
CHAIN = {
    "base": {"id": "org/model", "source": "hub", "revision": "abc", "license": "apache-2.0", "sha256": "0" * 64},
    "data": "1" * 64,
    "data_files": [{"name": "rows.jsonl", "sha256": "2" * 64}, {"name": "data/train.jsonl", "sha256": "3" * 64}],
}
CONFIG = {
    "model": {"eos_token_id": 2, "context_length": 64, "type": "llama", "decoder": {"filename": "model.onnx"}},
    "search": {"max_length": 64},
}
GOLDEN = {"format": "edgetune/golden/1", "stop_ids": [2], "prompts": [{"messages": [], "text": "", "ids": []}]}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder that passes for an artifact wherever no graph is run."""
    folder = tmp_path / "made" / "artifact"
    folder.mkdir(parents=True)
    texts = {"genai_config.json": json.dumps(CONFIG), "golden.json": json.dumps(GOLDEN), "README.md": "# wörter\n"}
    texts |= {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{}"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(bytes(range(256)) * 5000)
    seal(folder, chain=CHAIN, edgetune="0.1.0", created="2026-01-02T03:04:05+00:00", versions={"onnxruntime": "1.31.1"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_each_time_and_the_artifact_back(artifact: Path, kind: Kind, tmp_path: Path) -> None:
    first = package(artifact, kind, tmp_path / "first")
    other = Path(shutil.copytree(artifact, tmp_path / "elsewhere"))
    for file in other.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    (other / "notes.txt").write_text("of mine")  # not the artifact's
    second = package(other, kind, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert first["sha256"] == second["sha256"] == hashlib.sha256((tmp_path / "first").read_bytes()).hexdigest()

    found = unpack(tmp_path / "first", tmp_path / "back")
    assert found["name"] == "tiny" and found["base"] == "org/model" and found["kind"] == kind
    back = contents(tmp_path / "back")
    bill = json.loads(back.pop("sbom.cdx.json"))
    assert back == contents(artifact)
    assert package(tmp_path / "back", kind, tmp_path / "third")["sha256"] == first["sha256"]

    hashes = {part["name"]: part["hashes"][0]["content"] for part in bill["components"] if part["type"] == "file"}
    assert hashes == {name: hashlib.sha256(content).hexdigest() for name, content in back.items()}
    base, runtime = (
        next(p for p in bill["components"] if p["bom-ref"] == ref) for ref in ("base", "pkg:pypi/onnxruntime@1.31.1")
    )
    assert base["purl"] == "pkg:huggingface/org/model@abc" and base["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    data = next(part for part in bill["components"] if part["bom-ref"] == "data")
    listed = {one["name"]: one["hashes"] for one in data["components"]}
    assert listed["rows.jsonl"] == [{"alg": "SHA-256", "content": "2" * 64}] and len(listed) == 2
    assert runtime["licenses"] == [{"license": {"id": "MIT"}}]
    refs = {part["bom-ref"] for part in [bill["metadata"]["component"], *bill["components"]]}
    assert set(bill["dependencies"][0]["dependsOn"]) <= refs and len(refs) == len(bill["components"]) + 1


def test_a_zip_needs_no_edgetune(artifact: Path, tmp_path: Path) -> None:
    package(artifact, "zip", tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.testzip() is None
        assert {entry.compress_type for entry in packed.infolist()} == {zipfile.ZIP_STORED}
        assert {stat.S_IMODE(entry.external_attr >> 16) for entry in packed.infolist()} == {0o644}
        packed.extractall(tmp_path)
    for line in (tmp_path / "tiny" / "SHA256SUMS").read_text().splitlines():
        sha256, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "tiny" / name).read_bytes()).hexdigest() == sha256


def test_an_oci_layout_has_a_layer_a_file_and_digests_that_hold(artifact: Path, tmp_path: Path) -> None:
    found = package(artifact, "oci", tmp_path / "a.oci.tar")
    with tarfile.open(tmp_path / "a.oci.tar") as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    root = tmp_path / "layout"
    assert json.loads((root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}

    def blob(descriptor: dict[str, Any]) -> bytes:
        algorithm, _, digest = descriptor["digest"].partition(":")
        content = (root / "blobs" / algorithm / digest).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest and len(content) == descriptor["size"]
        return content

    (listed,) = json.loads((root / "index.json").read_text())["manifests"]
    assert listed["digest"] == found["digest"]
    image = json.loads(blob(listed))
    assert image["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    config = json.loads(blob(image["config"]))
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in image["layers"]]
    assert config["config"]["format"] == "onnx" and config["descriptor"]["licenses"] == ["apache-2.0"]
    titles = {layer["annotations"]["org.opencontainers.image.title"]: layer for layer in image["layers"]}
    assert {name: blob(layer) for name, layer in titles.items() if name != "sbom.cdx.json"} == contents(artifact)
    kinds = {name: layer["mediaType"].removeprefix("application/vnd.cncf.model.") for name, layer in titles.items()}
    assert kinds["model.onnx.data"] == "weight.v1.raw" and kinds["README.md"] == "doc.v1.raw"
    assert kinds["tokenizer.json"] == "weight.config.v1.raw"
    assert len(list((root / "blobs/sha256").iterdir())) == 2 + len({layer["digest"] for layer in image["layers"]})


def test_large_files_use_zip64(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100_000)
    package(artifact, "zip", tmp_path / "a.zip")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.getinfo("tiny/model.onnx.data").extract_version == zipfile.ZIP64_VERSION
    unpack(tmp_path / "a.zip", tmp_path / "back")
    assert (tmp_path / "back/model.onnx.data").read_bytes() == (artifact / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_found_and_nothing_is_left(artifact: Path, kind: Kind, tmp_path: Path) -> None:
    good = tmp_path / "good"
    package(artifact, kind, good)
    whole = good.read_bytes()
    bad, out = tmp_path / "bad", tmp_path / "out"
    places = {member.name: member for member in open_bundle(good).members}
    flips = [places[name].offset + places[name].bytes // 2 for name in places]
    cuts = [0, 1, 100, 600, len(whole) // 2, len(whole) - 200_000, places["model.onnx.data"].offset + 5]
    for damaged in [
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in flips),
        *(whole[:cut] for cut in cuts),
        whole.replace(b"tokenizer.json", b"../kenizer.json"[:14]),
    ]:
        bad.write_bytes(damaged)
        with pytest.raises(InputError):
            unpack(bad, out)
        assert not out.exists() and not list(tmp_path.glob(".tmp-*"))
    check(good)


def tampered_zip(artifact: Path, path: Path, add: zipfile.ZipInfo, content: bytes = b"x", listed: bool = True) -> Path:
    """A zip with one entry more, honestly hashed where `listed`."""
    path.unlink(missing_ok=True)
    package(artifact, "zip", path)
    with zipfile.ZipFile(path) as packed:
        entries = {entry.filename: packed.read(entry) for entry in packed.infolist()}
    if listed:
        name = add.filename.removeprefix("tiny/")
        entries["tiny/SHA256SUMS"] += f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()
    with zipfile.ZipFile(path, "w") as packed:
        for name, text in entries.items():
            packed.writestr(zipfile.ZipInfo(name), text)
        packed.writestr(add, content)
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny/../../escaped", "not safe"),
        ("/etc/escaped", "does not list"),
        ("tiny//escaped", "not safe"),
        ("tiny/a\\..\\b", "not safe"),
        ("tiny/C:escaped", "not safe"),
        ("tiny/aux.txt", "not safe"),
        ("tiny/README.MD", "twice"),
        ("tiny/extra.onnx", "does not list"),
        ("other/extra", "does not list"),
        ("tiny/folder/", "not a regular file"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(artifact: Path, tmp_path: Path, name: str, says: str) -> None:
    bad = tampered_zip(artifact, tmp_path / "bad.zip", zipfile.ZipInfo(name))
    with pytest.raises(InputError, match=says):
        unpack(bad, tmp_path / "out" / "deep")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "out").exists()


def test_links_compression_and_unlisted_entries_in_a_zip_are_refused(artifact: Path, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("tiny/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    bomb = zipfile.ZipInfo("tiny/bomb")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    for entry, listed, says in (
        (link, True, "not a regular file"),
        (bomb, True, "compressed or encrypted"),
        (zipfile.ZipInfo("tiny/more"), False, "does not list"),
    ):
        with pytest.raises(InputError, match=says):
            check(tampered_zip(artifact, tmp_path / "bad.zip", entry, bytes(100_000), listed))


def tampered_tar(artifact: Path, path: Path, *add: tarfile.TarInfo, content: bytes = b"") -> Path:
    path.unlink(missing_ok=True)
    package(artifact, "oci", path)
    with tarfile.open(path, "a") as tar:
        for entry in add:
            tar.addfile(entry, io.BytesIO(content) if content else None)
    return path


def test_links_devices_and_extra_files_in_a_tar_are_refused(artifact: Path, tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        entry = tarfile.TarInfo("../escaped")
        entry.type, entry.linkname = kind, "/etc/passwd"
        with pytest.raises(InputError, match="not a regular file"):
            unpack(tampered_tar(artifact, tmp_path / "bad.tar", entry), tmp_path / "out")
    extra = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
    extra.size = 3
    with pytest.raises(InputError, match="manifest does not list"):
        check(tampered_tar(artifact, tmp_path / "bad.tar", extra, content=b"abc"))
    twice = tarfile.TarInfo("index.json")
    with pytest.raises(InputError, match="twice"):
        check(tampered_tar(artifact, tmp_path / "bad.tar", twice))


def test_layers_that_lead_elsewhere_are_refused(artifact: Path, tmp_path: Path) -> None:
    package(artifact, "oci", tmp_path / "good.tar")
    with tarfile.open(tmp_path / "good.tar") as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}  # type: ignore[union-attr]
    index = json.loads(files["index.json"])
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    image = files.pop(f"blobs/sha256/{digest}").replace(b'title":"README.md"', b'title":"../../READ"')
    new = hashlib.sha256(image).hexdigest()
    files[f"blobs/sha256/{new}"] = image
    index["manifests"][0] |= {"digest": f"sha256:{new}", "size": len(image)}
    files["index.json"] = json.dumps(index).encode()
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(InputError, match="not safe"):
        unpack(tmp_path / "bad.tar", tmp_path / "out" / "deep")


def test_false_lengths_do_not_fill_the_memory(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MOST_BYTES", 300)
    for kind in KINDS:
        package(artifact, kind, tmp_path / kind)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 5000
    (tmp_path / "pax").write_bytes(header.tobuf() + bytes(5120) + (tmp_path / "oci").read_bytes())
    for name in ("zip", "pax"):  # a central directory, a pax header
        with pytest.raises(InputError, match="claims a description of"):
            check(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"GGUF" + bytes(600), "neither a zip nor a tar"),
        (b"\x1f\x8b\x08" + bytes(600), "compressed afterwards"),
        (b"PK\x03\x04" + bytes(600), "damaged zip"),
    ],
)
def test_what_is_no_package_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    done = edgetune("unpack", tmp_path / "file", "--check")
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_other_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(tmp_path / "a.txt", "a/a.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(InputError, match="SHA256SUMS does not come first"):
        check(tmp_path / "a.zip")
    with pytest.raises(InputError, match="no OCI image layout"):
        check(tmp_path / "a.tar")
    with pytest.raises(InputError, match="is a folder"):
        check(tmp_path)


def test_places_are_checked_before_anything_is_written(artifact: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.zip"
    package(artifact, "zip", good)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out in (mine, mine / "thesis.txt"):
        with pytest.raises(InputError, match="--out"):
            unpack(good, out)
        with pytest.raises(InputError, match="--out"):
            package(artifact, "zip", out)
    with pytest.raises(InputError, match="lies in the artifact"):
        package(artifact, "zip", artifact / "a.zip")
    assert (mine / "thesis.txt").read_text() == "years of work"
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match="lies in a run"):
        unpack(good, run / "artifact")
    unpack(good, tmp_path / "back")
    unpack(good, tmp_path / "back")  # an earlier artifact is replaced


def test_a_full_disk_is_said_before(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(artifact, "zip", tmp_path / "a.zip")

    def full(folder: Path, needed: int, what: str) -> None:
        raise InputError(f"{what} needs {needed}")

    monkeypatch.setattr(bundle, "require_space", full)
    for work in (lambda: package(artifact, "oci", tmp_path / "b"), lambda: unpack(tmp_path / "a.zip", tmp_path / "b")):
        with pytest.raises(InputError, match=r"needs \d{7}"):
            work()
        assert not (tmp_path / "b").exists()


def test_an_artifact_that_changed_is_not_packed(artifact: Path, tmp_path: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"Graph")
    with pytest.raises(InputError, match="SHA-256"):
        package(artifact, "zip", tmp_path / "a.zip")
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".tmp-*"))


def test_the_command_line_without_torch(tiny_artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    """What is unpacked on a device answers; neither way imports what the runtime install does not have."""
    kept = copy_of(tiny_artifact, tmp_path)
    code = (
        "import sys\nfrom edgetune.cli import app\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'jinja2'): sys.modules[name] = None\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: sys.exit(end.code)"
    )

    def run(*arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-c", code, *map(str, arguments), "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    made = run("package", kept, "--oci")
    assert made["path"] == "tiny.oci.tar" and made["digest"].startswith("sha256:")
    assert run("unpack", "tiny.oci.tar", "--check")["name"] == "tiny"
    assert run("unpack", "tiny.oci.tar", "--out", "device")["path"] == "device"
    assert run("generate", "device", "Hello", "--max-tokens", "2")["completion_tokens"] >= 1
    assert json.loads((tmp_path / "device" / "manifest.json").read_text())["format"] == FORMAT


def test_the_kind_must_be_chosen(artifact: Path) -> None:
    for kinds in ([], ["--zip", "--oci"]):
        done = edgetune("package", artifact, *kinds)
        assert done.returncode == 2 and "--zip, or --oci" in done.stderr
