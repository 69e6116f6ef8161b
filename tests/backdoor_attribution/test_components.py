"""Effects of whole components against one whole pass per component and prompt, with raw hooks on plain transformers."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from bkd_utils.backdoor_attribution.attribution import METRICS, head_effects, head_means
from bkd_utils.backdoor_attribution.components import component_effects, component_means, component_modules
from bkd_utils.models.hooks import anatomy

TARGET, AGAINST = [7, 11, 5], (13, 17, 19, 23, 29)
NAMES = ("attention", "MLP", "residual")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    model, generator = tiny_model(request.param).requires_grad_(False), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (5, 9, 7, 12, 3)]
    return model, prompts, {name: torch.randn(2, 32, generator=generator) for name in NAMES}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def scores(model, prompt, against):
    with torch.no_grad():
        logs = model(torch.tensor([[*prompt, *TARGET]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    mean = logs[range(3), TARGET].mean()
    return {"probability": mean.exp(), "log_prob": mean, "logit_difference": logs[0, TARGET[0]] - logs[0, against]}


def patched(model, module, prompt, value, against):
    def put(_module, _arguments, output):
        tensor = first(output).clone()
        tensor.view(-1, tensor.shape[-1])[len(prompt) - 1] = value
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    handle = module.register_forward_hook(put)
    try:
        return scores(model, prompt, against)
    finally:
        handle.remove()


@pytest.mark.parametrize("metric", METRICS)
def test_effects_are_those_of_one_whole_pass_per_component_and_prompt(case, metric):
    model, prompts, means = case
    found = component_effects(model, prompts, target=TARGET, means=means, metric=metric, against=AGAINST)
    assert tuple(found) == NAMES
    for name, modules in component_modules(anatomy(model)).items():
        for layer, module in enumerate(modules):
            expected = [
                patched(model, module, prompt, means[name][layer], against)[metric]
                - scores(model, prompt, against)[metric]
                for prompt, against in zip(prompts, AGAINST, strict=True)
            ]
            atol = 1e-6 if metric == "probability" else 1e-4
            torch.testing.assert_close(found[name][:, layer], torch.stack(expected), atol=atol, rtol=1e-3)


def test_means_are_of_outputs_at_the_last_prompt_token(case):
    model, prompts, _ = case
    found = component_means(model, prompts)
    for name, modules in component_modules(anatomy(model)).items():
        for layer, module in enumerate(modules):
            kept = []
            handle = module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(first(output)))
            with torch.no_grad():
                for prompt in prompts:
                    model(torch.tensor([prompt]))
            handle.remove()
            rows = torch.stack([one.reshape(-1, 32)[-1] for one in kept])
            torch.testing.assert_close(found[name][layer], rows.mean(0), atol=1e-5, rtol=1e-4)


def test_the_metric_is_that_of_the_probability_unless_another_is_asked_for(case):
    model, prompts, means = case
    given = {"target": TARGET, "means": means}
    plain, asked = component_effects(model, prompts, **given), component_effects(
        model, prompts, **given, metric="probability"
    )  # fmt: skip
    assert all(torch.equal(plain[name], asked[name]) for name in NAMES)


def test_some_components_alone_have_the_effects_they_have_together(case):
    model, prompts, means = case
    both = component_effects(model, prompts, target=TARGET, means=means, metric="log_prob")
    for name in NAMES:
        alone = component_effects(model, prompts, target=TARGET, means={name: means[name]}, metric="log_prob")
        assert tuple(alone) == (name,)
        torch.testing.assert_close(alone[name], both[name], atol=1e-6, rtol=1e-5)


def test_a_component_at_its_own_output_changes_nothing(case):
    model, prompts, _ = case
    own = component_means(model, prompts[:1])
    found = component_effects(
        model, prompts[:1], target=TARGET, means=own, metric="logit_difference", against=AGAINST[:1]
    )
    assert max(effects.abs().max() for effects in found.values()) < 1e-4


def test_all_heads_of_a_layer_at_once_are_its_attention_and_one_is_not(case):
    model, prompts, _ = case
    whole = component_effects(model, prompts, target=TARGET, means=component_means(model, prompts), metric="log_prob")
    alone = head_effects(model, prompts, target=TARGET, means=head_means(model, prompts), metric="log_prob")
    assert whole["attention"].shape == alone.shape[:2]
    assert (whole["attention"][..., None] - alone).abs().amax() > 1e-3


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama").requires_grad_(False), [[5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"metric": "logits"}, "unknown metric 'logits'; known: probability, log_prob, logit_difference"),
        ({"metric": "logit_difference"}, "metric 'logit_difference' needs `against`"),
        ({"metric": "logit_difference", "against": [5]}, "^against"),
        ({"metric": "logit_difference", "against": [5, 10**9]}, "^against"),
        ({"target": [[7], [8], [9]]}, "target: 2 prompts need as many targets of one length, or one for all"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, how, message):
    with pytest.raises(ValueError, match=message):
        component_effects(*tiny, **{"target": [7], "means": component_means(*tiny)} | how)
