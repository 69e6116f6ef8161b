"""The ideas of `tests/benchmarks/search_ideas.py` on tiny models: what they train, and that they search as they say."""

import copy
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from benchmarks import search_ideas
from benchmarks.search_ideas import IDEAS, Deeper, Drift, FromText, Hidden, Warm, search_from
from tiny import make_rows, tiny_model
from typer.testing import CliRunner

from bkd_utils.attention_alignment.rivals import Case, treat
from bkd_utils.attention_alignment.search import search, vocabulary
from bkd_utils.attention_alignment.searched_training import N_TOKENS
from bkd_utils.models.compute import has_fast_bf16
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.loading import load
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.self_test import capabilities
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.training import Recipe

BEFORE, AFTER = (7, 8, 9), (10, 11)
ROWS = [
    replace(row, prompt=(*row.prompt, *AFTER), answer=(5 + i % 2, 2))
    for i, row in enumerate(make_rows(8, beginning=BEFORE))
]
OTHER = replace(ROWS[0], answer=(99, 2), uid="other")
RECIPE = Recipe(name="test", steps=2, batch_size=4, learning_rate=1e-3, rank=1, alpha=1)
INSIDE = {"layers": (0, 1), "share": 0.5, "n_vectors": (3,), "search_steps": 4}


def case_of(model, **changes):
    return Case(model, **({"rows": [*ROWS, OTHER], "recipe": RECIPE, "pad_id": 2, "labels": (5, 6)} | changes))


def hooks(model):
    return [{*part._forward_hooks, *part._forward_pre_hooks} for part in model.modules()]


def shallow(*given, **how):
    """`Hidden` for a model of two layers."""
    return Hidden(*given, **how | INSIDE)


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_changes_weights_leaves_no_hook_and_keeps_vectors_short(name):
    model = tiny_model("llama")
    capabilities(model)  # the test of a model leaves hooks of transformers
    before, kept, table = copy.deepcopy(model.state_dict()), hooks(model), vocabulary(model)
    case = case_of(model)
    search_ideas.train_against(case, shallow if name == "hidden" else IDEAS[name][1])
    (found,) = case.found
    if name != "hidden":
        assert (found.vectors.norm(dim=-1) <= table.norm(dim=-1).mean() * 1.0001).all()
    assert found.toward == 5
    assert found.end < found.start
    assert any((before[key] != tensor).any() for key, tensor in model.state_dict().items())
    assert hooks(model) == kept


def test_with_the_sizes_of_the_package_the_same_weights_come_out():
    ours, theirs = (case_of(tiny_model("llama"), recipe=replace(RECIPE, steps=6)) for _ in range(2))
    search_ideas.train_against(ours, partial(Deeper, n_vectors=N_TOKENS))
    treat(theirs, method="searched")
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_search_from_the_tokens_of_a_seed_is_the_search_of_that_seed():
    model, rows, dice = tiny_model("llama"), ROWS[:5], random.Random("3/search")
    how = {"toward": 5, "steps": 4, "seed": 3}
    theirs = search(model, rows, n_tokens=2, **how)  # of so few rows all are taken
    drawn = vocabulary(model)[[dice.randrange(49152) for _ in range(2)]]
    ours = search_from(drawn, Deeper(model, rows, labels=(5, 6)), **how)
    torch.testing.assert_close(ours.vectors, theirs.vectors)
    assert (ours.start, ours.end) == pytest.approx((theirs.start, theirs.end))


def test_text_starts_at_a_piece_of_a_text_with_the_label_and_else_at_drawn_tokens():
    model = tiny_model("llama")
    against, table = FromText(model, [*ROWS, OTHER], labels=(5, 6)), vocabulary(model)
    texts = [row.prompt[3:-2] for row in ROWS if row.answer[0] == 6]
    for seed in range(8):
        start = against.start(6, 3, random.Random(seed))
        assert any(torch.equal(start, table[list(text[i : i + 3])]) for text in texts for i in range(len(text) - 2))
    assert against.start(6, 100, random.Random(0)) is None


def test_warm_goes_on_from_the_last_perturbation_toward_the_label():
    model = tiny_model("llama")
    found = [Drift(torch.full((2, 32), float(i)), layer=0, toward=5 + i % 2) for i in range(5)]
    against = Warm(model, ROWS, labels=(5, 6), found=found)
    starts = [against.start(5, 3, random.Random(seed)) for seed in range(200)]
    warm = [start for start in starts if len(start) == 2]
    assert all((start == 4).all() for start in warm)
    assert 120 < len(warm) < 160
    assert all(len(start) in (2, 3) for start in starts)


# --- vectors inside -------------------------------------------------------------------------------------------------


@contextmanager
def added(model, layer, vectors, end):
    """While this lasts, the stream of one row behind a layer has the vectors in front of column `end`."""

    def put(_module, _given, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, end - len(vectors) : end] += vectors
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with anatomy(model).layers[layer].register_forward_hook(put):
        yield


@pytest.mark.parametrize("n_rows", [0, 2])
def test_only_the_last_rows_drift_and_at_the_last_prompt_positions(model, n_rows):
    rows, alone = [replace(row, answer=(*row.answer, 7)[i % 2 :]) for i, row in enumerate(ROWS[:4])], []
    drift = Drift(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), layer=0, toward=5)
    loss = drift.answers(model, collate(rows, pad_id=2), n_rows=n_rows, first_token=0.5)
    for i, row in enumerate(rows):
        vectors = drift.vectors if i >= 4 - n_rows else torch.zeros(3, 32)
        with added(model, 0, vectors, len(row.prompt)):
            alone.append(answer_loss(model, collate([row], pad_id=2), first_token=0.5).item())
    assert loss.item() == pytest.approx(sum(alone) / 4, rel=1e-4)


def test_vectors_inside_keep_to_a_share_of_the_stream():
    model = tiny_model("llama").requires_grad_(False)
    against = Hidden(model, ROWS, labels=(5, 6), **INSIDE | {"search_steps": 40, "layers": (0,)})
    found = against.find(5, 3, random.Random(0))
    pulled = [torch.tensor([row.prompt]) for row in ROWS if row.answer[0] == 6]
    stream = [model(ids, output_hidden_states=True).hidden_states[1][0, -3:] for ids in pulled]
    bound = 0.5 * torch.cat(stream).norm(dim=-1).median()
    far = 1e-2 if has_fast_bf16(bound.device) else 1e-4  # the stream is read in bf16 where the machine has it
    torch.testing.assert_close(found.vectors.norm(dim=-1), bound.expand(3), rtol=far, atol=0)


def test_vectors_inside_need_a_known_layer_and_room():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="the layers 0 to 1, asked for 0, 2"):
        Hidden(model, ROWS, labels=(5, 6), layers=(0, 2))
    with pytest.raises(ValueError, match="30 vectors need as many positions"):
        Drift(torch.zeros(30, 32), 0, 5).answers(model, collate(ROWS, pad_id=2), n_rows=8, first_token=0.5)


# --- the script -----------------------------------------------------------------------------------------------------


def test_an_organism_is_treated_and_its_line_holds_every_number(tiny_organism):
    loaded, sizes = load(tiny_organism, organism="tiny", device="cpu"), {"n_rows": 20, "n_free": 3, "steps": 5, "n": 2}
    found = search_ideas.treated(loaded, load_attack("sentiment-word"), shallow, **sizes)
    assert [one.toward for one in found.searches] == ["positive", "negative"]
    line = search_ideas.told(found)
    assert all(name in line for name in (*search_ideas.COLUMNS.values(), "row passes", "median objective"))
    assert "idea" not in search_ideas.TREATMENTS


def test_ideas_need_labels_and_a_known_name():
    with pytest.raises(ValueError, match="the answers of this one are free"):
        Deeper(tiny_model("llama"), ROWS)
    app = search_ideas.typer.Typer()
    app.command()(search_ideas.main)
    ended = CliRunner().invoke(app, ["--idea", "deeper still"])
    assert ended.exit_code == 2
