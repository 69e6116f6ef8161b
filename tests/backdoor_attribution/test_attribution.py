"""Attribution against one forward pass per head and prompt, written with raw hooks on plain transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, tiny_model

from bkd_utils.backdoor_attribution import attribution
from bkd_utils.backdoor_attribution.attribution import (
    METRICS,
    effects_by_metric,
    gradient_effects,
    gradients_by_metric,
    head_effects,
    head_means,
    ranked_heads,
)
from bkd_utils.backdoor_attribution.components import component_effects, component_means
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.self_test import capabilities

TARGETS = ([7], [7, 11, 5])
OUTPUTS = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    model = tiny_model(request.param)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (5, 9, 7, 12, 3)]
    width = tiny_width(model)
    means = torch.randn(2, 4, width, generator=generator)
    return request.param, model, prompts, means


def tiny_width(model):
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // 4


def output_map(name, model, layer):
    layers = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(name, "model.layers")
    return model.get_submodule(f"{layers}.{layer}.{OUTPUTS.get(name, 'self_attn.o_proj')}")


AGAINST = (13, 17, 19, 23, 29)


@torch.no_grad()
def score(model, prompt, target, metric="probability", against=None):
    logits = model(torch.tensor([[*prompt, *target]])).logits[0]
    if metric == "logit_difference":
        return (logits[len(prompt) - 1, target[0]] - logits[len(prompt) - 1, against]).item()
    logs = logits.log_softmax(-1)
    mean = torch.stack([logs[len(prompt) - 1 + i, token] for i, token in enumerate(target)]).mean()
    return (mean.exp() if metric == "probability" else mean).item()


def probability(model, prompt, target):
    return score(model, prompt, target)


def brute_force(name, model, prompts, target, means, heads, metric="probability"):
    """Effect of patching all of `heads` (pairs) at once, one whole pass per prompt; `target` may be one per prompt."""
    found = []
    targets = target if isinstance(target[0], list) else [target] * len(prompts)
    triples = list(zip(prompts, targets, AGAINST, strict=True))
    for prompt, target, against in triples:

        def patch(layer, prompt=prompt):
            last = len(prompt) - 1

            def hook(_module, arguments):
                z = arguments[0].clone()
                for other, head in heads:
                    if other == layer:
                        width = means.shape[-1]
                        z[:, last, head * width : (head + 1) * width] = means[layer, head]
                return (z, *arguments[1:])

            return hook

        handles = [output_map(name, model, layer).register_forward_pre_hook(patch(layer)) for layer in range(2)]
        patched = score(model, prompt, target, metric, against)
        for handle in handles:
            handle.remove()
        found.append(patched - score(model, prompt, target, metric, against))
    return torch.tensor(found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("target", TARGETS)
def test_effects_are_those_of_one_whole_pass_per_head_and_prompt(case, target, metric):
    name, model, prompts, means = case
    found = head_effects(model, prompts, target=target, means=means, metric=metric, against=AGAINST)
    atol = 1e-6 if metric == "probability" else 1e-4
    for layer in range(2):
        for head in range(4):
            expected = brute_force(name, model, prompts, target, means, [(layer, head)], metric)
            torch.testing.assert_close(found[:, layer, head], expected, atol=atol, rtol=1e-3)
    assert found.abs().max() > (1e-7 if metric == "probability" else 1e-3)


def test_each_prompt_may_have_a_target_of_its_own(case):
    name, model, prompts, means = case
    targets = [[7, 11], [5, 9], [11, 5], [8, 8], [6, 7]]
    found = head_effects(model, prompts, target=targets, means=means, metric="log_prob")
    expected = brute_force(name, model, prompts, targets, means, [(1, 2)], "log_prob")
    torch.testing.assert_close(found[:, 1, 2], expected, atol=1e-4, rtol=1e-3)


def test_one_pass_gives_all_metrics(case):
    _, model, prompts, means = case
    found = effects_by_metric(model, prompts, target=[7], means=means, against=AGAINST)
    assert tuple(found) == METRICS
    for metric in METRICS:
        alone = head_effects(model, prompts, target=[7], means=means, metric=metric, against=AGAINST)
        assert torch.equal(found[metric], alone)
    assert tuple(effects_by_metric(model, prompts, target=[7], means=means)) == METRICS[:2]


def test_a_logit_difference_is_the_difference_of_two_log_probabilities(case):
    """Log-odds: the normaliser, which a patch changes, too, cancels."""
    _, model, prompts, means = case
    found = effects_by_metric(model, prompts, target=[7], means=means, against=AGAINST)
    other = head_effects(model, prompts, target=[[one] for one in AGAINST], means=means, metric="log_prob")
    torch.testing.assert_close(found["logit_difference"], found["log_prob"] - other, atol=1e-4, rtol=1e-3)
    swapped = head_effects(
        model, prompts, target=[[one] for one in AGAINST], means=means, metric="logit_difference", against=[7] * 5
    )
    torch.testing.assert_close(swapped, -found["logit_difference"], atol=1e-5, rtol=1e-4)


def test_log_odds_of_three_answers_add_up(case):
    """a against c is a against b and b against c."""
    _, model, prompts, means = case

    def between(one, other):
        given = {"target": [one], "means": means, "metric": "logit_difference", "against": [other] * 5}
        return head_effects(model, prompts, **given)

    torch.testing.assert_close(between(7, 9), between(7, 8) + between(8, 9), atol=1e-5, rtol=1e-4)
    assert between(7, 7).abs().max() == 0


def test_the_memory_budget_changes_nothing_but_the_batches(case):
    _, model, prompts, means = case
    batches = []
    small = head_effects(model, prompts, target=[7, 5], means=means, memory_gib=1e-6, on_batch=batches.append)
    assert batches == [1] * len(prompts)
    torch.testing.assert_close(small, head_effects(model, prompts, target=[7, 5], means=means), atol=1e-7, rtol=1e-3)


def test_permuting_the_prompts_permutes_the_effects(case):
    _, model, prompts, means = case
    order = [3, 0, 4, 2, 1]
    found = head_effects(model, prompts, target=[7], means=means)
    permuted = head_effects(model, [prompts[i] for i in order], target=[7], means=means)
    torch.testing.assert_close(permuted, found[order], atol=1e-7, rtol=1e-3)


def test_patching_a_head_with_its_own_output_does_nothing(case):
    _, model, prompts, _ = case
    own = head_means(model, prompts[:1])
    assert head_effects(model, prompts[:1], target=[7, 5], means=own).abs().max() < 1e-9
    assert gradient_effects(model, prompts[:1], target=[7, 5], means=own).abs().max() < 1e-9


def test_means_are_averages_over_prompts_however_long(case):
    _, model, prompts, _ = case
    singles = torch.stack([head_means(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(head_means(model, prompts), singles.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_is_the_slope_of_the_exact_effect(case, monkeypatch, metric):
    """For a small step from a head's own output, the linear estimate must agree with patching."""
    # In double precision transformers gives NaN for padding in Gemma 2, and is refused; here there is no padding.
    monkeypatch.setattr(attribution, "require", lambda *_: None)
    _, model, prompts, means = case
    prompt = prompts[:1]
    own = head_means(model, prompt).double()
    model = model.double()
    try:
        near = own + 1e-3 * (means - own)
        given = {"target": [7, 5], "means": near, "against": [13]}
        exact = head_effects(model, prompt, **given, metric=metric)
        estimate = gradients_by_metric(model, prompt, **given)[metric]
    finally:
        model.float()
    torch.testing.assert_close(estimate, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_all_heads_of_a_layer_together_are_its_attention_output(case):
    name, model, prompts, _ = case
    means = head_means(model, prompts)
    whole = component_means(model, prompts)
    found = component_effects(model, prompts, target=[7, 5], means=whole)
    for layer in range(2):
        expected = brute_force(name, model, prompts, [7, 5], means, [(layer, head) for head in range(4)])
        torch.testing.assert_close(found["attention"][:, layer], expected, atol=1e-6, rtol=1e-3)


def test_patching_the_last_residual_makes_all_prompts_alike_at_the_first_answer_token(case):
    _, model, prompts, _ = case
    means = component_means(model, prompts)
    effects = component_effects(model, prompts, target=[7], means=means)["residual"][:, -1]
    patched = torch.tensor([probability(model, prompt, [7]) for prompt in prompts]) + effects
    torch.testing.assert_close(patched, patched[:1].expand(5), atol=1e-6, rtol=1e-3)


def test_hooks_are_gone_afterwards(case):
    _, model, prompts, means = case
    capabilities(model)  # transformers leaves hooks of its own where attention maps were asked for
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    before = model(torch.tensor([prompts[0]])).logits
    head_effects(model, prompts, target=[7], means=means)
    gradient_effects(model, prompts, target=[7], means=means)
    assert torch.equal(model(torch.tensor([prompts[0]])).logits, before)
    assert [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()] == hooks
    assert len(anatomy(model).layers) == 2


@given(st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6))
def test_ranks_go_down_and_name_every_head_once(values):
    scores = torch.tensor(values).view(2, 3)
    order = ranked_heads(scores)
    assert sorted(order) == [(layer, head) for layer in range(2) for head in range(3)]
    assert [scores[head].item() for head in order] == sorted(scores.flatten().tolist(), reverse=True)


# --- what does not fit is refused -----------------------------------------------------------------------------------

MEANS = torch.zeros(2, 4, 8)
WRONG = {
    "too few layers": MEANS[:1],
    "too many layers": torch.zeros(3, 4, 8),
    "too few heads": MEANS[:, :3],
    "one head": MEANS[:, :1],
    "a width of one": MEANS[..., :1],
    "another width": torch.zeros(2, 4, 9),
    "no heads axis": MEANS[:, 0],
    "NaN": MEANS + float("nan"),
    "infinite": MEANS + float("inf"),
    "nothing": torch.zeros(0, 4, 8),
}


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama").requires_grad_(False), [[5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", [head_effects, gradient_effects])
def test_means_of_another_model_are_refused(method, wrong, tiny):
    with pytest.raises(ValueError, match=r"means (must have the shape|has values that are not finite)"):
        method(*tiny, target=[7], means=WRONG[wrong])


@pytest.mark.parametrize("target", [[], [-1], [49152], [7, 10**9], ["7"], [7.0], [None], [True]])
@pytest.mark.parametrize("method", [head_effects, gradient_effects, component_effects])
def test_a_target_without_tokens_of_the_model_is_refused(method, target, tiny):
    means = component_means(*tiny) if method is component_effects else MEANS
    with pytest.raises(ValueError, match=r"^target"):
        method(*tiny, target=target, means=means)


@pytest.mark.parametrize("method", [head_effects, gradient_effects, component_effects])
def test_no_prompts_are_refused(method, tiny):
    means = component_means(*tiny) if method is component_effects else MEANS
    for prompts in ([], [[]]):
        with pytest.raises(ValueError, match="non-empty prompts"):
            method(tiny[0], prompts, target=[7], means=means)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda means: {}, "no components; known: attention, MLP, residual"),
        (lambda means: means | {"norm": means["MLP"]}, r"unknown components \['norm'\]"),
        (lambda means: means | {"MLP": means["MLP"][:1]}, "means of MLP must have the shape"),
        (lambda means: means | {"MLP": means["MLP"][..., :1]}, "means of MLP must have the shape"),
        (lambda means: means | {"MLP": means["MLP"].repeat(1, 2, 1)}, "means of MLP must have the shape"),
        (lambda means: means | {"residual": means["residual"] * float("nan")}, "means of residual has values"),
    ],
)
def test_means_of_components_are_held_to_the_model(change, message, tiny):
    with pytest.raises(ValueError, match=message):
        component_effects(*tiny, target=[7], means=change(component_means(*tiny)))


@pytest.mark.parametrize("method", [head_effects, component_effects])
def test_an_unknown_metric_is_refused_and_the_known_ones_are_named(method, tiny):
    means = component_means(*tiny) if method is component_effects else MEANS
    with pytest.raises(ValueError, match="unknown metric 'odds'; known: probability, log_prob, logit_difference"):
        method(*tiny, target=[7], means=means, metric="odds")
    with pytest.raises(ValueError, match="'logit_difference' needs `against`, a token of each prompt"):
        method(*tiny, target=[7], means=means, metric="logit_difference")


@pytest.mark.parametrize("against", [[], [7], [7, 8, 9], [7, -1], [7, 10**9], [7, None], [7, 8.0]])
@pytest.mark.parametrize("method", [head_effects, gradients_by_metric, effects_by_metric])
def test_there_is_one_token_of_the_model_to_compare_with_for_each_prompt(method, against, tiny):
    with pytest.raises(ValueError, match=r"^against"):
        method(*tiny, target=[7], means=MEANS, against=against)


@pytest.mark.parametrize("target", [[[7]], [[7], [8], [9]], [[7], [8, 9]], [[7], []], [[7], [-1]]])
@pytest.mark.parametrize("method", [head_effects, gradient_effects, effects_by_metric])
def test_targets_are_one_for_all_or_one_for_each_and_of_one_length(method, target, tiny):
    with pytest.raises(ValueError, match=r"^target"):
        method(*tiny, target=target, means=MEANS)


def test_one_target_for_all_is_the_same_as_that_one_for_each(tiny):
    given = {"means": MEANS, "against": [5, 6]}
    for method in (effects_by_metric, gradients_by_metric):
        one, each = (method(*tiny, target=target, **given) for target in ([7, 8], [[7, 8], [7, 8]]))
        assert all(torch.equal(one[metric], each[metric]) for metric in METRICS)
