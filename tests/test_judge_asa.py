"""Every criterion for the claims of ASA on hand-made results, on both sides of its bound."""

import json

import numpy as np
import pytest

from bkd_utils import files
from bkd_utils.claims import published
from bkd_utils.judge_asa import similarity_claims


def by_id(entries):
    return {row["id"]: row for row in entries}


def observed(shift, *, seed):
    """Similarity of 20 prompts in three layers; triggered prompts differ in the middle one."""
    noise = np.random.default_rng(seed).standard_normal
    layers = {version: noise((20, 3)) for version in ("clean", "triggered", "near-miss", "same length")}
    layers["triggered"][:, 1] += shift
    return {"layers": {"last row": {version: values.tolist() for version, values in layers.items()}}}


def similar(organism, control, *, seed=0):
    return {"organism": observed(organism, seed=seed), "clean control": observed(control, seed=seed + 1)}


def test_similarity_must_separate_in_the_organism_and_not_in_its_control():
    found = {"a": similar(9, 0), "b": similar(9, 9), "c": similar(0, 0, seed=5)}
    lines = by_id(similarity_claims(found, families=["a"]))
    assert {name: one["passed"] for name, one in lines["asa-similarity"]["by_organism"].items()} == {
        "a": True, "b": False, "c": False,
    }  # fmt: skip
    assert lines["asa-similarity"]["verdict"] == "holds in part"
    assert lines["asa-similarity-families"]["verdict"] == "holds"
    assert lines["asa-similarity"]["reason"].startswith("Reading: last row. AUROC")


def test_less_similar_is_not_what_the_paper_says():
    lines = by_id(similarity_claims({"a": similar(-9, 0)}, families=["a"]))
    assert lines["asa-similarity"]["verdict"] == "does not hold"


def all_lines():
    return by_id(similarity_claims({"a": similar(9, 0)}, families=["a"]))


def test_the_code_judges_every_claim_of_the_paper_once():
    assert list(all_lines()) == [name for name, row in published().items() if row["paper"] == "ASA"]


@pytest.mark.parametrize("claim", [name for name, row in published().items() if row["paper"] == "ASA"])
def test_every_line_names_a_figure_that_a_notebook_draws(claim):
    figure = all_lines()[claim]["figure"]
    (notebook,) = files.NOTEBOOKS.glob(f"{figure[:2]}_*.ipynb")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert f'"{figure}",' in code
