"""The way in: the names that the four method folders list, each with a docstring whose example runs."""

import ast
import copy
import doctest
import importlib
import inspect
import re

import numpy as np
import pytest
import torch
from patching import everywhere
from tiny import make_rows, save_tiny

from bkd_utils.attention_alignment import similarity
from bkd_utils.common.files import ROOT
from bkd_utils.models.loading import load
from bkd_utils.organisms.training import Recipe

METHODS = ("models", "organisms", "backdoor_attribution", "attention_alignment")
FOLDERS = {name: importlib.import_module(f"bkd_utils.{name}") for name in METHODS}
NAMES = [(folder, name) for folder, module in FOLDERS.items() for name in module.__all__]
# A dictionary has no docstring of its own; its module describes it.
TOLD_ELSEWHERE = {"READINGS": similarity}
RECIPE = Recipe("example", steps=2, batch_size=4, learning_rate=1e-2, rank=2, alpha=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model on disk, and loaded once; its tokenizer takes longer to read than its weights."""
    folder = str(save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama"))
    return folder, load(folder, device="cpu")


@pytest.fixture
def given(saved, tmp_path, monkeypatch):
    """The names that the docstrings of the four folders promise; examples may change the model."""
    everywhere(monkeypatch, "WORK", tmp_path / "work")
    monkeypatch.setenv("BKD_WORK", str(tmp_path / "work"))
    folder, once = saved
    loaded = type(once)(copy.deepcopy(once.model), once.tokenizer, once.address, once.organism)
    rows = make_rows(8)
    ids = torch.randint(3, 400, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "folder": folder,
        "loaded": loaded,
        "model": loaded.model,
        "np": np,
        "prompts": [row[:n] for row, n in zip(ids, (4, 6, 9, 12), strict=True)],
        "recipe": RECIPE,
        "rows": rows,
        "scratch": tmp_path,
        "tokenizer": loaded.tokenizer,
        "torch": torch,
    }


def docstring(folder, name):
    return inspect.cleandoc((TOLD_ELSEWHERE.get(name) or vars(FOLDERS[folder])[name]).__doc__ or "")


def failures(text, names):
    """What `doctest` says about the examples of a text, run one after the other in a namespace."""
    said = []
    example = doctest.DocTestParser().get_doctest(text, dict(names), "example", None, 0)
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    return "".join(said)


@pytest.mark.parametrize(("folder", "name"), NAMES)
def test_the_example_of_a_public_name_runs(folder, name, given):
    text = docstring(folder, name)
    examples = doctest.DocTestParser().get_examples(text)
    assert any(example.want for example in examples)
    assert any(name in example.source for example in examples)
    public = {each: vars(FOLDERS[folder])[each] for each in FOLDERS[folder].__all__}
    assert failures(text, public | given) == ""


def test_a_wrong_example_is_told():
    assert "Got:\n    2" in failures(">>> 1 + 1\n3\n", {})


@pytest.mark.parametrize(("folder", "name"), NAMES)
def test_a_docstring_says_what_before_its_example_and_where_it_comes_from(folder, name):
    text = docstring(folder, name)
    said, _, _ = text.partition(">>>")
    assert len(said.split("\n")[0]) > 20
    assert re.search(r"Source: \w|\((as in \w|ASA)|rule of ours", " ".join(said.split()))


def test_a_folder_tells_what_its_examples_are_given():
    promised = {"folder", "loaded", "model", "prompts", "recipe", "rows", "scratch", "tokenizer"}
    for folder, module in FOLDERS.items():
        examples = [doctest.DocTestParser().get_examples(docstring(folder, name)) for name in module.__all__]
        trees = [ast.parse(example.source) for found in examples for example in found]
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} & promised
        assert [name for name in sorted(used) if f"`{name}`" not in module.__doc__] == []


def test_the_module_of_the_readings_names_each_of_them():
    assert [name for name in similarity.READINGS if f'"{name}"' not in similarity.__doc__] == []


def test_the_way_in_is_forty_names_and_no_other_folder_has_any():
    assert len(NAMES) == len({name for _, name in NAMES}) == 40
    others = {path.parent.name for path in (ROOT / "bkd_utils").glob("*/__init__.py")} - set(METHODS)
    assert others == {"common", "experiments", "reports", "running"}
    for name in others:
        assert not hasattr(importlib.import_module(f"bkd_utils.{name}"), "__all__"), name


def test_a_folder_imports_what_it_lists_and_nothing_else():
    for folder, module in FOLDERS.items():
        imported = {
            key for key, value in vars(module).items() if not key.startswith("_") and not inspect.ismodule(value)
        }
        assert imported == set(module.__all__), folder
