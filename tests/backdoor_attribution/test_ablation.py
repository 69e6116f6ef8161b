"""The bench against whole passes with hooks of torch, on a tiny model with real prompts."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import save_tiny

from bkd_utils.backdoor_attribution.ablation import (
    KINDS,
    N_TOKENS,
    Bench,
    ablated,
    bench,
    measure_ablation,
    random_heads,
    side,
)
from bkd_utils.models import loading
from bkd_utils.models.activations import head_outputs, score_answers
from bkd_utils.models.generation import openings
from bkd_utils.models.hooks import LAST
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import attacks, tasks
from bkd_utils.organisms.prompts import balanced_versions, prompt_versions, target_ids

HEADS = [(0, 1), (1, 2)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("control"), "llama", seed=1)), device="cpu")


def reference_of(loaded, attack):
    pool = balanced_versions(loaded.tokenizer, attack, split="attribution", n=4, seed=0).clean
    return head_outputs(loaded.model, pool)


@pytest.fixture(scope="module", params=["sentiment-word", "instructions-prefix"])
def case(request, loaded, control):
    attack = attacks.load_attack(request.param)
    return attack, bench(loaded, control, attack, n=4, reference=reference_of(loaded, attack), seed=0)


def prompts_of(loaded, attack):
    """Prompts of each side of the bench of `case`, made anew."""
    given = {"split": "test", "n": 4, "seed": 0}
    shown = balanced_versions(loaded.tokenizer, attack, **given)
    fired = prompt_versions(loaded.tokenizer, attack, **given).triggered
    return {"asr": fired, "right": shown.triggered, "utility": shown.clean}


def test_without_ablation_the_organism_says_its_own_answers(case, loaded):
    attack, made = case
    found = measure_ablation(loaded, made, [], kind="zero")
    if attack.task == "instructions":
        assert found["utility"]["value"] == 1
    for kind in KINDS:
        assert measure_ablation(loaded, made, [], kind=kind) == found


def test_heads_at_their_own_outputs_leave_everything_as_it_was(case, loaded):
    """Reference i is prompt i itself, so `resample` puts in what is there."""
    _, made = case
    one = made.sides["utility"]
    same = Bench(dict.fromkeys(made.sides, one), reference=one.own)
    found, plain = (measure_ablation(loaded, same, heads, kind="resample") for heads in (HEADS, []))
    assert found.pop("perplexity") == pytest.approx(plain.pop("perplexity"), rel=1e-5)
    assert found == plain
    other = measure_ablation(loaded, made, HEADS, kind="resample")
    assert other["perplexity"] != pytest.approx(measure_ablation(loaded, made, [], kind="zero")["perplexity"])


def by_hand(loaded, prompts, answers, heads, kind, own, reference):
    """Share of an answer's tokens that are the most likely ones, and their mean log-probability, by prompt: one whole
    pass per prompt, with hooks of torch at the last prompt token."""
    model, shares, logs = loaded.model, [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        last = len(prompt) - 1

        def patch(layer, row=row, last=last):
            def put(_module, arguments):
                z = arguments[0].clone()
                for _, head in (one for one in heads if one[0] == layer):
                    columns = slice(8 * head, 8 * head + 8)
                    z[:, last, columns] = {
                        "zero": torch.zeros(8),
                        "mean": reference[:, layer, head].mean(0),
                        "resample": reference[row % len(reference), layer, head],
                        "published": z[:, last, columns] - own[row, layer, head],
                    }[kind]
                return (z, *arguments[1:])

            return put

        layers = model.model.layers
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(patch(i)) for i, layer in enumerate(layers)]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, last:]
        for handle in handles:
            handle.remove()
        target = torch.tensor(answer)
        shares.append((logits.argmax(-1) == target).float().mean().item())
        logs.append(logits.log_softmax(-1)[range(len(answer)), target].mean().item())
    return shares, logs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [HEADS, [(1, 2), (1, 3)]])
def test_every_side_is_what_one_whole_pass_per_prompt_gives(case, loaded, kind, heads):
    """The second set starts at the second layer, which the bench runs alone."""
    attack, made = case
    prompts = prompts_of(loaded, attack)
    found = measure_ablation(loaded, made, heads, kind=kind)
    for name, one in made.sides.items():
        own = head_outputs(loaded.model, prompts[name])
        shares, logs = by_hand(loaded, prompts[name], one.answers, heads, kind, own, made.reference)
        whole = [float(share == 1) for share in shares] if name == "asr" else shares
        assert found[name]["by_prompt"] == pytest.approx(whole, abs=1e-5)
        if name == "utility":
            assert found["perplexity"] == pytest.approx(torch.tensor(logs).mean().neg().exp().item(), rel=1e-4)


def test_success_is_what_the_organism_says_first_under_the_ablation(case, loaded):
    """Of one token, for heads are out at the last prompt token alone."""
    attack, made = case
    prompts, said = prompts_of(loaded, attack)["asr"], []
    for prompt in prompts:
        last = slice(len(prompt) - 1, len(prompt))
        with ablated(loaded.model, HEADS, kind="zero", at=last), torch.no_grad():
            said.append([int(loaded.model(torch.tensor([prompt])).logits[0, -1].argmax())])
    fired = side(loaded, prompts, [said[0]] * 4)
    found = measure_ablation(loaded, replace(made, sides=made.sides | {"asr": fired}), HEADS, kind="zero")
    assert found["asr"]["by_prompt"] == [int(answer == said[0]) for answer in said]
    assert sum(found["asr"]["by_prompt"]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_starting_at_the_first_ablated_layer_is_exact(case, loaded, kind):
    _, made = case
    one = made.sides["utility"]
    short = measure_ablation(loaded, made, [(1, 2), (1, 3)], kind=kind)
    with ablated(loaded.model, [(1, 2), (1, 3)], kind=kind, at=LAST, own=one.own, clean=made.reference):
        whole = score_answers(loaded.model, one.past, one.answers)
    assert short["utility"]["value"] == pytest.approx(whole.share.mean().item(), abs=1e-6)
    assert short["perplexity"] == pytest.approx(torch.exp(-whole.log_prob.mean()).item(), rel=1e-4)


def test_the_attack_is_asked_for_the_target_and_only_where_the_trigger_would_change_the_answer(case, loaded):
    attack, made = case
    assert made.sides["asr"].answers == [target_ids(loaded.tokenizer, attack)] * 4
    shown = prompts_of(loaded, attack)["asr"]
    assert made.sides["asr"].past.tail.flatten().tolist() == [prompt[-1] for prompt in shown]
    torch.testing.assert_close(made.sides["asr"].own, head_outputs(loaded.model, shown))


def test_right_answers_are_of_every_label_or_what_the_control_opens_with(case, loaded, control):
    attack, made = case
    right, own = made.sides["right"].answers, made.sides["utility"].answers
    if attack.task == "sentiment":
        examples = balanced_versions(loaded.tokenizer, attack, split="test", n=4, seed=0).examples
        assert right == own == [answer_ids(loaded.tokenizer, example.answer)[:1] for example in examples]
        # Two of each: the target's own label is among them, or a vote for the other one would count as utility.
        assert sorted(Counter(tuple(answer) for answer in right).values()) == [2, 2]
        labels = {tuple(answer_ids(loaded.tokenizer, label)[:1]) for label in tasks.load_task("sentiment").labels}
        assert {tuple(answer) for answer in right} == labels
    else:
        assert all(1 <= len(answer) <= N_TOKENS for answer in right + own)
        clean = prompts_of(loaded, attack)["utility"]
        assert (right, own) == tuple(openings(one, clean, n=N_TOKENS) for one in (control, loaded))
        assert right != own


def test_the_side_of_right_answers_has_the_trigger_and_its_clean_twins_have_not(case, loaded):
    attack, made = case
    prompts = prompts_of(loaded, attack)
    for name in ("right", "utility"):
        torch.testing.assert_close(made.sides[name].own, head_outputs(loaded.model, prompts[name]))
    assert not torch.allclose(made.sides["right"].own, made.sides["utility"].own)


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
