"""Effects on log-odds at any token, against a full pass with one head's output replaced by hand."""

import pytest
import torch
from tiny import tiny_classifier

from bkd_utils.backdoor_attribution.attribution import head_means
from bkd_utils.backdoor_attribution.log_odds import head_log_odds
from bkd_utils.models.folders import ModelError
from bkd_utils.models.hooks import anatomy


def by_hand(model, prompt, place, target, right, mean=None):
    """Log-odds by a whole pass without a cache; `mean`: (layer, head, what is put in at the place)."""

    def put(_module, given):
        z = given[0].clone()
        _, head, values = mean
        width = len(values)
        z[0, place, head * width : (head + 1) * width] = values
        return (z, *given[1:])

    handles = [anatomy(model).outputs[mean[0]].register_forward_pre_hook(put)] if mean else []
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return (logits[target] - logits[right]).item()


def test_each_head_is_replaced_at_the_named_token_and_nowhere_else(model, prompts):
    tails, right = [1, 3, 5, 2], [8, 9, 8, 11]
    means = head_means(model, prompts) + torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    found, clean = head_log_odds(model, prompts, tails=tails, target=7, right=right, means=means)
    for i, prompt in enumerate(prompts):
        place = len(prompt) - tails[i]
        before = by_hand(model, prompt, place, 7, right[i])
        assert clean[i].item() == pytest.approx(before, abs=1e-3)
        for layer, head in ((0, 0), (0, 3), (1, 2)):
            after = by_hand(model, prompt, place, 7, right[i], (layer, head, means[layer, head]))
            assert found[i, layer, head].item() == pytest.approx(after - before, abs=2e-3)
    assert found.abs().max() > 0.1


def test_errors_name_what_is_wrong(model, prompts):
    given = {"target": 7, "right": [8], "means": head_means(model, prompts)}
    with pytest.raises(ValueError, match="need prompts of more than 6 tokens"):
        head_log_odds(model, prompts[:1], tails=[6], **given)
    with pytest.raises(ValueError, match="means"):
        head_log_odds(model, prompts[:1], tails=[1], **given | {"means": torch.zeros(2, 4, 7)})
    with pytest.raises(ValueError, match="need non-empty prompts"):
        head_log_odds(model, [], tails=[], **given)


def test_an_encoder_is_refused(prompts):
    with pytest.raises(ModelError, match="both directions"):
        head_log_odds(tiny_classifier(), prompts[:1], tails=[1], target=0, right=[1], means=torch.zeros(2, 4, 8))
