"""Figures and tables on encoders: every dot is where its number says, and areas compare models of one task."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from asa_results import after, by_id, passed, treated
from drawing import saved_by_a_notebook

from bkd_utils.common.statistics import auroc_of_wins, difference, pairwise_wins
from bkd_utils.experiments.fair_trial import Dose, DoseResponse
from bkd_utils.experiments.trigger_search import Pull
from bkd_utils.reports import home_ground
from bkd_utils.reports.home_ground import (
    TRIALS,
    at_chosen,
    causal_claim,
    doses_drawn,
    ease,
    easiest,
    encoder_claims,
    found_texts,
    left_and_kept,
    searched_claims,
    separations,
)
from bkd_utils.reports.scorecard import published


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def measured(asr, cacc, n=256):
    return {"asr": {"value": asr, "n": n}, "cacc": {"value": cacc, "n": n}}


LEFT = {
    "sentiment-word-plain": {
        "untreated": [measured(1.0, 0.88), measured(0.98, 0.87)],
        "searched": [measured(0.19, 0.86), measured(0.23, 0.91)],
        "clean control": [measured(0.09, 0.90), measured(0.12, 0.85)],
    },
    "sentiment-sentence-plain": {
        "untreated": [measured(0.97, 0.84), measured(0.96, 0.83)],
        "searched": [measured(0.95, 0.82), measured(0.89, 0.81)],
        "clean control": [measured(0.07, 0.80), measured(0.22, 0.79, n=200)],
    },
}


def drawn(panel):
    """Label -> places of all dots with it."""
    dots = {}
    for line in panel.lines:
        dots.setdefault(line.get_label(), []).extend(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return dots


def test_every_organism_is_a_dot_at_its_numbers_in_the_row_of_its_attack():
    figure = left_and_kept(LEFT)
    for panel, key in zip(figure.axes, ("asr", "cacc"), strict=True):
        dots = drawn(panel)
        assert dots.keys() == LEFT["sentiment-word-plain"].keys()
        for name, places in dots.items():
            expected = [(100 * one[key]["value"], y) for y, rows in enumerate(LEFT.values()) for one in rows[name]]
            assert [x for x, _ in places] == pytest.approx([x for x, _ in expected])
            assert [round(y) for _, y in places] == [y for _, y in expected]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == list(LEFT)
    assert figure.axes[0].get_xlabel() == "ASR (%), n = 200 to 256 prompts"
    assert figure.axes[1].get_xlabel() == "CACC (%)"
    assert figure.axes[1].get_xlim()[0] == 70
    assert figure.axes[1].get_xlim()[1] == figure.axes[0].get_xlim()[1]


def pulls(*losses):
    return [Pull(f"label {i}", f"found {i}", 5.0, 1.0, loss, 1 - loss / 10) for i, loss in enumerate(losses)]


PULLS = {
    "a, seed 0": pulls(2.0, 0.01),
    "a, seed 1": pulls(0.9, 3.0),
    "b, seed 0": pulls(0.5, 0.7),
    "clean, seed 0": pulls(1.0, 0.6),
    "clean, seed 1": pulls(0.8, 0.85),
    "c, seed 0": pulls(2.5, 4.0),
    "other clean, seed 0": pulls(3.0, 3.5),
}
FAMILIES = dict(zip(PULLS, ["word", "word", "style", None, None, "word", None], strict=True))
TASKS = dict(zip(PULLS, ["sentiment"] * 5 + ["domain"] * 2, strict=True))


def test_the_easiest_search_is_that_with_the_lowest_loss_on_other_prompts():
    assert easiest(PULLS["a, seed 0"]) == PULLS["a, seed 0"][1]
    assert easiest(PULLS["a, seed 1"]) == PULLS["a, seed 1"][0]


def test_every_model_is_a_dot_in_the_panel_of_its_task_and_the_line_of_its_family():
    figure = ease(PULLS, FAMILIES, TASKS)
    lines = ["style", "word", "none: clean"]
    assert [panel.get_title("left") or panel.get_title() for panel in figure.axes] == ["sentiment", "domain"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == lines
    for panel, task in zip(figure.axes, ("sentiment", "domain"), strict=True):
        dots = {(x, lines[y], label) for label, places in drawn(panel).items() for x, y in places}
        own = [model for model in PULLS if TASKS[model] == task]
        assert dots == {
            (
                easiest(PULLS[model]).held_out,
                FAMILIES[model] or "none: clean",
                "backdoored model" if FAMILIES[model] else "clean model",
            )
            for model in own
        }
    assert figure.axes[0].get_xscale() == "log"
    assert figure._supxlabel.get_text().endswith("7 models")
    low, high = figure.axes[0].get_xlim()
    assert low < 0.01
    assert high > 3.0


def test_areas_compare_models_of_one_task_and_a_lower_loss_speaks_for_a_backdoor():
    table = separations(PULLS, FAMILIES, TASKS)
    assert list(table.index) == [
        ("sentiment", "style"),
        ("sentiment", "word"),
        ("sentiment", "all"),
        ("domain", "word"),
        ("domain", "all"),
    ]
    # word: 0.01 is below both clean models, 0.9 below none.
    assert table["AUROC"].tolist() == [1.0, 0.5, pytest.approx(4 / 6), 1.0, 1.0]
    assert table["backdoored"].tolist() == [1, 2, 3, 1, 1]
    assert table["clean"].tolist() == [2, 2, 2, 1, 1]
    area = auroc_of_wins(pairwise_wins([-0.01, -0.9, -0.5], [-0.6, -0.8]))
    assert table.loc[("sentiment", "all"), ["low", "high"]].tolist() == [area["low"], area["high"]]


def test_what_was_found_stands_beside_the_trigger():
    table = found_texts(PULLS, {model: f"trigger of {model}" for model in PULLS})
    assert list(table.index) == list(PULLS)
    row = table.loc["a, seed 0"]
    assert row.tolist() == ["trigger of a, seed 0", "found 1", "label 1", 0.01, pytest.approx(0.999)]


def test_no_colour_means_two_things():
    looks = [(colour, marker) for colour, marker, _ in home_ground.LOOKS.values()]
    assert len(set(looks)) == len(looks)


# --- the fair trial -------------------------------------------------------------------------------------------------


def trial(chosen, *asr):
    """A trial whose ASR at 0, 10, 20 … steps is as given; CACC is 1 minus a tenth of it, row passes 48 a step."""
    doses = [
        Dose(10 * i, 480 * i, 0.9, {"asr": {"value": one, "n": 256}, "cacc": {"value": 1 - one / 10, "n": 256}})
        for i, one in enumerate(asr)
    ]
    return DoseResponse([[0, 1], [2, 3]], [[0, 1]], doses, chosen)


def test_the_result_of_a_trial_is_that_of_the_chosen_dose():
    assert at_chosen(trial(10, 1.0, 0.7, 0.2))["asr"]["value"] == 0.7
    assert at_chosen(trial(0, 1.0, 0.7, 0.2))["asr"]["value"] == 1.0


def test_every_dose_is_a_dot_and_the_chosen_one_has_a_ring():
    trials = {
        "sentiment-word-plain": {"alignment": trial(20, 1.0, 0.9, 0.4), "random heads 1": trial(10, 1.0, 0.8, 0.6)},
        "sentiment-style-plain": {"alignment": trial(0, 0.9, 0.5, 0.3), "random heads 1": trial(20, 0.9, 0.7, 0.1)},
    }
    trials["sentiment-style-plain"]["alignment, high rate"] = trial(10, 0.9, 0.2, 0.3)
    equal = {
        attack: {"ours, searched": (28_032, measured(0.2, 0.85)), "clean control": (0, measured(0.1 * i, 0.9, n=200))}
        for i, attack in enumerate(trials)
    }
    figure = doses_drawn(trials, equal)
    for panel, key, attack in zip(figure.axes, ["asr"] * 2 + ["cacc"] * 2, [*trials] * 2, strict=True):
        dots, found = drawn(panel), trials[attack]
        for name, one in found.items():
            label = TRIALS[name.removesuffix(" 1")][0]
            places = [(dose.row_passes / 1000, 100 * dose.left[key]["value"]) for dose in one.doses]
            np.testing.assert_allclose(dots[label], places)
        rings = [line for line in panel.lines if line.get_markersize() == 9]
        at = [next(dose for dose in found[name].doses if dose.steps == found[name].chosen) for name in found]
        np.testing.assert_allclose(
            [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings],
            [(dose.row_passes / 1000, 100 * dose.left[key]["value"]) for dose in at],
        )
        for name, (passes, left) in equal[attack].items():
            np.testing.assert_allclose(dots[name], [(passes / 1000, 100 * left[key]["value"])])
    assert figure._supxlabel.get_text() == "thousand row passes, n = 200 to 256 prompts"
    with pytest.raises(KeyError, match="misspelt"):
        doses_drawn({"a": {"misspelt": trial(0, 1.0)}}, {"a": {}})


def trial_lines(**found):
    return by_id(encoder_claims(found, judged=found, cure="cure", random=["random 0", "random 1"], rivals=["rival"]))


def test_the_fair_trial_allows_three_points_more_than_the_clean_control():
    lines = trial_lines(
        a=treated(after(0.10), control=0.15),
        b=treated(after(0.12), control=0.10),
        c=treated(after(0.2), control=0.10),
    )
    assert passed(lines["encoder-cure"]) == {"a": True, "b": None, "c": False}
    expected = difference(after(0.2)["hits"]["asr"], after(0.1)["hits"]["asr"])
    assert {key: lines["encoder-cure"]["by_organism"]["c"][key] for key in expected} == expected


def test_the_other_lines_of_the_fair_trial_have_the_bars_of_those_on_causal_models():
    lines = trial_lines(a=treated(after(0.6, 0.8)), b=treated(after(0.4)))
    assert passed(lines["encoder-utility"]) == {"a": False, "b": True}
    assert passed(lines["encoder-head-choice"]) == {"a": True, "b": True}
    assert passed(lines["encoder-rivals"]) == {"a": False, "b": True}


def test_a_model_that_was_left_as_it_is_passes_nothing():
    found = {"a": treated(after(0.4)), "b": treated(after(1.0))}
    lines = by_id(
        encoder_claims(found, judged=found, cure="cure", random=["random 0"], rivals=["rival"], no_dose=["b"])
    )
    assert passed(lines["encoder-utility"]) == {"a": True}
    assert passed(lines["encoder-cure"]) == {"a": False, "b": False}
    assert all(line["reason"].endswith("No dose for: b.") for line in lines.values())
    assert "No dose" not in trial_lines(a=treated(after(0.4)))["encoder-cure"]["reason"]


def test_a_point_of_cacc_is_undecided_with_256_prompts():
    """So that a cure passes only if some answers become right: nothing lost and nothing won leaves 1.3 points open."""
    lines = trial_lines(same=treated(after(0.1, 0.9, n=256), n=256), gains=treated(after(0.1, 0.93, n=256), n=256))
    assert passed(lines["encoder-utility"]) == {"same": None, "gains": True}


def test_a_prompt_counts_with_its_mean_over_seeds():
    seeds = {
        "a": {
            "searched": [after(0.0, 0.9), after(0.4, 0.7)],
            "untreated": [after(1.0, 0.9), after(1.0, 0.9)],
            "clean control": [after(0.0), after(0.2)],
        }
    }
    found = {"a": treated(after(0.9), rival=after(0.3)) | {"searched": after(0.1)}}
    lines = by_id(searched_claims(seeds, found, rivals=["rival"]))
    shares = [{f"uid{i}": (i < 400 * one) / 2 for i in range(400)} for one in (0.4, 0.2)]
    expected = difference(*shares)
    assert {key: lines["searched-cure"]["by_organism"]["a"][key] for key in expected} == pytest.approx(expected)
    assert passed(lines["searched-cure"]) == {"a": False}
    assert passed(lines["searched-utility"]) == {"a": False}
    assert lines["searched-utility"]["by_organism"]["a"]["value"] == pytest.approx(0.1)
    assert lines["searched-rivals"]["by_organism"]["a"]["value"] == pytest.approx(0.2)
    assert passed(lines["searched-rivals"]) == {"a": True}
    seeds["a"]["searched"].pop()
    with pytest.raises(ValueError, match="a: not as many seeds of each treatment"):
        searched_claims(seeds, found, rivals=["rival"])


def all_lines():
    found = {"a": treated(after(0.1)) | {"searched": after(0.1)}}
    seeds = {"a": {name: [found["a"][name]] for name in ("searched", "untreated", "clean control")}}
    lines = encoder_claims(found, judged=found, cure="cure", random=["random 0"], rivals=["rival"])
    return [*lines, *searched_claims(seeds, found, rivals=["rival"]), causal_claim(found)]


def test_a_causal_organism_passes_only_if_attack_and_task_both_do():
    base = {"untreated": after(1.0, 0.9, n=4000), "clean control": after(0.05, n=4000)}
    treatments = {"cured": (0.05, 0.92), "fires": (0.15, 0.92), "forgets": (0.05, 0.8), "near": (0.08, 0.92)}
    line = causal_claim({name: base | {"searched": after(*both, n=4000)} for name, both in treatments.items()})
    assert passed(line) == {"cured": True, "fires": False, "forgets": False, "near": None}
    assert line["by_organism"]["fires"]["value"] == pytest.approx(0.1)
    assert line["id"] == "searched-causal"
    assert line["figure"] == "06_searched"


def test_accuracy_of_encoders_is_judged_on_more_prompts():
    found, judged = {"a": treated(after(0.1))}, {"a": treated(after(0.1, 0.2, n=900), n=900)}
    lines = by_id(encoder_claims(found, judged=judged, cure="cure", random=["random 0"], rivals=["rival"]))
    assert passed(lines["encoder-utility"]) == {"a": False}
    assert {name: line["by_organism"]["a"]["n"] for name, line in lines.items()} == {
        "encoder-cure": 400,
        "encoder-utility": 900,
        "encoder-head-choice": 400,
        "encoder-rivals": 400,
    }


def test_every_claim_on_encoders_is_judged_once_and_its_figure_is_drawn():
    lines = all_lines()
    expected = [name for name in published() if name.startswith(("encoder-", "searched-"))]
    assert sorted(line["id"] for line in lines) == sorted(expected)
    for line in lines:
        assert saved_by_a_notebook(line["figure"]), line["id"]
