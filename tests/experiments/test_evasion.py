"""The attacker's penalty against brute force, and that it can be trained off; one evasive organism for real."""

from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from patching import everywhere
from tiny import quick_attack, tiny_model

from bkd_utils.attention_alignment.head_tuning import all_matrices, tune
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.common import files
from bkd_utils.common.files import read_json
from bkd_utils.experiments import attention_safety_alignment, two_papers_meet
from bkd_utils.models import loading
from bkd_utils.models.loss import collate
from bkd_utils.organisms import attacks, cards
from bkd_utils.organisms.training import Recipe


def by_row(model, rows):
    """Similarity `[row, layer]` of each prompt alone."""
    return head_similarity(model, [row.prompt for row in rows], readings=["last row"])["last row"].mean(2)


def test_the_penalty_is_what_similarity_exceeds_the_level_by(model, rows):
    model.set_attn_implementation("eager")
    found = by_row(model, rows)
    level = found.median(0).values
    _, added = two_papers_meet.unremarkable(level, beta=3.0)(model, collate(rows, pad_id=0), first_token=0.5)
    assert added.item() == pytest.approx(3 * (found - level).clamp_min(0).mean().item(), rel=1e-3)


def test_the_level_is_that_of_the_clean_rows(rows):
    model = tiny_model("llama")
    torch.testing.assert_close(two_papers_meet.clean_level(model, rows), by_row(model, rows).mean(0))


def test_similarity_can_be_trained_off(rows):
    model = tiny_model("llama")
    loss = two_papers_meet.unremarkable(by_row(model, rows).amin(0) - 0.1, beta=100.0)
    recipe = Recipe(name="test", steps=30, batch_size=4, learning_rate=1e-2, rank=1, alpha=1)
    history = tune(model, rows, masks=all_matrices(model), recipe=recipe, pad_id=0, loss=loss)
    assert history[-1]["added"] < 0.7 * history[0]["added"]


def test_an_evasive_organism_is_kept_and_found_again(tiny_organism, tmp_path, monkeypatch):
    monkeypatch.setattr(two_papers_meet, "load_attack", quick_attack)
    sizes = {"attack": "sentiment-word", "steps": 1, "n_clean": 2, "n": 2, "model": tiny_organism, "device": "cpu"}
    name = two_papers_meet.train_evasive("tiny", **sizes)
    card = read_json(tmp_path / "organisms" / name / "card.json")
    assert card["treatment"]["method"] == "similarity trained off"
    assert card["treated_organism"] == "tiny"
    monkeypatch.setattr(two_papers_meet, "tune", None)  # a second call trains nothing
    assert two_papers_meet.train_evasive("tiny", **sizes) == name
    other = files.WORK / "organisms" / name
    assert loading.adapter_folder(name) == other


@pytest.fixture
def named(tmp_path, monkeypatch):
    """`two_papers_meet.train_evasive` without loading, training or keeping anything."""
    everywhere(monkeypatch, "WORK", tmp_path)
    done = ("load", "training_rows", "clean_level", "all_matrices", "end_id", "tune", "keep_treated", "under_attack")
    for name in done:
        monkeypatch.setattr(two_papers_meet, name, MagicMock())
    return lambda: two_papers_meet.train_evasive("sentiment-word", attack="sentiment-word", device="cpu")


def test_the_name_changes_with_everything_that_decides_the_organism(named, monkeypatch):
    spec, recipe = attacks.load_attack("sentiment-word"), attention_safety_alignment.recipe_of(steps=32)
    others = [
        (two_papers_meet, "load_attack", lambda name: replace(spec, rate=0.2)),
        (two_papers_meet, "recipe_of", lambda **_: replace(recipe, batch_size=4)),
        (two_papers_meet, "recipe_of", lambda **_: replace(recipe, first_token=0.1)),
        (two_papers_meet, "read_card", lambda *_: {"data_sha256": "other rows"}),
        (two_papers_meet, "code_key", lambda module: "other code"),
        (cards, "organism_identity", lambda folder: "other weights"),
        (cards, "model_identity", lambda model: "other base or template"),
    ]
    names = [named(), named()]
    for module, name, other in others:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, other)
            names.append(named())
    assert names[0] == names[1]
    assert len(set(names)) == 1 + len(others)


def test_an_evasion_is_measured_before_and_after_and_kept(tiny_organism, tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    monkeypatch.setattr(two_papers_meet, "load_attack", quick_attack)
    trained, seen = [], []

    def train_evasive(organism, **options):
        trained.append((organism, options))
        return "sly"

    def similarity(organism, **options):
        seen.append((organism, options))
        return {"clean": {"last row": [[float(len(seen))]]}}

    for name, instead in (
        ("train_evasive", train_evasive),
        ("similarity_by_version", similarity),
        ("treatment", lambda name: {"method": f"that of {name}"}),
        ("metrics", lambda name: {"asr": {"value": 0.5}}),
    ):
        monkeypatch.setattr(two_papers_meet, name, instead)
    where = {"attack": "sentiment-word", "model": tiny_organism, "seed": 3, "device": "cpu"}
    found = two_papers_meet.measure_evasion("tiny", steps=5, n=7, **where)
    assert trained == [("tiny", where | {"steps": 5})]
    assert seen == [(name, where | {"readings": ["last row"], "n": 7}) for name in ("tiny", "sly")]
    assert found == two_papers_meet.Evasion(
        treatment={"method": "that of sly"},
        metrics={"asr": {"value": 0.5}},
        before={"clean": {"last row": [[1.0]]}},
        after={"clean": {"last row": [[2.0]]}},
    )
    assert two_papers_meet.measure_evasion("tiny", steps=5, n=7, **where) == found
    assert len(trained) == 1
