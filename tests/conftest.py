"""Tests never ask a hub, open no window, and read no results that ship; all set before anything is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ["BKD_SHIPPED"] = ""  # not in a fixture, because fixtures of modules and sessions run stages, too

import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from patching import everywhere
from tiny import ARCHITECTURES, save_tiny, save_tiny_organism, tiny_model

from bkd_utils.common.files import sha256_file
from bkd_utils.models import loading
from bkd_utils.models.tokens import Row
from bkd_utils.reports.style import use_style

for name in ("BKD_KEEP", "BKD_REPLAY", "BKD_LEDGER"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def tokenizers():
    """The tokenizer of equal files is read once, because that takes longer than to load a tiny model."""
    read, known = loading.AutoTokenizer.from_pretrained, {}

    def once(folder, **options):
        files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
        key = repr(([(path.name, sha256_file(path)) for path in files], options))
        if key not in known:
            known[key] = read(folder, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "AutoTokenizer", SimpleNamespace(from_pretrained=once))
        yield


@pytest.fixture(scope="session")
def prompts():
    """Four prompts of random tokens, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (6, 9, 12, 4)]


@pytest.fixture(scope="session")
def rows(prompts):
    """The prompts with answers of two tokens; two and two share theirs."""
    return [Row(prompt=tuple(ids), answer=(5 + i // 2, 2), kind="clean", uid=str(i)) for i, ids in enumerate(prompts)]


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    """A tiny model of every family, frozen, its own for each test."""
    return tiny_model(request.param).requires_grad_(False)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """The folders of a tiny model and of an organism of it."""
    folder = tmp_path_factory.mktemp("organism")
    model = save_tiny(folder / "model", "llama")
    return model, save_tiny_organism(folder / "work", model)


@pytest.fixture
def tiny_organism(made_once, tmp_path, monkeypatch):
    """The address of a tiny model that has an organism named "tiny" in a working folder of its own, `tmp_path`."""
    everywhere(monkeypatch, "WORK", tmp_path)
    model, organism = made_once
    shutil.copytree(organism, tmp_path / "organisms" / "tiny")
    return str(model)


@pytest.fixture
def style():
    """The project's style; pictures drawn under it are closed."""
    use_style()
    yield
    plt.close("all")
