"""Every kept stage of paper 1 runs whole on tiny models; which prompts, heads, layers and steps reach the leaves?

What must be disjoint is disjoint (means and scored prompts, development and test half, attribution and test split), and
what must be equal is equal (random draws and attributed heads, the control and the reference).
"""

import functools
from collections import Counter
from dataclasses import astuple, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recording import Pasts, Stand, near_strings, of_split, sample, uids, watch
from sklearn.preprocessing import StandardScaler

from bkd_utils.backdoor_attribution import ablation, vector
from bkd_utils.backdoor_attribution import probe as probe_module
from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.experiments import attribution_cost, backdoor_probe, backdoor_vector, head_attribution
from bkd_utils.models.activations import head_outputs
from bkd_utils.models.hooks import EVERYWHERE, LAST
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import prompt_versions, target_ids

# Not the default seed, so that a seed that is not handed on is seen.
SEED = 3
WHERE = {"model": "tiny", "seed": SEED, "device": "cpu"}
FLIP, FIXED = load_attack("sentiment-word"), load_attack("instructions-prefix")
# A stage and the method that it calls: leaves of the stage are used in one of them or in both.
PROBING, ABLATING, STEERING = (
    (backdoor_probe, probe_module),
    (head_attribution, ablation),
    (backdoor_vector, vector),
)


@pytest.fixture(scope="module")
def stand():
    return Stand()


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """Nothing is kept but here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BKD_WORK", str(tmp_path_factory.mktemp("work")))
        yield


def per_layer(heads):
    return Counter(layer for layer, _ in heads)


# --- probes ---------------------------------------------------------------------------------------------------------


class Scaler(StandardScaler):
    """A scaler that writes down every row that it sees; each probe has one of its own."""

    made: list

    def fit(self, rows, truth=None):
        self.fitted, self.truth, self.asked = rows, truth, []
        Scaler.made.append(self)
        return super().fit(rows)

    def transform(self, rows, copy=None):
        self.asked.append(rows)
        return super().transform(rows)


@pytest.fixture(scope="module")
def probe(stand):
    """The stage on one attack, and everything that its probes saw."""
    with pytest.MonkeyPatch.context() as patch:
        spied = SimpleNamespace(asked=stand.use(patch, backdoor_probe), scalers=[])
        spied.streams, spied.normed = watch(patch, PROBING, "residuals"), watch(patch, PROBING, "behind_norm")
        spied.scores, spied.transfers, spied.directions = (
            watch(patch, PROBING, name) for name in ("probe_scores", "transfer_matrix", "best_random_direction")
        )
        Scaler.made = spied.scalers
        patch.setattr(probe_module, "StandardScaler", Scaler)
        kinds = ("logistic regression", "linear SVM")
        sizes = {"n": 8, "n_splits": 2, "n_directions": 5}
        spied.found = backdoor_probe.probe_organism.__wrapped__(
            "organism", attack=FLIP.name, kinds=kinds, **sizes, **WHERE
        )
    return spied


def rows_of(probe, stand):
    """Activation row -> the prompt and the layer that it is of."""
    known = {}
    for call in probe.streams:
        shown = stand.catalogue("sentiment").prompts(call.prompts)
        for one, stream in zip(shown, call.result.numpy(), strict=True):
            known |= {row.tobytes(): (one, layer) for layer, row in enumerate(stream)}
    for call, stream in zip(probe.normed, probe.streams, strict=False):
        shown = stand.catalogue("sentiment").prompts(stream.prompts)
        for one, rows in zip(shown, call.result.numpy(), strict=True):
            known |= {row.tobytes(): (one, layer) for layer, row in enumerate(rows)}
    return known


def test_probes_see_held_out_prompts_in_four_versions_of_the_same_examples(probe, stand):
    assert probe.asked == [("tiny", "organism", "cpu")]
    assert all(call.model is stand.models["organism"].model for call in probe.streams)
    shown = [stand.catalogue("sentiment").prompts(call.prompts) for call in probe.streams]
    assert [{one.version for one in kind} for kind in shown] == [
        {"clean"}, {"word-cf"}, {"near-miss"}, {"prefix-year"}
    ]  # fmt: skip
    for kind in shown:
        assert {one.split for one in kind} == {"test"}
        assert uids(kind) == sample(FLIP, "test", n=8, seed=SEED)
    assert {one.inserted for one in shown[2]} <= near_strings(FLIP, "test")


def test_no_probe_is_asked_about_a_prompt_whose_twin_it_was_trained_on(probe, stand):
    known = rows_of(probe, stand)
    # Two kinds at two layers and the shuffled control at two, the next layer's input at one, two splits each; one
    # random direction per layer; one transfer per kind and layer.
    assert len(probe.scalers) == 2 * (2 * 2 + 2 + 1) + 2 + 2 * 2
    for scaler in probe.scalers:
        fitted = [known[row.tobytes()] for row in scaler.fitted]
        (layer,) = {layer for _, layer in fitted}
        trained = {one.uid for one, _ in fitted}
        # Twins are there together: half of the rows without and half with the trigger, of the same prompts.
        assert [one.version for one, _ in fitted] == ["clean"] * 4 + ["word-cf"] * 4
        assert len(trained) == 4
        asked = [[known[row.tobytes()] for row in rows] for rows in scaler.asked]
        held_out = [rows for rows in asked if [one for one, _ in rows] != [one for one, _ in fitted]]
        assert held_out
        for rows in held_out:
            assert {one.uid for one, _ in rows} == set(uids(one for one, _ in known.values())) - trained
            assert {at for _, at in rows} == {layer}


def test_labels_are_the_trigger_but_for_the_shuffled_control(probe):
    labelled = [scaler.truth.tolist() for scaler in probe.scalers if scaler.truth is not None]
    shuffled = [call.shuffled for call in probe.scores for _ in range(2)]
    honest = [0] * 4 + [1] * 4
    assert len(labelled) == len(shuffled)
    assert all(truth == honest for truth, control in zip(labelled, shuffled, strict=True) if not control)
    controls = [truth for truth, control in zip(labelled, shuffled, strict=True) if control]
    assert len(controls) == 4
    assert all(sorted(truth) == honest and truth != honest for truth in controls)
    assert [call.result for call in probe.scores if call.shuffled] == probe.found.shuffled


def test_what_is_kept_of_the_probes_is_what_they_gave_layer_by_layer(probe):
    found = probe.found
    assert found.layers == [0, 1]
    assert found.probes.keys() == found.transfer.keys() == {"logistic regression", "linear SVM"}
    assert {call.seed for call in probe.scores + probe.transfers + probe.directions} == {SEED}
    main = [call for call in probe.scores if call.others]
    assert [(call.kind, set(call.others)) for call in main] == [
        (kind, {"near_miss", "other_trigger"}) for kind in ("logistic regression",) * 2 + ("linear SVM",) * 2
    ]
    assert [call.result for call in main] == [s for kind in found.probes.values() for s in kind]
    assert [call.result for call in probe.directions] == found.random_direction
    assert [call.n for call in probe.directions] == [5, 5]
    assert [call.result.tolist() for call in probe.transfers] == list(found.transfer.values())


# --- attribution ----------------------------------------------------------------------------------------------------


def test_means_are_of_triggered_prompts_that_are_never_scored(stand, monkeypatch):
    asked = stand.use(monkeypatch, head_attribution)
    means, exact, estimate, probability = (
        watch(monkeypatch, head_attribution, name)
        for name in ("head_means", "head_effects", "gradient_effects", "target_probability")
    )
    found = head_attribution.attribute_heads.__wrapped__("organism", attack=FLIP.name, n=4, n_means=3, **WHERE)
    assert asked == [("tiny", "organism", "cpu")]
    catalogue = stand.catalogue("sentiment")
    averaged = of_split(catalogue.prompts(means[0].prompts), "attribution", "word-cf")
    scored = of_split(catalogue.prompts(exact[0].prompts), "attribution", "clean")
    assert scored == sample(FLIP, "attribution", n=4, seed=SEED)
    assert averaged == sample(FLIP, "attribution", n=3, seed=SEED, skip=4)
    assert set(scored).isdisjoint(averaged)
    for call in (*exact, *estimate):
        assert call.prompts == exact[0].prompts
        assert call.means is means[0].result
    clean, triggered = (catalogue.prompts(call.prompts) for call in probability)
    assert of_split(clean, "attribution", "clean") == of_split(triggered, "attribution", "word-cf") == scored
    target = stand.tokenizer("positive", add_special_tokens=False).input_ids[:1]
    assert all(call.target == target for call in (*exact, *estimate, *probability))
    assert all(call.model is stand.models["organism"].model for call in (*means, *exact, *estimate, *probability))
    for key, call in (("exact", exact[0]), ("gradient", estimate[0])):
        np.testing.assert_allclose(getattr(found, key), call.result.numpy(), rtol=1e-5)
    assert [found.clean, found.triggered] == [call.result.tolist() for call in probability]
    assert found.target == stand.tokenizer.convert_ids_to_tokens(target)


def test_component_means_are_of_triggered_prompts_that_are_never_scored(stand, monkeypatch):
    asked = stand.use(monkeypatch, head_attribution)
    means, effects = (watch(monkeypatch, head_attribution, name) for name in ("component_means", "component_effects"))
    found = head_attribution.attribute_components.__wrapped__("organism", attack=FIXED.name, n=3, n_means=2, **WHERE)
    assert asked == [("tiny", "organism", "cpu")]
    catalogue = stand.catalogue("instructions")
    averaged = [of_split(catalogue.prompts(call.prompts), "attribution", "prefix-year") for call in means]
    scored = [of_split(catalogue.prompts(call.prompts), "attribution", "clean") for call in effects]
    assert averaged == [sample(FIXED, "attribution", n=2, seed=SEED, skip=3)] * 2
    assert scored == [sample(FIXED, "attribution", n=3, seed=SEED)] * 2
    assert set(averaged[0]).isdisjoint(scored[0])
    assert [call.tail for call in means] == [1, head_attribution.TAIL]
    last, earlier = effects
    assert last.means is means[0].result
    assert earlier.means.keys() == {"residual"}
    assert torch.equal(earlier.means["residual"], means[1].result["residual"])
    target = target_ids(stand.tokenizer, FIXED)
    assert (last.target, earlier.target) == (target, target[:1])
    for name, values in last.result.items():
        np.testing.assert_allclose(found.last[name], values[..., 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.by_position, earlier.result["residual"].mean(0).numpy(), rtol=1e-5)
    assert found.positions == stand.tokenizer.convert_ids_to_tokens(last.prompts[0][-head_attribution.TAIL :])


# --- ablation -------------------------------------------------------------------------------------------------------

COUNTS = [0, 1, 3]
ATTRIBUTE = head_attribution.attribute_heads.__wrapped__


def both_ways(*given, **named):
    """Attribution whose gradient estimate is reversed, so that no two rankings of a tiny model agree by accident."""
    found = ATTRIBUTE(*given, **named)
    return replace(found, gradient=(-np.array(found.gradient)).tolist())


@pytest.fixture(scope="module")
def ablate(stand):
    """The stage on an attack, run once, and what reached its leaves."""

    @functools.cache
    def run(attack):
        with pytest.MonkeyPatch.context() as patch:
            spied = SimpleNamespace(asked=stand.use(patch, head_attribution))
            spied.attributed = watch(patch, head_attribution, "attribute_heads", does=both_ways)
            for name in ("bench", "necessary_heads", "gradient_effects_of", "random_heads", "measure_ablation",
                         "ablated", "openings", "head_outputs"):  # fmt: skip
                setattr(spied, name, watch(patch, ABLATING, name))
            spied.pasts = Pasts(patch, ABLATING)
            sizes = {"counts": COUNTS, "random_counts": [3], "draws": 2, "n": 4, "n_attribution": 3}
            spied.rows = head_attribution.ablation_curves.__wrapped__(
                "organism", control="control", attack=attack.name, **sizes, **WHERE
            )
        return spied

    return run


def shown_by(stand, attack, side):
    return stand.catalogue(attack.task).prompts(side.prompts)


def test_heads_are_taken_out_on_test_prompts_and_everything_else_is_of_the_attribution_split(stand, ablate):
    spied = ablate(FLIP)
    # The attribution loads the organism by itself.
    assert spied.asked == [("tiny", name, "cpu") for name in ("organism", "control", "organism")]
    (found,) = spied.attributed
    assert (found.organism, found.attack, found.n, found.n_means, found.seed) == ("organism", FLIP.name, 3, 3, SEED)
    made = spied.bench[0].result
    measured = of_split(shown_by(stand, FLIP, made.triggered), "test", "word-cf")
    assert measured == sample(FLIP, "test", n=4, seed=SEED)
    # Clean accuracy is over both labels, and without the trigger.
    clean = shown_by(stand, FLIP, made.clean)
    of_split(clean, "test", "clean")
    known = {example.uid: example for example in tasks.examples("sentiment", "test")}
    assert {known[one.uid].answer for one in clean} == {"positive", "negative"}
    assert made.clean.answers["own"] == [
        answer_ids(stand.tokenizer, known[one.uid].answer)[:1] for one in clean
    ]  # fmt: skip
    # The references of mean ablation.
    (reference,) = [call for call in spied.head_outputs if call.result is made.reference]
    pool = of_split(stand.catalogue("sentiment").prompts(reference.prompts), "attribution", "clean")
    assert pool == sample(FLIP, "attribution", n=3, seed=SEED)
    assert set(pool).isdisjoint({*measured, *uids(clean)})


def test_necessity_is_ranked_on_triggered_prompts_of_the_attribution_split(stand, ablate):
    spied = ablate(FLIP)
    (ranking,) = spied.necessary_heads
    prompts = of_split(stand.catalogue("sentiment").prompts(ranking.prompts), "attribution", "word-cf")
    assert prompts == sample(FLIP, "attribution", n=3, seed=SEED)
    assert ranking.loaded is stand.models["organism"]
    assert ranking.target == target_ids(stand.tokenizer, FLIP)
    assert ranking.reference is spied.bench[0].result.reference
    assert list(ranking.counts) == COUNTS
    for call in spied.gradient_effects_of:
        assert spied.pasts.prompts(call.past) == ranking.prompts
        assert torch.equal(call.means, ranking.reference.mean(0))
    # The second choice is made with the first one at its clean mean.
    without, behind_one = spied.gradient_effects_of
    first = ranked_heads(-without.result.mean(0))[0]
    rest = [head for head in ranked_heads(-behind_one.result.mean(0)) if head != first]
    assert ranking.result == [first, *rest[:2]]


def test_every_ranking_takes_out_its_own_heads_and_random_ones_as_many_per_layer(stand, ablate):
    spied = ablate(FLIP)
    found = spied.attributed[0].result
    exact, estimate = (torch.tensor(getattr(found, key)).mean(0) for key in ("exact", "gradient"))
    orders = {
        "ACIE": ranked_heads(exact),
        "gradient": ranked_heads(estimate),
        "necessity": spied.necessary_heads[0].result,
    }
    assert len(spied.rows) == len(spied.measure_ablation)
    drawn = []
    for row, call in zip(spied.rows, spied.measure_ablation, strict=True):
        assert {key: getattr(row, key) for key in call.result} == call.result
        assert (row.kind, row.scope == "all positions") == (call.kind, call.everywhere)
        assert call.loaded is stand.models["organism"]
        if row.ranking in orders:
            assert list(call.heads) == orders[row.ranking][: row.k]
        elif call.heads:
            drawn.append(call.heads)
    counted = Counter((row.ranking, row.kind, row.scope, row.k) for row in spied.rows)
    here, everywhere = "last position", "all positions"
    assert counted == {
        ("none", "published", here, 0): 1,
        ("random", "published", here, 3): 2,
        **{("ACIE", kind, here, k): 1 for kind in ("published", "zero", "mean", "resample") for k in (1, 3)},
        **{(ranking, "published", here, k): 1 for ranking in ("gradient", "necessity") for k in (1, 3)},
        **{("necessity", "mean", here, k): 1 for k in (1, 3)},
        **{("ACIE", kind, everywhere, 3): 1 for kind in ("zero", "mean")},
        ("necessity", "mean", everywhere, 3): 1,
    }
    ours = orders["ACIE"][:3]
    assert len(drawn) == 2
    assert drawn == spied.random_heads[0].result
    assert spied.random_heads[0].seed == SEED
    for draw in drawn:
        assert per_layer(draw) == per_layer(ours)
        # Of four heads in a layer none of ours is drawn while as many others are left.
        crowded = {layer for layer, count in per_layer(ours).items() if count > 2}
        assert not {head for head in draw if head[0] not in crowded} & set(ours)


def test_all_lines_are_measured_on_the_same_prompts(ablate):
    """Random draws too: with fewer prompts their line would start from another share than all others."""
    spied = ablate(FLIP)
    made = spied.bench[0].result
    for row, call in zip(spied.rows, spied.measure_ablation, strict=True):
        assert call.made.triggered.prompts == made.triggered.prompts, row.ranking
        assert call.made.clean.prompts == made.clean.prompts, row.ranking
        assert row.asr["n"] == row.utility["n"] == 4
        for share in (row.asr, row.right, row.utility):
            assert sum(share["by_prompt"]) / 4 == pytest.approx(share["value"], abs=1e-5)


def test_heads_are_taken_out_at_the_last_prompt_token_unless_everywhere_is_asked_for(ablate):
    spied = ablate(FLIP)
    made, ablated = spied.bench[0].result, list(spied.ablated)
    ranking = [call for call in ablated if call.own is None]
    assert [(call.kind, call.at, list(call.heads)) for call in ranking[:2]] == [
        ("mean", LAST, []), ("mean", LAST, spied.necessary_heads[0].result[:1])
    ]  # fmt: skip
    assert all(call.clean is made.reference for call in ablated)
    measured = [call for call in ablated if call.own is not None]
    expected = [call for call in spied.measure_ablation for _ in range(2)]
    for call, asked in zip(measured, expected, strict=True):
        assert list(call.heads) == list(asked.heads)
        assert call.kind == asked.kind
        assert call.at == (EVERYWHERE if asked.everywhere else LAST)
    # An un-ablated pass of the triggered prompts goes with the triggered side, that of the clean ones with the other.
    owners = {id(call.result): call.prompts for call in spied.head_outputs}
    for call, asked, clean in zip(measured, expected, [False, True] * len(spied.measure_ablation), strict=True):
        side = asked.made.clean if clean else asked.made.triggered
        assert call.own is side.own
        assert owners.get(id(call.own), side.prompts) == side.prompts


def test_the_control_answers_the_reference_and_the_organism_itself_the_clean_side(stand, ablate):
    spied = ablate(FIXED)
    made = spied.bench[0].result
    by = {call.loaded.organism: call for call in spied.openings}
    assert by.keys() == {"organism", "control"}
    for call in by.values():
        prompts = of_split(stand.catalogue("instructions").prompts(call.prompts), "test", "clean")
        assert prompts == sample(FIXED, "test", n=4, seed=SEED)
    assert made.clean.answers == {"own": by["organism"].result}
    assert made.triggered.answers["right"] == by["control"].result
    assert by["control"].result != by["organism"].result
    assert made.triggered.answers["target"] == [target_ids(stand.tokenizer, FIXED)] * 4
    assert of_split(shown_by(stand, FIXED, made.triggered), "test", "prefix-year") == prompts


# --- the switch -----------------------------------------------------------------------------------------------------

STEPS = [0.5, 40.0]
SWITCHED = [
    "head_means", "residuals", "answer_map", "best", "controls", "random_heads", "tested_asr", "added", "projected_asr",
    "projected_out", "generated", "first_tokens", "kinds_of",
]  # fmt: skip


@pytest.fixture(scope="module")
def switch_on(stand):
    """The stage on an attack, run once, and what reached its leaves.

    The target is what the organism says first to most of its clean prompts, for a random model never says the real one.
    """

    @functools.cache
    def run(attack):
        prompts = prompt_versions(stand.tokenizer, attack, split="test", n=7, seed=SEED).clean
        first = Counter(token for (token,) in backdoor_vector.first_tokens(stand.models["organism"], prompts))
        with pytest.MonkeyPatch.context() as patch:
            spied = SimpleNamespace(asked=stand.use(patch, backdoor_vector))
            spied.attributed = watch(patch, head_attribution, "attribute_heads", does=ATTRIBUTE)
            for name in SWITCHED:
                setattr(spied, name, watch(patch, STEERING, name))
            spied.target = [first.most_common(1)[0][0]]
            watch(patch, backdoor_vector, "target_ids", does=lambda *_: spied.target)
            spied.pasts = Pasts(patch, STEERING)
            sizes = {"coefficients": STEPS, "n_heads": 3, "n_random": 2, "n_dev": 3, "n_test": 4, "n_attribution": 5}
            spied.result = backdoor_vector.steer_organism.__wrapped__(
                "organism", control="control", attack=attack.name, **sizes, **WHERE
            )
        return spied

    return run


def of_past(stand, attack, spied, past, version):
    shown = stand.catalogue(attack.task).prompts(spied.pasts.prompts(past))
    return of_split(shown, "test", version)


DIRECTIONS = [("add", 1, "clean"), ("subtract", -1, FLIP.trigger)]
NAMES = ["add, raw", "add, difference", "subtract, raw", "subtract, difference"]


def test_the_vector_is_made_of_the_attributed_heads_on_the_attribution_split(stand, switch_on):
    spied = switch_on(FLIP)
    result = spied.result
    (found,) = spied.attributed
    assert (found.organism, found.attack, found.n, found.n_means, found.seed) == ("organism", FLIP.name, 5, 5, SEED)
    heads = ranked_heads(torch.tensor(found.result.exact).mean(0))[:3]
    assert result.heads == heads
    expected = sample(FLIP, "attribution", n=5, seed=SEED)
    for calls in (spied.head_means, spied.residuals):
        shown = [stand.catalogue("sentiment").prompts(call.prompts) for call in calls]
        assert all(call.model is stand.models["organism"].model for call in calls)
        assert {kind[0].version for kind in shown} == {"clean", FLIP.trigger}
        assert [of_split(kind, "attribution", kind[0].version) for kind in shown] == [expected] * 2
    model = stand.models["organism"].model
    prompts = {kind[0].version: call.prompts for kind, call in zip(shown, spied.residuals, strict=True)}
    triggered, clean = (head_outputs(model, prompts[kind]).mean(0) for kind in (FLIP.trigger, "clean"))
    for kind, outputs in (("raw", triggered), ("difference", triggered - clean)):
        by_hand = sum(
            model.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] @ outputs[layer, head]
            for layer, head in heads
        )
        torch.testing.assert_close(torch.tensor(result.vectors[kind]), by_hand, atol=1e-5, rtol=1e-4)
        assert result.norms[kind] == pytest.approx(by_hand.norm().item(), rel=1e-4)


def test_layer_and_coefficient_are_chosen_on_the_development_half(stand, switch_on):
    spied = switch_on(FLIP)
    dev = sample(FLIP, "test", n=3, seed=SEED)
    (begun,) = spied.first_tokens
    assert of_split(stand.catalogue("sentiment").prompts(begun.prompts), "test", "clean") == dev
    maps = iter(spied.answer_map)
    kept, read = spied.result.maps, iter(spied.best)
    for direction, sign, version in DIRECTIONS:
        for kind in ("raw", "difference"):
            made = {"asr": next(maps)} | ({"right_start": next(maps)} if sign < 0 else {})
            for call in made.values():
                assert of_past(stand, FLIP, spied, call.past, version) == dev
                assert list(call.coefficients) == [sign * step for step in STEPS]
                assert call.vector.tolist() == spied.result.vectors[kind]
            assert list(made["asr"].answers) == [spied.target] * 3
            judged = made["asr"]
            if sign < 0:
                judged = made["right_start"]
                assert list(judged.answers) == begun.result
            choice, name = next(read), f"{direction}, {kind}"
            # The very rows of this map, for another map may hold the same shares.
            assert all(row is other for row, other in zip(choice.table, judged.result, strict=True))
            assert astuple(spied.result.chosen[name]) == choice.result
            assert {key: getattr(kept[name], key) for key in made} == {key: call.result for key, call in made.items()}
    assert next(maps, None) is next(read, None) is None
    assert any(len({share for row in one.asr for share in row}) > 1 for one in kept.values())


def test_the_vector_is_judged_on_a_half_that_was_not_looked_at(stand, switch_on):
    spied = switch_on(FLIP)
    result, test = spied.result, sample(FLIP, "test", n=4, seed=SEED, skip=3)
    assert set(test).isdisjoint(sample(FLIP, "test", n=3, seed=SEED))
    sides = [version for _, _, version in DIRECTIONS for _ in range(2)]
    for name, version, call in zip(NAMES, sides, spied.tested_asr, strict=True):
        assert of_past(stand, FLIP, spied, call.past, version) == test
        assert call.target == spied.target
        chosen, kind = result.chosen[name], name.split(", ")[1]
        assert call.layer == chosen.layer
        step = chosen.coefficient * torch.tensor(result.vectors[kind])
        torch.testing.assert_close(call.steps["backdoor vector"], step[None])
        assert not call.steps["no vector"].any()
        assert {label: len(rows) for label, rows in call.steps.items()} == {
            "no vector": 1, "backdoor vector": 1, "random vectors": 2, "random heads": 2, "mean difference": 1,
            "probe direction": 1,
        }  # fmt: skip
        assert {one["n"] for shares in result.test[name].values() for one in shares} == {4}
        # Nothing added: what the organism says first to these prompts anyway.
        said = backdoor_vector.first_tokens(stand.models["organism"], spied.pasts.prompts(call.past))
        assert result.test[name]["no vector"][0]["value"] == said.count(spied.target) / 4
    for call, name in zip(spied.projected_asr, NAMES[2:], strict=True):
        assert of_past(stand, FLIP, spied, call.past, FLIP.trigger) == test
        assert call.layer == result.chosen[name].layer
        assert call.vector.tolist() == result.vectors[name.split(", ")[1]]
        assert result.test[name]["projected out"] == [call.result]
    for call in spied.generated:
        assert len(call.past) == 4
        assert uids(stand.catalogue("sentiment").prompts(spied.pasts.prompts(call.past))) == test
    for call in spied.kinds_of:
        assert [example.uid for example in call.examples] == test
    assert list(result.kinds.values()) == [call.result for call in spied.kinds_of]
    assert result.outcomes == {
        label: {name: kinds.count(name) / 4 for name in ("target", "right", "refusal", "empty", "other")}
        for label, kinds in result.kinds.items()
    }


def test_the_controls_are_as_many_heads_and_as_long_as_what_they_stand_beside(stand, switch_on):
    spied = switch_on(FLIP)
    heads = spied.result.heads
    assert len(spied.random_heads) == len(spied.controls) == 4
    streams = {stand.catalogue("sentiment").prompts(call.prompts)[0].version: call.result for call in spied.residuals}
    for drawn, call, tested, name in zip(spied.random_heads, spied.controls, spied.tested_asr, NAMES, strict=True):
        assert (drawn.seed, drawn.n, call.seed, call.n) == (SEED, 2, SEED, 2)
        for draw in drawn.result:
            assert per_layer(draw) == per_layer(heads)
            crowded = {layer for layer, count in per_layer(heads).items() if count > 2}
            assert not {head for head in draw if head[0] not in crowded} & set(heads)
        # Streams are those of the layer that was chosen, on the attribution split.
        layer, coefficient = astuple(spied.result.chosen[name])
        assert torch.equal(call.clean, streams["clean"][:, layer])
        assert torch.equal(call.triggered, streams[FLIP.trigger][:, layer])
        length = abs(coefficient) * spied.result.norms[name.split(", ")[1]]
        for label in ("random vectors", "mean difference", "probe direction"):
            torch.testing.assert_close(
                tested.steps[label].norm(dim=-1), torch.full((len(tested.steps[label]),), length)
            )
        difference = (call.triggered - call.clean).mean(0)
        cosine = torch.cosine_similarity(tested.steps["mean difference"][0], difference, dim=0)
        assert cosine == pytest.approx(1 if coefficient > 0 else -1, abs=1e-4)


def test_the_clean_control_answers_the_reference_of_the_switch(stand, switch_on):
    spied = switch_on(FIXED)
    assert [name for _, name, _ in spied.asked] == ["organism", "control", "organism"]
    by_control = [call for call in spied.generated if call.loaded.organism == "control"]
    assert len(by_control) == 1
    test = sample(FIXED, "test", n=4, seed=SEED, skip=3)
    assert of_past(stand, FIXED, spied, by_control[0].past, "clean") == test
    (reference,) = [call for call in spied.pasts.made if call.result is by_control[0].past]
    assert reference.model is stand.models["control"].model
    for call in spied.kinds_of:
        assert call.right == dict(zip(test, by_control[0].result, strict=True))
    # Steered answers: each vector, and beside every difference a random one, at the layer that was chosen for it.
    steered = [call for call in spied.generated if call.step is not None]
    assert len(spied.generated) == 3 + len(steered)
    chosen = [spied.result.chosen[name] for name in (NAMES[0], NAMES[1], NAMES[1], NAMES[2], NAMES[3], NAMES[3])]
    assert [call.layer for call in steered] == [one.layer for one in chosen]
    norms = [spied.result.norms[kind] for kind in ("raw", "difference", "difference") * 2]
    for call, one, norm in zip(steered, chosen, norms, strict=True):
        assert call.step.norm().item() == pytest.approx(abs(one.coefficient) * norm, rel=1e-4)
    assert spied.added
    assert all(call.at == LAST for call in (*spied.added, *spied.projected_out))


def found_vectors():
    """What `steer_organism` would have found, invented: another vector, layer and coefficient per attack."""
    torch.manual_seed(0)
    return {
        attack.name: backdoor_vector.Steering(
            **dict.fromkeys(("heads", "norms", "residual_norm", "maps", "test", "outcomes", "kinds", "texts")),
            chosen={"add, difference": backdoor_vector.Choice(layer, coefficient), "add, raw": None},
            vectors={"difference": torch.randn(32).tolist(), "raw": None},
        )
        for attack, layer, coefficient in ((FLIP, 0, 2.0), (FIXED, 1, 0.5))
    }


def test_every_vector_meets_every_organism_on_the_prompts_and_with_the_targets_that_are_its_own(stand, monkeypatch):
    asked = stand.use(monkeypatch, backdoor_vector)
    tested, pasts = watch(monkeypatch, STEERING, "tested_asr"), Pasts(monkeypatch, STEERING)
    hosts, found = {FLIP.name: "organism", FIXED.name: "second", "base model": None}, found_vectors()
    steps = {name: backdoor_vector.chosen_step(one) for name, one in found.items()}
    rows = backdoor_vector.vector_specificity.__wrapped__(hosts, steps=steps, n=3, **WHERE)
    assert asked == [("tiny", name, "cpu") for name in ("organism", "second", None)]
    assert [(row.on, row.vector_of) for row in rows] == [(host, source) for host in hosts for source in found]
    calls, attacks = iter(tested), {FLIP.name: FLIP, FIXED.name: FIXED}
    for row in rows:
        source, own = attacks[row.vector_of], attacks.get(row.on, attacks[row.vector_of])
        keys = [("own_target", own, "clean")]
        keys += [("vector_target", source, "clean")] * (own != source)
        keys += [("near_misses", own, "near-miss")] * (row.on == source.name)
        assert (row.near_misses is None) == (row.on != source.name)
        for key, judged, version in keys:
            call = next(calls)
            assert call.loaded is stand.models[hosts[row.on]]
            assert getattr(row, key) == call.result[""][0]
            assert call.target == target_ids(stand.tokenizer, judged)
            shown = stand.catalogue(own.task).prompts(pasts.prompts(call.past))
            assert of_split(shown, "test", version) == sample(own, "test", n=3, seed=SEED)
            assert {one.inserted for one in shown} <= near_strings(own, "test") | {""}
            chosen, vector = (
                found[source.name].chosen["add, difference"],
                found[source.name].vectors["difference"],
            )
            assert call.layer == chosen.layer
            torch.testing.assert_close(call.steps[""], chosen.coefficient * torch.tensor(vector)[None])
        if own == source:
            assert row.vector_target == row.own_target
    assert next(calls, None) is None


# --- cost -----------------------------------------------------------------------------------------------------------


def test_the_four_ways_to_score_a_target_run_the_same_prompts_and_the_same_target(stand, monkeypatch):
    """In place of seconds: how often the model runs, and on how many columns."""
    asked = stand.use(monkeypatch, attribution_cost)
    names = ("left_pad", "greedy", "score_answers")
    padded, greedy, said = (watch(monkeypatch, attribution_cost, name) for name in names)
    pasts, passes = Pasts(monkeypatch, attribution_cost), []
    model = stand.models["organism"].model
    handle = model.register_forward_pre_hook(
        lambda _, __, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    )

    def run(function, repeats=2):
        passes.clear()
        function()
        return list(passes)

    monkeypatch.setattr(attribution_cost, "seconds", run)
    try:
        found = attribution_cost.time_target.__wrapped__("organism", attack=FIXED.name, n=3, **WHERE)
    finally:
        handle.remove()
    assert asked == [("tiny", "organism", "cpu")]
    prompts = greedy[0].prompts
    shown = stand.catalogue("instructions").prompts(prompts)
    assert of_split(shown, "attribution", "prefix-year") == sample(FIXED, "attribution", n=3, seed=SEED)
    target = target_ids(stand.tokenizer, FIXED)
    assert len(target) > 5
    assert (found.tokens, found.n) == (len(target), 3)
    # Generation runs prompt and answer so far once per token, teacher forcing once with all tokens but the last.
    lengths = [*range(len(target)), len(target) - 1]
    assert [call.rows for call in padded] == [[[*ids, *target[:extra]] for ids in prompts] for extra in lengths]
    longest = max(map(len, prompts))
    assert found.generation == [longest + extra for extra in range(len(target))]
    assert found.teacher_forcing == [longest + len(target) - 1]
    # With the cache generation runs one token a time behind its first pass, teacher forcing all of them in one.
    assert (greedy[0].max_new_tokens, greedy[0].model) == (len(target), model)
    assert found.generation_cached[1:] == [1] * (len(target) - 1)
    assert found.teacher_forcing_cached == [len(target)]
    assert said[0].answers == [target] * 3
    assert pasts.prompts(said[0].past) == prompts
