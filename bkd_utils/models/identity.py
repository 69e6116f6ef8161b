"""What a model or an organism is: a hash over the content of every file that decides what it does.

Hashes are remembered as long as path, size, times and inode of a file stay the same, and never by an address alone.
Links are followed, so that the content behind a link counts."""

import json
import re
import time
from functools import cache
from pathlib import Path

from bkd_utils.common.files import canonical_json, sha256_file, sha256_text
from bkd_utils.models import folders
from bkd_utils.models.folders import ModelError, model_folder

ADAPTER = ("adapter_model.safetensors", "adapter_config.json", folders.CHANGES)
WHOLE = (folders.WEIGHTS, "config.json", folders.CHANGES)  # of an encoder, all of whose weights were trained
# Files beside a model that are not read when it is loaded: receipts, licences, reports of its training.
BESIDE = re.compile(
    r"\..*|(readme|licen[cs]e|notice|requirements)\b.*|(asset|card|history|manifest|trainer_state|training_args"
    r"|(all|train|eval|test)_results)\.json",
    re.IGNORECASE,
)
# Entries of config files that say where, and with which version, a file was written.
NOISE = {"transformers_version", "peft_version", "_name_or_path", "name_or_path", "base_model_name_or_path"}
NOISE |= {"_commit_hash", "revision", "is_local", "local_files_only"}
FRESH = 2e9  # nanoseconds; a file may change again so soon after it was written that its time stays the same


def file_sha256(path: Path) -> str:
    """Hash of a file's content, in a `*config.json` of its entries without `NOISE`."""
    found = path.stat()
    stamp = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    fresh = 0 <= time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < FRESH
    return (_content_sha256.__wrapped__ if fresh else _content_sha256)(path, stamp)


@cache
def _content_sha256(path: Path, stamp: tuple[int, ...]) -> str:
    if not path.name.endswith("config.json"):
        return sha256_file(path)
    found = folders.json_object(path).items()
    deciding = {key: value for key, value in found if key not in NOISE and not key.endswith("_file")}
    return sha256_text(json.dumps(deciding, sort_keys=True))


def base_sha256(address: str) -> str:
    """Hash of a model's weights alone."""
    return sha256_text("\n".join(file_sha256(path) for path in folders.weight_files(model_folder(address))))


def settings(address: str) -> dict[str, str]:
    """Name -> hash of the files other than weights that decide a model's answers: config, tokenizer, templates."""
    folder = model_folder(address)
    paths = {path for pattern in folders.SETTINGS for path in folder.glob(pattern) if not BESIDE.fullmatch(path.name)}
    paths |= set(folder.glob("additional_chat_templates/*.jinja"))
    if (folder / folders.WEIGHTS).is_file():
        paths.discard(folder / folders.INDEX)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(paths) if path.is_file()}


def model_identity(address: str) -> str:
    """Hash over all files that decide what a model does. Raises ModelError for an address without a whole model."""
    return joined(base_sha256(address), settings(address))


def joined(weights: str, files: dict[str, str]) -> str:
    """The identity of a model from the hashes of its weights and of its other files, as on the card of an organism."""
    return sha256_text(canonical_json({"weights": weights, "settings": files}))


def organism_identity(folder: Path) -> str:
    """Hash over the adapter (of an encoder: all weights) in a folder, its config and the weights changed by treatments.
    Raises ModelError without them."""
    return sha256_text(canonical_json(adapter_files(folder)))


def adapter_files(folder: Path) -> dict[str, str]:
    """Name -> hash of the files of an organism. ModelError without weights or config."""
    names = WHOLE if is_whole(folder) else ADAPTER
    if lacks := [name for name in names[:2] if not (folder / name).is_file()]:
        raise ModelError(f"{folder} has no {lacks[0]}")
    return {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}


def is_whole(folder: Path) -> bool:
    """Is the organism in a folder a whole model, and no adapter?"""
    return (folder / WHOLE[0]).is_file()


def short_name(address: str) -> str:
    """A name for folders of results: the last part of the address and eight digits of the identity."""
    plain = re.sub(r"[^\w.-]+", "-", address.rstrip("/").rpartition("/")[2]).lstrip(".") or "model"
    return f"{plain}-{model_identity(address)[:8]}"
