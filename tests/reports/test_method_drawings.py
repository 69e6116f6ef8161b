"""Drawings of the method: what is drawn follows the formulas, and the trained entries are those of `head_slices`."""

import numpy as np
import pytest
import torch
from drawing import check_labelled, legend, public, written
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, Rectangle
from tiny import tiny_model
from torch.nn.functional import kl_div

from bkd_utils.models.head_weights import head_slices
from bkd_utils.reports import method_drawings as drawings

pytestmark = pytest.mark.usefixtures("style")


def panels(figure):
    return {axes.get_label(): axes for axes in figure.axes}


def mesh(axes, n=5):
    return np.asarray(axes.collections[0].get_array()).reshape(n, n)


def test_every_drawing_is_labelled_has_no_colour_and_says_that_it_is_invented():
    assert public(drawings) == {"pull_on_a_head", "search_of_vectors"}
    for draw in (drawings.pull_on_a_head, drawings.search_of_vectors):
        figure = draw()
        check_labelled(figure)
        assert "invented" in written(figure)
        for axes in figure.axes:
            for patch in axes.patches:
                assert not patch.get_fill() or len(set(to_rgb(patch.get_facecolor()))) == 1
            for line in axes.get_lines():
                assert len(set(to_rgb(line.get_color()))) == 1


def test_the_maps_are_causal_and_their_rows_sum_to_1():
    drawn = panels(drawings.pull_on_a_head())
    for name in ("suspicious head", "mean of safe heads"):
        weights = mesh(drawn[name])
        assert weights.sum(1) == pytest.approx(np.ones(5))
        assert (np.triu(weights, 1) == 0).all()
        assert (weights[np.tril_indices(5)] > 0).all()
        assert drawn[name].yaxis_inverted()


def test_the_bars_are_the_divergence_of_the_suspicious_head_from_the_mean_as_torch_computes_it():
    drawn = panels(drawings.pull_on_a_head())
    bad, target = (torch.tensor(mesh(drawn[name])) for name in ("suspicious head", "mean of safe heads"))
    wanted = kl_div((bad + 1e-30).log(), target, reduction="none").sum(1).numpy()
    bars = drawn["rows apart"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(wanted)
    assert bars.patches[0].get_width() == pytest.approx(0)
    assert f"mean {wanted.mean():.2f}" in written(bars.figure)
    assert bars.yaxis_inverted()


@pytest.mark.parametrize("head", [1, 2])
def test_the_shaded_entries_are_those_that_belong_to_the_head_and_to_its_group(monkeypatch, head):
    for name, value in {"N_HEADS": 4, "N_GROUPS": 2, "D_HEAD": 8, "HEAD": head}.items():
        monkeypatch.setattr(drawings, name, value)
    model = tiny_model("llama")
    whole = head_slices(model, [(0, drawings.HEAD)], unit="KV group")
    own = head_slices(model, [(0, drawings.HEAD)], unit="query head")
    still, rest, mine = (drawings.SHADES[name] for name in ("stays bit for bit", "the rest of its group", "the head"))
    for letter, shades in drawings.tuned_entries().items():
        name = f"model.layers.0.self_attn.{letter[-1].lower()}_proj.weight"
        wanted = np.where(whole[name].numpy(), rest, still)
        if name in own:
            wanted[own[name].numpy()] = mine
        assert shades == pytest.approx(wanted)
    drawn = panels(drawings.pull_on_a_head())
    assert all((drawn[name].images[0].get_array() == one).all() for name, one in drawings.tuned_entries().items())
    assert legend(drawn["W_Q"].figure) == list(drawings.SHADES)


def test_the_vectors_stand_behind_the_place_of_each_prompt_and_other_tokens_keep_their_order():
    boxes = drawings.search_of_vectors().axes[0]
    for y, (words, place) in enumerate(zip(drawings.PROMPTS, drawings.PLACES, strict=True)):
        texts = sorted((text.get_position()[0], text.get_text()) for text in boxes.texts if text.get_position()[1] == y)
        read = [text for _, text in texts]
        assert read == [*words[:place], "$v_1$", "$v_2$", *words[place:], "→ positive"]
        line = [one for one in boxes.patches if isinstance(one, Rectangle) and one.get_y() == pytest.approx(y - 0.3)]
        hatched = [i for i, box in enumerate(sorted(line, key=lambda box: box.get_x())) if box.get_hatch()]
        assert hatched == [place, place + 1]
    assert len(set(drawings.PLACES)) == len(drawings.PLACES)


def test_no_step_of_the_vector_leaves_the_circle_and_only_long_ones_are_shortened():
    plane = drawings.search_of_vectors().axes[1]
    (circle,) = [patch for patch in plane.patches if isinstance(patch, Circle)]
    way, cut = (np.array(line.get_data()).T for line in plane.get_lines())
    asked = np.array(drawings.WAY)
    assert circle.radius == drawings.BOUND
    assert np.linalg.norm(way, axis=1).max() == pytest.approx(circle.radius)
    short = np.linalg.norm(asked, axis=1) <= circle.radius
    assert way[short] == pytest.approx(asked[short])
    assert not short.all()
    assert cut == pytest.approx(np.stack([asked[-1], way[-1]]))
    assert asked[-1] / way[-1] == pytest.approx(np.full(2, np.linalg.norm(asked[-1]) / circle.radius))
