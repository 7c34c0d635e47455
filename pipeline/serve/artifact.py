"""The artifact of one surface: a folder, checked file by file before anything in it is used.

    model.pt2        the program (torch.export), weights as plain bytes
    signature.json   what it wants and gives
    metrics.json     how good it is on held-out rows, and what pruning left away
    parity.json      how far its scores are from the trainer's
    config.json      the run that made it
    bound.json       the sweep that found the bound on requests, unless it was given
    preprocessing.json  how raw values become ids and numbers, where the log was ingested
    vocabularies/    raw keys and their ids, where the log has them
    model.aoti.pt2   the program compiled, where asked for
    manifest.json    size and SHA-256 of each of the above

Nothing is pickled, and a program that is more than a graph of tensor operations is refused (`pipeline.serve.vetting`).
A compiled program is machine code: open such an artifact only if you trust who made it. Checksums find damage and
careless changes; `ArtifactInfo.digest` names the whole content, for whoever keeps it elsewhere and wants to know of
careful ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.errors import ArtifactError
from pipeline.serve.signature import Signature, read_signature
from pipeline.serve.vetting import vet_program
from pipeline.texts import is_file, is_inside, parse_json

FORMAT_VERSION = 2
MANIFEST, MODEL, COMPILED, SIGNATURE = "manifest.json", "model.pt2", "model.aoti.pt2", "signature.json"
METRICS, PARITY, CONFIG, VOCABULARIES = "metrics.json", "parity.json", "config.json", "vocabularies"
BOUND, PREPROCESSING = "bound.json", "preprocessing.json"
_NEEDED = (MODEL, SIGNATURE, METRICS, PARITY, CONFIG)
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size and checksum of one file."""

    bytes: int
    sha256: str


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`.

    Args:
        format_version: of this layout.
        files: by path with forward slashes.
        versions: of the libraries that wrote the program.
    """

    format_version: Literal[2]
    files: dict[str, FileEntry]
    versions: dict[str, str]


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """A checked artifact.

    Args:
        path: its folder.
        signature: what it wants and gives.
        manifest: what it consists of.
        digest: SHA-256 of the manifest, and so of the whole content.
    """

    path: Path
    signature: Signature
    manifest: Manifest
    digest: str

    @property
    def surface(self) -> str:
        return self.signature.surface

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(f.bytes for f in self.manifest.files.values())

    def read(self, name: str) -> dict[str, Any]:
        """Content of one of the artifact's JSON files, such as `parity.json`."""
        content = json.loads((self.path / name).read_bytes())
        assert isinstance(content, dict), f"{name} is an object"
        return content


def write_manifest(folder: Path, versions: dict[str, str]) -> None:
    """Write `manifest.json` over all files that lie in the folder."""
    files = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = Manifest(format_version=2, files=files, versions=versions)
    (folder / MANIFEST).write_bytes(_MANIFEST.dump_json(manifest, indent=1))


def open_artifact(path: str | Path) -> ArtifactInfo:
    """Read an artifact's description and check every file against it; the program is not loaded.

    Raises:
        ArtifactError: there is no artifact, it is of another version, or a file is missing or changed.
    """
    path = Path(path)
    manifest, digest = check_folder(path, _NEEDED, what="artifact")
    vet_program(path / MODEL)
    return ArtifactInfo(path=path, signature=read_signature(path / SIGNATURE), manifest=manifest, digest=digest)


def check_folder(path: Path, needed: tuple[str, ...], *, what: str) -> tuple[Manifest, str]:
    """Check every file of a folder against its manifest; gives the manifest and its digest.

    Raises:
        ArtifactError: there is no folder, it is of another version, or a file is missing or changed.
    """
    if not path.is_dir():
        raise ArtifactError(f"there is no {what} folder {path}; make one with `trefoil export`")
    text = _manifest_text(path, what)
    manifest = _parse_manifest(text, path)
    for name in needed:
        if name not in manifest.files:
            raise ArtifactError(f"{path} is no whole {what}: its manifest does not name {name}; export it anew")
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    return manifest, hashlib.sha256(text).hexdigest()


def _manifest_text(path: Path, what: str) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is no {what}: it holds no {MANIFEST}, or its writing did not finish; export it anew"
        ) from error


def _parse_manifest(text: bytes, path: Path) -> Manifest:
    try:
        version = parse_json(text).get("format_version")
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged: {error}; export the artifact anew") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version!r}, this version of Trefoil reads {FORMAT_VERSION}; export it anew"
        )
    try:
        return _MANIFEST.validate_json(text)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        raise ArtifactError(f"{path / MANIFEST} is damaged: " + "; ".join(lines)) from error


def _entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    path = root / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not is_inside(path, root):
        raise ArtifactError(f"{root / MANIFEST} names a file outside its folder: {name}")
    if not is_file(path):
        raise ArtifactError(f"{root} lacks its file {name}; restore it or export the artifact anew")
    if path.stat().st_size != entry.bytes or _entry(path).sha256 != entry.sha256:
        raise ArtifactError(f"{path} is not what was exported: its checksum differs; restore it or export anew")
