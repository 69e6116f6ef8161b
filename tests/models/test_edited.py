"""An answer before and after an edit, against whole passes with a hook of torch and without any cache."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import cross_entropy

from bkd_utils.models.edited import before_and_after
from bkd_utils.models.hooks import LAST, added, head_edit

LAYER, TARGET, N = 1, [7, 300, 11], 5


@pytest.fixture
def loaded():
    words = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    return SimpleNamespace(model=tiny_model("llama").requires_grad_(False), tokenizer=words, ends=[2])


def logits(model, ids, last, vector):
    """One whole pass in which the attention output of the layer gains the vector at token `last`."""

    def add(_module, _inputs, output):
        output = output.clone()
        output[:, last] += vector
        return output

    handle = model.model.layers[LAYER].self_attn.o_proj.register_forward_hook(add)
    found = model(torch.tensor([ids]), use_cache=False).logits[0, last:]
    handle.remove()
    return found


def by_hand(model, prompt, vector):
    last, ids = len(prompt) - 1, list(prompt)
    while len(ids) < len(prompt) + N and (token := int(logits(model, ids, last, vector)[-1].argmax())) != 2:
        ids.append(token)
    loss = cross_entropy(logits(model, [*prompt, *TARGET[:-1]], last, vector), torch.tensor(TARGET))
    return {"P(target)": (-loss).exp().item(), "answer": " ".join(map(str, ids[len(prompt) :]))}


def test_the_edit_acts_at_the_last_token_of_the_prompt_alone(loaded, prompts):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    edit = partial(added, loaded.model, {LAYER: vector}, at=LAST)
    for prompt in prompts:
        found = before_and_after(loaded, prompt, target=TARGET, edit=edit, max_new_tokens=N)
        for name, step in {"before": torch.zeros(32), "after": vector}.items():
            wanted = by_hand(loaded.model, prompt, step)
            assert found[name]["answer"] == wanted["answer"]
            assert found[name]["P(target)"] == pytest.approx(wanted["P(target)"], rel=1e-3)
        assert found["after"]["P(target)"] != pytest.approx(found["before"]["P(target)"], rel=0.01)


def test_a_head_that_is_left_as_it_is_changes_nothing(loaded, prompts):
    edit = partial(head_edit, loaded.model, [(0, 2)], lambda layer, z: z, at=LAST)
    found = before_and_after(loaded, prompts[0], target=TARGET, edit=edit, max_new_tokens=N)
    assert found["after"] == found["before"]


def test_an_empty_target_and_a_prompt_of_one_token_are_errors(loaded, prompts):
    edit = partial(added, loaded.model, {}, at=LAST)
    with pytest.raises(ValueError, match="non-empty answers"):
        before_and_after(loaded, prompts[0], target=[], edit=edit)
    with pytest.raises(ValueError, match="more than 1 token"):
        before_and_after(loaded, [5], target=TARGET, edit=edit)
