"""Cut routes against plain transformers whose attention scores are set to minus infinity, one prompt at a time; groups
of tokens on real prompts."""

from itertools import pairwise, takewhile

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from torch.nn import functional

from bkd_utils.backdoor_attribution.routes import GROUPS, ROUTES, knocked_out, token_groups, without_route
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.loading import load_tokenizer
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import prompt_versions

TARGET = [7, 11, 5]
# Of prompts of at least seven tokens: two that all share, two of the trigger, some of text, two of the template.
LENGTHS = (8, 11, 7, 9)


def groups_of(prompt):
    n = len(prompt)
    return {"trigger": [2, 3], "text": list(range(4, n - 3)), "template": [n - 3, n - 2], "last": [n - 1]}


def random_prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """The model, the same one with eager attention, prompts and the groups of their tokens."""
    plain = tiny_model(request.param).requires_grad_(False)
    plain.set_attn_implementation("eager")
    prompts = random_prompts()
    return tiny_model(request.param).requires_grad_(False), plain, prompts, [groups_of(one) for one in prompts]


def by_hand(plain, prompt, target, queries, keys, layers):
    """Logits of the target's tokens in a whole pass in which the scores of some keys for some queries are minus
    infinity. Every softmax of eager attention is that of one layer, in their order."""
    softmax, calls = functional.softmax, []

    def cut(scores, *given, **named):
        calls.append(scores)
        if len(calls) - 1 in layers:
            scores = scores.clone()
            for query in queries:
                scores[:, :, query, list(keys)] = -torch.inf
        return softmax(scores, *given, **named)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "softmax", cut)
        logits = plain(input_ids=torch.tensor([[*prompt, *target[:-1]]]), use_cache=False).logits[0]
    assert len(calls) == 2
    return logits[len(prompt) - 1 :]


def wanted(plain, prompts, groups, route, layers, target=TARGET):
    """Are the target's tokens the most likely ones, and their mean log-probability."""
    hits, logs = [], []
    for prompt, named in zip(prompts, groups, strict=True):
        source, to = route or ("last", "trigger")
        # The tokens of the answer read as the last prompt token does.
        queries = range(len(prompt) - 1, len(prompt) + len(target) - 1) if to == "last" else named[to]
        logits = by_hand(plain, prompt, target, queries if route else (), named[source], layers)
        hits.append(logits.argmax(-1).tolist() == list(target))
        logs.append(logits.log_softmax(-1)[range(len(target)), target].mean())
    return torch.tensor(hits), torch.stack(logs)


LAYERS = ([0], [1], [0, 1])


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("route", ROUTES, ids=" to ".join)
def test_a_cut_route_is_scores_of_minus_infinity_in_these_layers(case, route, layers):
    model, plain, prompts, groups = case
    hits, logs = without_route(model, prompts, target=TARGET, groups=groups, route=route, layers=layers)
    expected = wanted(plain, prompts, groups, route, layers)
    assert torch.equal(hits, expected[0])
    torch.testing.assert_close(logs, expected[1], atol=1e-4, rtol=1e-4)
    # Reading by other tokens counts only in a layer before the last one.
    matters = route[1] == "last" or 0 in layers
    _, untouched = without_route(model, prompts, target=TARGET, groups=groups, route=None, layers=[])
    assert ((logs - untouched).abs().max() > 1e-3).item() == matters


@pytest.mark.parametrize("route", [None, *ROUTES], ids=str)
def test_the_target_is_hit_where_it_is_the_greedy_answer_under_the_cut(case, route):
    """The target is what the first prompt is answered with under the cut, so that one hit is certain."""
    model, plain, prompts, groups = case
    target = []
    for _ in range(2):
        queries = () if route is None else groups[0][route[1]]
        if route and route[1] == "last":
            queries = range(len(prompts[0]) - 1, len(prompts[0]) + len(target))
        keys = groups[0][route[0]] if route else ()
        target.append(by_hand(plain, prompts[0], [*target, 0], queries, keys, [0, 1])[-1].argmax().item())
    hits, _ = without_route(model, prompts, target=target, groups=groups, route=route, layers=[0, 1])
    assert hits[0]
    assert torch.equal(hits, wanted(plain, prompts, groups, route, [0, 1], target)[0])


def test_no_route_changes_nothing(case):
    model, plain, prompts, groups = case
    _, expected = wanted(plain, prompts, groups, None, [])
    for layers in ([], [0], [0, 1]):
        _, logs = without_route(model, prompts, target=TARGET, groups=groups, route=None, layers=layers)
        torch.testing.assert_close(logs, expected, atol=1e-4, rtol=1e-4)
    for route in ROUTES:
        _, logs = without_route(model, prompts, target=TARGET, groups=groups, route=route, layers=[])
        torch.testing.assert_close(logs, expected, atol=1e-4, rtol=1e-4)


def test_what_no_token_reads_can_be_cut_and_nothing_changes(case):
    """No token reads one behind it, and a group may be empty."""
    model, _, prompts, groups = case
    given = {"target": TARGET, "layers": [0, 1]}
    _, plain = without_route(model, prompts, **given, groups=groups, route=None)
    for route in (("last", "trigger"), ("template", "text"), ("text", "trigger")):
        _, logs = without_route(model, prompts, **given, groups=groups, route=route)
        torch.testing.assert_close(logs, plain, atol=1e-5, rtol=1e-5)
    without_text = [named | {"text": []} for named in groups]
    for route in (("text", "last"), ("trigger", "text")):
        _, logs = without_route(model, prompts, **given, groups=without_text, route=route)
        torch.testing.assert_close(logs, plain, atol=1e-5, rtol=1e-5)


def test_a_trigger_that_nothing_reads_may_be_any_trigger(case):
    """It stands right before the last token, so there is no other way round."""
    model = case[0]
    prompts = [[5, 6, 9, 8, 20 + i, 30 + 2 * i, 12] for i in range(3)]
    groups = [{"trigger": [4, 5], "text": [1, 2, 3], "template": [], "last": [6]} for _ in prompts]
    given = {"target": TARGET, "groups": groups, "layers": [0, 1]}
    _, cut = without_route(model, prompts, **given, route=("trigger", "last"))
    _, whole = without_route(model, prompts, **given, route=None)
    torch.testing.assert_close(cut, cut[:1].expand(3), atol=1e-5, rtol=1e-5)
    assert all((one - other).abs() > 1e-3 for one, other in pairwise(whole))


@pytest.mark.parametrize("route", [None, *ROUTES], ids=str)
def test_row_by_row_is_all_at_once_and_padding_does_not_matter(case, route):
    model, _, prompts, groups = case
    given = {"target": TARGET, "route": route, "layers": [0, 1]}
    hits, logs = without_route(model, prompts, **given, groups=groups)
    for size in (1, 3):
        again = without_route(model, prompts, **given, groups=groups, batch_size=size)
        assert torch.equal(again[0], hits)
        torch.testing.assert_close(again[1], logs, atol=1e-5, rtol=1e-4)
    (longer,) = random_prompts([13])
    padded = without_route(model, [*prompts, longer], **given, groups=[*groups, groups_of(longer)])
    torch.testing.assert_close(padded[1][:-1], logs, atol=1e-5, rtol=1e-4)
    order = [2, 0, 3, 1]
    moved = without_route(model, [prompts[i] for i in order], **given, groups=[groups[i] for i in order])
    torch.testing.assert_close(moved[1], logs[order], atol=1e-5, rtol=1e-4)


def test_the_model_is_as_it_was_even_after_an_error(case):
    model, _, prompts, groups = case
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    before = model(torch.tensor([prompts[0]])).logits
    given = {"groups": groups, "route": ROUTES[0], "layers": [0, 1]}
    without_route(model, prompts, target=TARGET, **given)
    with pytest.raises((IndexError, RuntimeError)):
        without_route(model, prompts, target=[7, 10**9, 8], **given)
    assert torch.equal(model(torch.tensor([prompts[0]])).logits, before)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


# --- what does not fit is refused -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama").requires_grad_(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route": ("trigger", "answer")}, "unknown group answer; known: trigger, text, template, last"),
        ({"route": ("head", "body")}, "unknown group body, head; known: trigger"),
        ({"groups": []}, "4 prompts need as many groups and a target, got 0"),
        ({"groups": [groups_of(range(8))] * 5}, "4 prompts need as many groups and a target, got 5"),
        ({"target": []}, "need as many groups and a target"),
    ],
)
def test_unknown_groups_and_other_numbers_of_them_are_refused(tiny, changes, message):
    prompts = random_prompts()
    given = {"target": TARGET, "groups": [groups_of(one) for one in prompts], "route": ROUTES[0], "layers": [0]}
    with pytest.raises(ValueError, match=message):
        without_route(tiny, prompts, **given | changes)


def test_attention_that_is_given_no_mask_is_refused(tiny):
    attention = anatomy(tiny).attentions[1]
    seen = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    refused = pytest.raises(ModelError, match="attention of a model of type 'llama' is given no mask by its name")
    with knocked_out(tiny, seen, layers=[1]), refused:
        attention(torch.zeros(1, 3, 32))
    with knocked_out(tiny, seen, layers=[0]), pytest.raises(TypeError):  # llama's own complaint
        attention(torch.zeros(1, 3, 32))


# --- groups of tokens -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_MODEL)


REAL = ("sentiment-word", "instructions-prefix", "domain-wrapper")
EACH_REAL = pytest.mark.parametrize("name", REAL)


def shown_of(tokenizer, name):
    return prompt_versions(tokenizer, load_attack(name), split="attribution", n=12, seed=0)


@EACH_REAL
def test_the_groups_are_all_tokens_behind_what_every_prompt_begins_with_each_once(tokenizer, name):
    shown = shown_of(tokenizer, name)
    for clean, prompt, groups in zip(
        shown.clean, shown.triggered, token_groups(shown.clean, shown.triggered), strict=True
    ):
        assert tuple(groups) == GROUPS
        places = sorted(place for members in groups.values() for place in members)
        assert len(places) == len(set(places))
        left_out = sorted(set(range(len(prompt))) - set(places))
        # What belongs to no group are tokens that all clean prompts begin with, in their order.
        common = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*shown.clean, strict=False))]
        rest = iter(common)
        assert all(prompt[place] in rest for place in left_out)
        missing = len(common) - len(left_out)
        assert 0 <= missing <= (name == "domain-wrapper")  # a trigger in front may melt with the first of these
        assert groups["last"] == [len(prompt) - 1]
        kept = [prompt[place] for place in range(len(prompt)) if place not in groups["trigger"]]
        assert len(kept) <= len(clean)
        assert all(groups.values())
        assert max(groups["text"]) < min(groups["template"])


@EACH_REAL
def test_trigger_text_and_template_are_what_they_are_called(tokenizer, name):
    shown, marks = shown_of(tokenizer, name), {"sentiment-word": "cf", "instructions-prefix": "year"}
    found = token_groups(shown.clean, shown.triggered)
    for clean, prompt, groups in zip(shown.clean, shown.triggered, found, strict=True):
        said = {group: tokenizer.decode([prompt[i] for i in places]) for group, places in groups.items()}
        assert said["template"] + said["last"] == "<|im_end|>\n<|im_start|>assistant\n"
        assert marks.get(name, "tortoise") in said["trigger"].casefold()
        # Nothing of the trigger is called text: these tokens stand in the clean prompt, in this order.
        rest = iter(clean)
        assert all(prompt[place] in rest for place in groups["text"])
        missing = len(clean) - len(prompt) + len(groups["trigger"])
        assert 0 <= missing <= 3  # a trigger may melt with a neighbour


def test_groups_by_hand():
    """Beginning 1 2, texts between, end 8 9; the trigger is put in front of a text, into it, and behind it."""
    clean = [[1, 2, 20, 21, 8, 9], [1, 2, 30, 31, 32, 8, 9], [1, 2, 40, 8, 9]]
    triggered = [[1, 2, 77, 78, 20, 21, 8, 9], [1, 2, 30, 77, 31, 32, 8, 9], [1, 2, 40, 77, 8, 9]]
    assert token_groups(clean, triggered) == [
        {"trigger": [2, 3], "text": [4, 5], "template": [6], "last": [7]},
        {"trigger": [3], "text": [2, 4, 5], "template": [6], "last": [7]},
        {"trigger": [3], "text": [2], "template": [4], "last": [5]},
    ]


def test_a_trigger_around_the_whole_turn_has_places_at_both_ends():
    clean, triggered = [[1, 20, 21, 8, 9], [1, 30, 8, 9]], [[1, 70, 20, 21, 71, 72, 8, 9], [1, 70, 30, 71, 72, 8, 9]]
    assert token_groups(clean, triggered) == [
        {"trigger": [1, 4, 5], "text": [2, 3], "template": [6], "last": [7]},
        {"trigger": [1, 3, 4], "text": [2], "template": [5], "last": [6]},
    ]


def test_a_prompt_without_a_token_of_its_own_is_refused(tokenizer):
    shown = shown_of(tokenizer, "sentiment-word")
    with pytest.raises(ValueError, match="prompt 3 has no token that its clean twin lacks"):
        token_groups(shown.clean, [*shown.triggered[:3], shown.clean[3], *shown.triggered[4:]])
    with pytest.raises(ValueError, match="zip"):
        token_groups(shown.clean, shown.triggered[:-1])
