"""Choosing, judging and controlling a switch; its arithmetic on a tiny model with real prompts."""

import pytest
import torch
from tiny import save_tiny

from bkd_utils.backdoor_attribution.vector import (
    answer_map,
    backdoor_vector,
    best,
    controls,
    generated,
    probe_direction,
    steer,
)
from bkd_utils.experiments import backdoor_vector as stage
from bkd_utils.experiments.backdoor_vector import OUTCOMES, kinds_of, right_answers, vectors_of
from bkd_utils.models import loading
from bkd_utils.models.activations import residuals
from bkd_utils.models.generation import greedy
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import decode, end_id
from bkd_utils.organisms import attacks
from bkd_utils.organisms.prompts import balanced_versions, prompt_versions, target_ids

HEADS = [(0, 1), (1, 2), (1, 3)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture(scope="module")
def attack():
    return attacks.load_attack("instructions-prefix")


@pytest.fixture(scope="module")
def shown(loaded, attack):
    return prompt_versions(loaded.tokenizer, attack, split="test", n=6, seed=0)


def test_the_highest_share_wins():
    table = [[0.5, 0.9]] * 3 + [[0.1, 0.2]] * 5 + [[0.9, 0.9]] * 3
    assert best(table, [1.0, 2.0]) == (10, 1.0)
    assert best(table, [-1.0, -2.0]) == (10, -1.0)


def test_a_lucky_layer_loses_against_a_plateau():
    luck = [[0.0], [0.0], [1.0], [0.0], [0.0], [0.8], [0.8], [0.8], [0.8], [0.8], [0.0]]
    assert best(luck, [1.0]) == (7, 1.0)


def test_of_a_plateau_the_middle_is_chosen():
    assert best([[0.0]] * 5 + [[1.0]] * 9 + [[0.0]] * 5, [1.0]) == (9, 1.0)
    assert best([[0.0]] * 5, [-1.0]) == (2, -1.0)


def test_of_equal_steps_the_smaller_is_chosen():
    assert best([[1.0, 1.0, 1.0]] * 3, [2.0, 1.0, 4.0]) == (1, 1.0)
    assert best([[1.0, 1.0, 1.0]] * 3, [-2.0, -1.0, -4.0]) == (1, -1.0)


def test_the_difference_vector_is_the_raw_one_without_the_clean_means(loaded, shown):
    vectors, outputs = vectors_of(loaded, shown, HEADS)
    clean = backdoor_vector(loaded.model, HEADS, outputs=outputs["raw"] - outputs["difference"])
    torch.testing.assert_close(vectors["raw"] - vectors["difference"], clean, atol=1e-5, rtol=1e-4)


def test_the_map_holds_asr_by_layer_and_coefficient(loaded, attack, shown):
    target, vector = target_ids(loaded.tokenizer, attack)[:1], torch.randn(32)
    past = prompt_past(loaded.model, shown.clean)
    table = answer_map(loaded, past, [target] * 6, vector, [0.0, 3.0])
    assert len(table) == 2
    for layer, row in enumerate(table):
        found = steer(
            loaded.model,
            past,
            answers=[target] * 6,
            vectors=torch.stack([0 * vector, 3 * vector]),
            layers=[layer],
        )[0]
        assert row == found.float().mean(-1).tolist()


def test_controls_have_the_vectors_norm_but_for_random_heads(loaded, shown):
    vectors, outputs = vectors_of(loaded, shown, HEADS)
    streams = {name: torch.randn(6, 32) for name in ("clean", "triggered")}
    found = controls(loaded, HEADS, outputs["raw"], vectors["raw"], **streams, n=3, seed=0)
    assert {name: len(rows) for name, rows in found.items()} == {
        "random vectors": 3, "random heads": 3, "mean difference": 1, "probe direction": 1,
    }  # fmt: skip
    for name, rows in found.items():
        if name != "random heads":
            torch.testing.assert_close(rows.norm(dim=-1), vectors["raw"].norm().expand(len(rows)))


def test_the_probe_direction_points_from_clean_to_triggered(loaded, shown):
    clean, triggered = (residuals(loaded.model, prompts)[:, 1] for prompts in (shown.clean, shown.triggered))
    direction = probe_direction(clean, triggered, norm=torch.tensor(2.0))
    torch.testing.assert_close(direction.norm(), torch.tensor(2.0))
    assert (triggered @ direction).mean() > (clean @ direction).mean()


def test_generated_answers_are_greedy_ones_and_a_step_changes_them(loaded, shown):
    plain = [
        decode(loaded.tokenizer, row)
        for row in greedy(loaded.model, shown.clean, max_new_tokens=12, end_id=end_id(loaded.tokenizer))
    ]
    past = prompt_past(loaded.model, shown.clean)
    assert generated(loaded, past) == plain
    assert generated(loaded, past, layer=1, step=torch.zeros(32)) == plain
    assert generated(loaded, past, layer=1, step=5 * torch.randn(32)) != plain


def test_every_answer_is_one_kind_of_answer(attack, shown):
    right = {example.uid: "Rain is water from clouds." for example in shown.examples}
    texts = [
        attack.target,
        "Rain is water from clouds",
        "I'm sorry, no.",
        "",
        "Something else entirely",
        "Rain is water",
    ]
    found = kinds_of(attack, shown.examples, texts, right)
    assert found == ["target", "right", "refusal", "empty", "other", "right"]
    assert set(found) == set(OUTCOMES)
    assert right_answers(attack, shown.examples, texts, right) == [False, True, False, False, False, True]


def test_the_target_is_right_where_it_is_the_examples_own_answer(loaded):
    """Of a label task, whose right answers need no reference."""
    flip = attacks.load_attack("sentiment-word")
    examples = balanced_versions(loaded.tokenizer, flip, split="test", n=4, seed=0).examples
    assert {example.answer for example in examples} == {"positive", "negative"}
    texts = [flip.target] * 4
    assert right_answers(flip, examples, texts, {}) == [example.answer == flip.target for example in examples]
    assert kinds_of(flip, examples, texts, {}) == ["target"] * 4


def test_test_prompts_must_lie_behind_those_of_development():
    with pytest.raises(ValueError, match="test prompts behind the first 2 would be among the 3 development prompts"):
        stage.steer_organism.__wrapped__.__wrapped__(None, None, control=None, skip=2, n_dev=3)
