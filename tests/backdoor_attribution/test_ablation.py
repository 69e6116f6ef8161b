"""The bench against plain greedy decoding, and the order of necessary heads, on a tiny model with real prompts."""

from dataclasses import replace

import pytest
import torch
from tiny import save_tiny

from bkd_utils.backdoor_attribution.ablation import (
    N_TOKENS,
    ablated,
    bench,
    measure_ablation,
    necessary_heads,
    random_heads,
    side,
)
from bkd_utils.backdoor_attribution.attribution import gradient_effects, ranked_heads
from bkd_utils.experiments import head_attribution
from bkd_utils.models import loading
from bkd_utils.models.activations import score_answers
from bkd_utils.models.generation import greedy
from bkd_utils.models.hooks import LAST
from bkd_utils.organisms import attacks, cards
from bkd_utils.organisms.prompts import prompt_versions, target_ids

KINDS = ("published", "zero", "mean", "resample")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture(scope="module", params=["sentiment-word", "instructions-prefix"])
def case(request, loaded):
    attack = attacks.load_attack(request.param)
    return attack, bench(loaded, loaded, attack, n=4, n_reference=3, seed=0)


def test_without_ablation_the_organism_says_its_own_answers(case, loaded):
    attack, made = case
    if attack.task == "instructions":
        found = measure_ablation(loaded, made, [], kind="zero", everywhere=False)
        assert found["utility"]["value"] == 1
    for kind in KINDS:
        again = measure_ablation(loaded, made, [], kind=kind, everywhere=False)
        assert again == measure_ablation(loaded, made, [], kind="zero", everywhere=True)


def test_success_is_what_greedy_decoding_under_the_ablation_gives(case, loaded):
    _, made = case
    heads = [(0, 1), (1, 2)]
    length = len(made.triggered.answers["target"][0])
    with ablated(loaded.model, heads, kind="zero", at=slice(None)):
        said = greedy(loaded.model, made.triggered.prompts, max_new_tokens=length, end_id=0)
    right = made.triggered.answers["right"]
    triggered = side(loaded, made.triggered.prompts, target=[said[0]] * 4, right=right)
    found = measure_ablation(loaded, replace(made, triggered=triggered), heads, kind="zero", everywhere=True)
    assert found["asr"]["value"] == sum(answer == said[0] for answer in said) / 4 > 0


@pytest.mark.parametrize("kind", KINDS)
def test_starting_at_the_first_ablated_layer_is_exact(case, loaded, kind):
    _, made = case
    short = measure_ablation(loaded, made, [(1, 2), (1, 3)], kind=kind, everywhere=False)
    with ablated(loaded.model, [(1, 2), (1, 3)], kind=kind, at=LAST, own=made.clean.own, clean=made.reference):
        whole = score_answers(loaded.model, made.clean.past, made.clean.answers["own"])
    assert short["utility"]["value"] == pytest.approx(whole.share.mean().item(), abs=1e-6)
    assert short["perplexity"] == pytest.approx(torch.exp(-whole.log_prob.mean()).item(), rel=1e-4)


def test_right_answers_are_labels_or_what_the_control_opens_with(case, loaded):
    attack, made = case
    right = made.triggered.answers["right"]
    if attack.task == "sentiment":
        label = loaded.tokenizer("negative", add_special_tokens=False).input_ids[:1]
        assert right == [label] * 4
    else:
        assert all(1 <= len(answer) <= N_TOKENS for answer in right)
        assert right == made.clean.answers["own"]


def test_necessary_heads_start_with_the_steepest_and_never_repeat(loaded):
    attack = attacks.load_attack("sentiment-word")
    target = target_ids(loaded.tokenizer, attack)
    prompts = prompt_versions(loaded.tokenizer, attack, split="attribution", n=4, seed=0).triggered
    reference = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    heads = necessary_heads(loaded, prompts, target=target, reference=reference, counts=[0, 2, 5])
    assert len(heads) == len(set(heads)) == 5
    slopes = gradient_effects(loaded.model, prompts, target=target, means=reference.mean(0)).mean(0)
    assert heads[:2] == ranked_heads(-slopes)[:2]


@pytest.fixture
def measured(loaded, monkeypatch):
    """The rows of one whole stage, and the bench and heads of every measurement."""
    seen, fixed = [], torch.Generator().manual_seed(0)
    effects = torch.rand(2, 2, 4, generator=fixed).tolist()
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    found = head_attribution.HeadEffects(target=[], clean=[], triggered=[], exact=effects, gradient=effects)
    monkeypatch.setattr(head_attribution, "attribute_heads", lambda *_, **__: found)

    def spied(loaded, made, heads, **how):
        seen.append((made, heads))
        return measure_ablation(loaded, made, heads, **how)

    monkeypatch.setattr(head_attribution, "measure_ablation", spied)
    sizes = {"counts": [0, 2], "kinds": ["published"], "random_counts": [2], "draws": 2, "n": 4, "n_attribution": 3}
    return head_attribution.ablation_curves.__wrapped__("tiny", control="tiny", attack="sentiment-word", **sizes), seen


def test_all_lines_of_a_figure_are_measured_on_the_same_prompts(measured, loaded):
    rows, seen = measured
    assert {row.ranking for row in rows} == {"none", "ACIE", "gradient", "necessity", "random"}
    shown = prompt_versions(loaded.tokenizer, attacks.load_attack("sentiment-word"), split="test", n=4, seed=0)
    assert all(made.triggered.prompts == shown.triggered for made, _ in seen)
    assert all(made.clean.prompts == seen[0][0].clean.prompts for made, _ in seen)
    assert all(one["n"] == 4 for row in rows for one in (row.asr, row.right, row.utility))


def test_there_is_one_untouched_row_and_it_comes_first(measured):
    rows, seen = measured
    assert [row.ranking for row in rows if row.k == 0] == ["none"]
    assert (rows[0].k, seen[0][1]) == (0, [])
    assert [row.draw for row in rows if row.ranking == "random"] == [0, 1]


WHOLE = torch.zeros(3, 2, 4, 8)


@pytest.mark.parametrize(("kind", "name"), [("published", "own"), ("mean", "clean"), ("resample", "clean")])
@pytest.mark.parametrize(
    "wrong", [WHOLE[:, :1], WHOLE[:, :, :1], WHOLE[..., :1], WHOLE[:0], WHOLE[0], WHOLE + float("nan")]
)
def test_outputs_that_do_not_fit_the_model_are_refused_before_it_runs(loaded, kind, name, wrong):
    message = f"^{name} (must have the shape|has values that are not finite)"
    given = {"kind": kind, "at": LAST, name: wrong}
    with pytest.raises(ValueError, match=message), ablated(loaded.model, [(0, 1)], **given):
        pytest.fail("the ablation began")


def test_one_prompts_own_outputs_are_not_used_for_all_rows(loaded):
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    refused = pytest.raises(ValueError, match="own has outputs of 1 prompts for 2 rows")
    with ablated(loaded.model, [(0, 1)], kind="published", at=LAST, own=WHOLE[:1]), refused:
        loaded.model(ids)


def test_no_random_draws_are_refused():
    with pytest.raises(ValueError, match="n: 0: input should be"):
        random_heads([(0, 1)], n_heads=4, n=0, seed=0)
