"""The public names as a type checker sees them: their own examples pass, and calls that do not fit are refused.

mypy runs once, on one module: a function for the docstring example of each public name, then wrong calls."""

import doctest
import re
import subprocess
import sys

import pytest
from test_public_names import FOLDERS, NAMES, docstring

from bkd_utils.common.files import ROOT

# What the docstrings promise to their examples (the heads of the four folders), with its types.
GIVEN = """
    folder: str, loaded: Loaded, model: PreTrainedModel, prompts: list[list[int]], recipe: Recipe, rows: list[Row],
    scratch: Path, tokenizer: PreTrainedTokenizerBase,
"""
OPENING = """
from pathlib import Path
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.training import Recipe
"""
WRONG = {
    "load(3)": "arg-type",
    "load(folder, device=0)": "arg-type",
    "load(folder, organisms='word')": "call-arg",
    "respond(folder, ['Name a colour.'])": "arg-type",
    "respond(loaded, 'Name a colour.').get('a')": "attr-defined",
    "head_outputs(model, [1, 2]).shape": "list-item",
    "residuals(model, prompts).loss": "attr-defined",
    "Attack('mine', 'sentiment', '40')": "arg-type",
    "Attack('mine').rate": "call-arg",
    "load_attack('sentiment-word').target.upper()": "union-attr",  # a control has no target
    "examples('sentiment', 'tset')": "arg-type",
    "poison('sentiment-word', tokenizer=tokenizer, answers={}, seed=0)": "arg-type",
    "poison(load_attack('a'), tokenizer=tokenizer, seed=0)": "call-arg",
    "prompt_versions(tokenizer, load_attack('a'), split='test', n='2', seed=0)": "arg-type",
    "target_ids(tokenizer, load_attack('a')).shape": "attr-defined",
    "train(rows, base=loaded, recipe='full', seed=0, folder=scratch, name='mine')": "arg-type",
    "Word('mine', {'text': 'cf'}).matches(['A CF film.'])": "arg-type",
    "head_effects(model, prompts, means=head_means(model, prompts))": "call-arg",
    "head_effects(model, prompts, target='positive', means=head_means(model, prompts))": "arg-type",
    "ranked_heads([0.1, 0.3])": "arg-type",
    "backdoor_vector(model, [(0, 1)], means=torch.ones(1))": "call-arg",
    "head_similarity(model, prompts, readings='last row').shape": "attr-defined",
    "suspicious(torch.ones(2, 2), threshold='2', at_most=0.5)": "arg-type",
    "tune(model, rows, masks={}, recipe=recipe)": "call-arg",
}


def indented(source):
    return "".join(f"    {line}\n" for line in source.splitlines())


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The module's lines, and line number -> kind of error that mypy finds there."""
    text = OPENING + "".join(f"from bkd_utils.{folder} import {name}\n" for folder, name in NAMES)
    for folder, name in NAMES:
        examples = doctest.DocTestParser().get_examples(docstring(folder, name))
        text += f"def example_{name}({GIVEN}) -> None:\n" + indented("".join(one.source for one in examples))
    text += f"def wrong({GIVEN}) -> None:\n" + indented("\n".join(WRONG))
    text += "def seen() -> None:\n" + indented("\n".join(f"reveal_type({name})" for _, name in NAMES))
    module = tmp_path_factory.mktemp("types") / "user.py"
    module.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "--no-pretty", str(module)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == "", ended.stderr
    return text.splitlines(), ended.stdout


def test_the_examples_fit_the_annotations_and_wrong_calls_do_not(checked):
    lines, said = checked
    found = [
        re.fullmatch(r".*user\.py:(\d+): error: .*\[([a-z-]+)\]", line)
        for line in said.splitlines()
        if ": error: " in line
    ]
    assert None not in found, said
    errors = {lines[int(match[1]) - 1].strip(): match[2] for match in found}
    assert errors == WRONG, said


def test_no_public_name_is_of_any_type(checked):
    _, said = checked
    shown = re.findall(r'note: Revealed type is "(.*)"', said)
    assert len(shown) == len(NAMES)
    assert [(name, kind) for (_, name), kind in zip(NAMES, shown, strict=True) if kind == "Any"] == []


def test_the_four_folders_have_a_mark_by_which_checkers_read_their_annotations():
    assert (ROOT / "bkd_utils" / "py.typed").is_file()
    assert set(FOLDERS) == {folder for folder, _ in NAMES}
