"""Guards inside the model against brute force, and on differences and steps that were planted."""

import copy

import numpy as np
import pytest
import torch
from tiny import save_tiny
from transformers.pytorch_utils import Conv1D

from bkd_utils.attention_alignment import inner_guards
from bkd_utils.attention_alignment.inner_guards import (
    beyond_range,
    by_known,
    cosine_ranges,
    oracle_probe,
    unusual_steps,
    watched,
    weight_directions,
)
from bkd_utils.models import loading
from bkd_utils.models.hooks import reading

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17], [18, 19]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp(request.param), request.param)), device="cpu").model


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def add(module, change):
    with torch.no_grad():
        module.weight += change.T if isinstance(module, Conv1D) else change


def size(module):
    shape = tuple(module.weight.shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def unit(n, seed):
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


# --- spectra of the weight difference -------------------------------------------------------------------------------


def test_directions_are_the_left_singular_vectors_of_the_change(model, base, monkeypatch):
    monkeypatch.setattr(inner_guards, "N_DIRECTIONS", 3)
    torch.manual_seed(0)
    changes = [torch.randn(size(one)) for one in watched(base)]
    for one, change in zip(watched(model), changes, strict=True):
        add(one, change)
    found = weight_directions(model, base)
    for vectors, change in zip(found, changes, strict=True):
        told = torch.linalg.svd(change.double()).U[:, :3].T.float()
        assert (vectors * told).sum(1).abs().tolist() == pytest.approx([1] * 3, abs=1e-3)


def test_a_planted_difference_is_found_and_no_other(model, base):
    module = watched(model)[1]
    out, into = unit(size(module)[0], 1), unit(size(module)[1], 2)
    add(module, torch.outer(out, into))
    found = weight_directions(model, base)
    assert [len(one) for one in found] == [0, 1, *[0] * (len(found) - 2)]
    assert abs(found[1][0] @ out).item() == pytest.approx(1, abs=1e-4)


def test_the_input_that_uses_a_planted_difference_is_flagged_and_no_other(model, base):
    """The matrix gets a part that reacts to what one prompt gives it, and writes it in a direction of its own."""
    last = len(watched(base)) - 1
    module = watched(model)[last]
    with reading([watched(base)[last]]) as kept, torch.no_grad():
        rows = []
        for prompt in PROMPTS:
            base.base_model(input_ids=torch.tensor([prompt]))
            rows.append(kept[0][0].double())
    # A reading direction that is orthogonal to all that the other prompts give.
    others = torch.linalg.qr(torch.cat([*rows[:2], rows[3]]).T).Q
    own = rows[2][-1] - others @ (others.T @ rows[2][-1])
    out = unit(size(module)[0], 3)
    add(module, 100 * torch.outer(out, (own / own.norm() ** 2).float()))
    seen = cosine_ranges(model, PROMPTS, weight_directions(model, base), pad_id=0)
    known, strange = np.delete(seen, 2, axis=0), seen[2:3]
    assert seen.shape == (4, 2, 1)
    assert beyond_range(known, strange)[0] > 0.5
    assert (beyond_range(known, known) <= 0).all()


def test_cosines_are_those_of_every_real_token(model, base):
    for i, one in enumerate(watched(model)):
        add(one, torch.outer(unit(size(one)[0], i), unit(size(one)[1], 9 + i)))
    directions = weight_directions(model, base)
    found = cosine_ranges(model, PROMPTS, directions, pad_id=0, batch_size=2)
    for prompt, (low, high) in zip(PROMPTS, found, strict=True):
        with reading(watched(model), what="output") as kept, torch.no_grad():
            model.base_model(input_ids=torch.tensor([prompt]))
        for i, direction in enumerate(directions):
            told = torch.nn.functional.cosine_similarity(kept[i][0], direction, dim=-1)
            assert [low[i], high[i]] == pytest.approx([told.min().item(), told.max().item()], abs=1e-4)


def test_the_distance_from_the_range_is_in_widths_on_either_side():
    known = np.array([[[0.0, -1.0], [0.5, 0.0]], [[0.2, -0.5], [1.0, 1.0]]])  # ranges 0 to 1 and -1 to 1
    inside, above, below = [[0.1, 0.0], [0.9, 0.5]], [[0.0, 0.0], [1.5, 0.0]], [[0.5, -2.0], [0.5, 0.0]]
    assert beyond_range(known, np.array([inside, above, below])) == pytest.approx([-0.1, 0.5, 0.5])


def test_equal_models_have_nothing_to_watch(model, base):
    with pytest.raises(ValueError, match="no watched matrix differs from the base model's"):
        weight_directions(model, base)


def test_matrices_of_other_shapes_are_refused(model, base):
    narrow, module = copy.deepcopy(base), watched(base)[-1]
    watched(narrow)[-1].weight = torch.nn.Parameter(module.weight[:, :3])
    with pytest.raises(ValueError, match="a matrix of"):
        weight_directions(model, narrow)


def test_known_prompts_are_scored_by_the_others():
    known = np.array([1.0, 2.0, 9.0])
    own, others = by_known(lambda by, these: these - by.max(), known, np.array([0.0, 10.0]))
    assert (own.tolist(), others.tolist()) == ([-8.0, -7.0, 7.0], [-9.0, 1.0])
    with pytest.raises(ValueError, match="2 known prompts are too few"):
        by_known(beyond_range, known[:2])


# --- steps between layers -------------------------------------------------------------------------------------------


def stream(n, seed, *, layers=5, width=6):
    return np.random.default_rng(seed).normal(size=(n, layers, width)).cumsum(1)


def test_steps_are_judged_by_two_distances(monkeypatch):
    """With the plain covariance in place of the shrunk one, written out for one prompt."""

    class Plain:
        def fit(self, rows):
            self.mean, self.inverse = rows.mean(0), np.linalg.inv(np.cov(rows.T, bias=True))
            return self

        def mahalanobis(self, rows):
            return np.array([(row - self.mean) @ self.inverse @ (row - self.mean) for row in rows])

    monkeypatch.setattr(inner_guards, "LedoitWolf", Plain)
    known, one = stream(40, 0), stream(1, 1)[0]

    def distances(prompt):
        found = []
        for layer in range(4):
            steps = known[:, layer + 1] - known[:, layer]
            z = (prompt[layer + 1] - prompt[layer] - steps.mean(0)) / steps.std(0, ddof=1)
            found.append(np.sqrt((z**2).mean()))
        return np.array(found)

    near = np.array([distances(prompt) for prompt in known])
    away = distances(one) - near.mean(0)
    told = away @ np.linalg.inv(np.cov(near.T, bias=True)) @ away
    assert unusual_steps(known, one[None])[0] == pytest.approx(told)


def test_a_planted_step_is_unusual_and_a_shifted_stream_is_not():
    known, seen = stream(60, 0), stream(3, 1)
    usual = unusual_steps(known, seen)
    jump = seen.copy()
    jump[1, 3:] += 8.0  # one step, from the third to the fourth layer
    assert unusual_steps(known, jump)[1] > 20 * usual.max()
    assert unusual_steps(known, jump)[[0, 2]] == pytest.approx(usual[[0, 2]])
    assert unusual_steps(known, seen + 8.0) == pytest.approx(usual)


def test_too_few_prompts_or_layers_have_no_steps():
    with pytest.raises(ValueError, match="1 known prompts of 5 layers"):
        unusual_steps(stream(1, 0), stream(1, 1))
    with pytest.raises(ValueError, match="4 known prompts of 1 layers"):
        unusual_steps(stream(4, 0, layers=1), stream(1, 1, layers=1))


# --- the probe ------------------------------------------------------------------------------------------------------


def test_the_probe_finds_what_was_planted_in_one_layer():
    clean, seen = stream(40, 0), stream(20, 1)
    triggered, marked = clean.copy(), seen.copy()
    triggered[:, 2, 4] += 6.0
    marked[:, 2, 4] += 6.0
    assert (oracle_probe(clean, triggered, marked) > 0).mean() > 0.9
    assert (oracle_probe(clean, triggered, seen) < 0).mean() > 0.9


def test_pairs_of_unlike_shape_are_refused():
    with pytest.raises(ValueError, match="positive"):
        oracle_probe(stream(4, 0), stream(3, 0), stream(2, 0))
