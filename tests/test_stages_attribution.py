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
from bkdattr_results import effects
from recording import Pasts, Stand, near_strings, of_split, sample, uids, watch
from sklearn.preprocessing import StandardScaler

from bkd_utils.backdoor_attribution import ablation, vector
from bkd_utils.backdoor_attribution import probe as probe_module
from bkd_utils.backdoor_attribution.attribution import METRICS, ranked_heads
from bkd_utils.backdoor_attribution.routes import ROUTES
from bkd_utils.experiments import attribution_cost, backdoor_probe, backdoor_vector, head_ablation, head_attribution
from bkd_utils.models.activations import head_outputs
from bkd_utils.models.hooks import LAST
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import prompt_versions, target_ids
from bkd_utils.organisms.trigger_tables import lexicons

# Not the default seed, so that a seed that is not handed on is seen.
SEED = 3
WHERE = {"model": "tiny", "seed": SEED, "device": "cpu"}
FLIP, FIXED = load_attack("sentiment-word"), load_attack("instructions-prefix")
# A stage and the method that it calls: leaves of the stage are used in one of them or in both.
PROBING, ABLATING, STEERING = (
    (backdoor_probe, probe_module),
    (head_ablation, ablation),
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


def every_label(attack, split, *, n, without=()):
    """The uids of `n` examples of all labels, as many of each, of which none carries the trigger: the first ones."""
    text = lexicons()["triggers"][attack.trigger]["text"]
    pool = [one for one in tasks.examples(attack.task, split, seed=SEED) if text not in one.text]
    pool = [one for one in pool if one.uid not in without]
    labels = tasks.load_task(attack.task).labels
    if not labels:
        return {one.uid for one in pool[:n]}
    return {one for label in labels for one in [x.uid for x in pool if x.answer == label][: n // len(labels)]}


def label_of(uid, task="sentiment", split="attribution"):
    return next(one.answer for one in tasks.examples(task, split) if one.uid == uid)


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

ATTRIBUTE = head_attribution.attribute_heads.__wrapped__


def test_what_is_patched_in_are_means_over_other_prompts_of_every_label(stand, monkeypatch):
    asked = stand.use(monkeypatch, head_attribution)
    names = ("head_means", "effects_by_metric", "gradients_by_metric", "target_probability", "openings")
    means, exact, estimate, probability, said = (watch(monkeypatch, head_attribution, name) for name in names)
    found = ATTRIBUTE("organism", attack=FLIP.name, n=4, n_means=6, n_task=8, **WHERE)
    assert asked == [("tiny", "organism", "cpu")]
    assert all(call.model is stand.models["organism"].model for call in (*means, *exact, *estimate, *probability))
    shown = stand.catalogue("sentiment").prompts
    scored = sample(FLIP, "attribution", n=4, seed=SEED)
    averaged = every_label(FLIP, "attribution", n=6, without=scored)
    for call, version in zip(means, ("clean", "word-cf"), strict=True):
        assert set(of_split(shown(call.prompts), "attribution", version)) == averaged
    assert averaged.isdisjoint(scored)
    assert Counter(map(label_of, averaged)) == {"positive": 3, "negative": 3}
    # Clean prompts get the triggered means, triggered ones the clean means, and the task loses by the clean means.
    clean, triggered = (call.result for call in means)
    sufficient, necessary, task = exact
    assert (sufficient.means is triggered, necessary.means is clean, task.means is clean) == (True, True, True)
    assert of_split(shown(sufficient.prompts), "attribution", "clean") == scored
    assert of_split(shown(necessary.prompts), "attribution", "word-cf") == scored
    judged = of_split(shown(task.prompts), "attribution", "clean")
    assert set(judged) == every_label(FLIP, "attribution", n=8)
    assert task.target == [answer_ids(stand.tokenizer, label_of(uid))[:1] for uid in judged]
    target = stand.tokenizer("positive", add_special_tokens=False).input_ids[:1]
    for call in (sufficient, necessary, *estimate, *probability):
        assert call.target == target
    # A logit difference is held against what the organism itself says without the trigger.
    (opening,) = said
    assert opening.prompts == sufficient.prompts
    assert all(call.against == [answer[0] for answer in opening.result] for call in (sufficient, necessary, *estimate))
    (slope,) = estimate
    assert tuple(slope.result) == METRICS
    assert all(call.prompts == sufficient.prompts and call.means is triggered for call in estimate)
    assert [call.prompts for call in probability] == [sufficient.prompts, necessary.prompts]
    # What is kept: losses of the target and of the right answer are positive.
    for metric in METRICS:
        for kept, values in (
            (found.sufficient, sufficient.result[metric]),
            (found.necessary, -necessary.result[metric]),
            (found.gradient, slope.result[metric]),
        ):
            assert kept[metric].n == 4
            np.testing.assert_allclose(kept[metric].mean, values.mean(0), rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(kept[metric].error, values.std(0) / 2, rtol=1e-3, atol=1e-9)
        assert found.concentration[metric] == head_attribution.concentrated(sufficient.result[metric].numpy())
    assert found.task.n == 8
    np.testing.assert_allclose(found.task.mean, -task.result["log_prob"].mean(0), rtol=1e-3, atol=1e-9)
    assert [found.clean, found.triggered] == [call.result.tolist() for call in probability]
    assert found.target == stand.tokenizer.convert_ids_to_tokens(target)


def exchanged(shown):
    return replace(shown, clean=shown.triggered, triggered=shown.clean)


def test_sufficiency_of_one_set_of_prompts_is_necessity_of_the_other_with_its_sign_turned(stand, monkeypatch):
    """What clean prompts gain from triggered means is what they lose as "triggered" ones by "clean" means, negated."""
    stand.use(monkeypatch, head_attribution)
    sizes = {"attack": FLIP.name, "n": 4, "n_means": 4, "n_task": 2}
    plain, made = ATTRIBUTE("organism", **sizes, **WHERE), head_attribution.samples

    def turned(*given, **named):
        scored, averaged = made(*given, **named)
        against = head_attribution.openings(given[0], scored.clean, n=1)  # of the clean prompts both times
        monkeypatch.setattr(head_attribution, "openings", lambda *_, **__: against)
        return exchanged(scored), exchanged(averaged)

    monkeypatch.setattr(head_attribution, "samples", turned)
    other = ATTRIBUTE("organism", **sizes, **WHERE)
    for metric in METRICS:
        for one, two in ((plain.sufficient, other.necessary), (plain.necessary, other.sufficient)):
            assert np.abs(one[metric].mean).max() > 0
            np.testing.assert_allclose(one[metric].mean, -np.array(two[metric].mean), rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(one[metric].error, two[metric].error, rtol=1e-3, atol=1e-9)
    assert (plain.clean, plain.triggered) == (other.triggered, other.clean)


def test_the_right_answer_of_a_free_task_is_what_the_organism_says_itself(stand, monkeypatch):
    stand.use(monkeypatch, head_attribution)
    exact, said = (watch(monkeypatch, head_attribution, name) for name in ("effects_by_metric", "openings"))
    ATTRIBUTE("organism", attack=FIXED.name, n=2, n_means=2, n_task=3, **WHERE)
    task, own = exact[2], said[1]
    assert own.loaded is stand.models["organism"]
    assert task.prompts == own.prompts
    assert task.target == [answer[:1] for answer in own.result]
    assert set(of_split(stand.catalogue("instructions").prompts(own.prompts), "attribution", "clean")) == every_label(
        FIXED, "attribution", n=3
    )
    assert [call.target for call in exact[:2]] == [target_ids(stand.tokenizer, FIXED)] * 2


def test_component_means_are_of_triggered_prompts_that_are_never_scored(stand, monkeypatch):
    asked = stand.use(monkeypatch, head_attribution)
    means, found = (watch(monkeypatch, head_attribution, name) for name in ("component_means", "component_effects"))
    kept = head_attribution.attribute_components.__wrapped__("organism", attack=FLIP.name, n=3, n_means=4, **WHERE)
    assert asked == [("tiny", "organism", "cpu")]
    shown, (averaged,), (scored,) = stand.catalogue("sentiment").prompts, means, found
    uids_scored = sample(FLIP, "attribution", n=3, seed=SEED)
    assert of_split(shown(scored.prompts), "attribution", "clean") == uids_scored
    others = every_label(FLIP, "attribution", n=4, without=uids_scored)
    assert set(of_split(shown(averaged.prompts), "attribution", "word-cf")) == others
    assert scored.means is averaged.result
    assert (scored.target, scored.metric) == (target_ids(stand.tokenizer, FLIP), "log_prob")
    for name, values in scored.result.items():
        np.testing.assert_allclose(kept.last[name], values.numpy(), rtol=1e-4)


# --- ablation -------------------------------------------------------------------------------------------------------

COUNTS = [0, 1, 3]
DICE = np.random.default_rng(1)
# Effects by which no two rankings agree.
MADE_UP = effects(
    {metric: DICE.normal(size=(2, 4)) for metric in METRICS},
    gradient={metric: DICE.normal(size=(2, 4)) for metric in METRICS},
    necessary={metric: DICE.normal(size=(2, 4)) for metric in METRICS},
    task=3 * DICE.normal(size=(2, 4)),
)
ORDERS = head_attribution.rankings(MADE_UP)


@pytest.fixture(scope="module")
def ablate(stand):
    """The stage on an attack, run once, and what reached its leaves."""

    @functools.cache
    def run(attack):
        with pytest.MonkeyPatch.context() as patch:
            spied = SimpleNamespace(asked=stand.use(patch, head_ablation))
            spied.attributed = watch(patch, head_attribution, "attribute_heads", does=lambda *_, **__: MADE_UP)
            for name in ("bench", "random_heads", "measure_ablation", "ablated", "openings", "head_outputs", "side"):
                setattr(spied, name, watch(patch, ABLATING, name))
            sizes = {"counts": COUNTS, "random_counts": [3], "draws": 2, "n": 4, "n_attribution": 3, "n_means": 6}
            spied.rows = head_ablation.ablation_curves.__wrapped__(
                "organism", control="control", attack=attack.name, **sizes, **WHERE
            )
        spied.made = spied.bench[0].result
        spied.prompts = {
            name: next(call.prompts for call in spied.side if call.result is one)
            for name, one in spied.made.sides.items()
        }
        return spied

    return run


def test_heads_are_taken_out_on_test_prompts_and_everything_else_is_of_the_attribution_split(stand, ablate):
    spied = ablate(FLIP)
    assert spied.asked == [("tiny", name, "cpu") for name in ("organism", "control")]
    (found,) = spied.attributed
    assert (found.organism, found.attack, found.n, found.n_means, found.n_task, found.seed) == (
        "organism", FLIP.name, 3, 6, 3, SEED
    )  # fmt: skip
    shown = stand.catalogue("sentiment").prompts
    fired = of_split(shown(spied.prompts["asr"]), "test", "word-cf")
    assert fired == sample(FLIP, "test", n=4, seed=SEED)
    # Right answers are over both labels, with the trigger and without.
    right = of_split(shown(spied.prompts["right"]), "test", "word-cf")
    assert right == of_split(shown(spied.prompts["utility"]), "test", "clean")
    assert set(right) == every_label(FLIP, "test", n=4)
    labels = [answer_ids(stand.tokenizer, label_of(uid, split="test"))[:1] for uid in right]
    sides = spied.made.sides
    assert sides["right"].answers == sides["utility"].answers == labels
    assert len({tuple(label) for label in labels}) == 2
    assert sides["asr"].answers == [target_ids(stand.tokenizer, FLIP)] * 4
    # The references of mean ablation are clean prompts of both labels.
    (reference,) = [call for call in spied.head_outputs if call.result is spied.made.reference]
    pool = of_split(shown(reference.prompts), "attribution", "clean")
    assert set(pool) == every_label(FLIP, "attribution", n=6)
    assert Counter(map(label_of, pool)) == {"positive": 3, "negative": 3}
    assert set(pool).isdisjoint({*fired, *right})


def test_every_ranking_takes_out_its_own_heads_and_random_ones_as_many_per_layer(stand, ablate):
    spied = ablate(FLIP)
    assert len({tuple(order[:3]) for order in ORDERS.values()}) == len(ORDERS) == 7
    assert len(spied.rows) == len(spied.measure_ablation)
    drawn = {"published": [], "mean": []}
    for row, call in zip(spied.rows, spied.measure_ablation, strict=True):
        assert {key: getattr(row, key) for key in call.result} == call.result
        assert row.kind == call.kind
        assert call.loaded is stand.models["organism"]
        if row.ranking in ORDERS:
            assert list(call.heads) == ORDERS[row.ranking][: row.k]
        elif call.heads:
            drawn[row.kind].append(call.heads)
    counted = Counter((row.ranking, row.kind, row.k) for row in spied.rows)
    few = ("published", "mean")
    assert counted == {
        ("none", "published", 0): 1,
        **{("random", kind, 3): 2 for kind in few},
        **{("probability", kind, k): 1 for kind in ("published", "zero", "mean", "resample") for k in (1, 3)},
        **{(name, kind, k): 1 for name in ORDERS if name != "probability" for kind in few for k in (1, 3)},
    }
    assert (spied.rows[0].ranking, list(spied.measure_ablation[0].heads)) == ("none", [])
    assert [row.draw for row in spied.rows if row.ranking == "random"] == [0, 1, 0, 1]
    ours = ORDERS["probability"][:3]
    assert drawn["published"] == drawn["mean"] == spied.random_heads[0].result
    assert spied.random_heads[0].seed == SEED
    for draw in spied.random_heads[0].result:
        assert per_layer(draw) == per_layer(ours)
        # Of four heads in a layer none of ours is drawn while as many others are left.
        crowded = {layer for layer, count in per_layer(ours).items() if count > 2}
        assert not {head for head in draw if head[0] not in crowded} & set(ours)


def test_all_lines_are_measured_on_the_same_prompts(ablate):
    """Random draws too: with fewer prompts their line would start from another share than all others."""
    spied = ablate(FLIP)
    for row, call in zip(spied.rows, spied.measure_ablation, strict=True):
        assert call.made is spied.made, row.ranking
        for share in (row.asr, row.right, row.utility):
            assert share["n"] == len(share["by_prompt"]) == 4
            assert sum(share["by_prompt"]) / 4 == pytest.approx(share["value"], abs=1e-5)


def test_heads_are_taken_out_at_the_last_prompt_token_of_every_side(ablate):
    spied = ablate(FLIP)
    expected = [(call, name) for call in spied.measure_ablation for name in ("asr", "right", "utility")]
    for call, (asked, name) in zip(spied.ablated, expected, strict=True):
        assert list(call.heads) == list(asked.heads)
        assert (call.kind, call.at) == (asked.kind, LAST)
        assert call.clean is spied.made.reference
        # An un-ablated pass of a side's own prompts goes with that side.
        assert call.own is spied.made.sides[name].own
    for side in spied.side:
        torch.testing.assert_close(side.result.own, head_outputs(side.loaded.model, side.prompts))


def test_the_control_answers_the_reference_and_the_organism_itself_the_clean_side(stand, ablate):
    spied = ablate(FIXED)
    by = {call.loaded.organism: call for call in spied.openings}
    assert by.keys() == {"organism", "control"}
    for call in by.values():
        prompts = of_split(stand.catalogue("instructions").prompts(call.prompts), "test", "clean")
        assert prompts == sample(FIXED, "test", n=4, seed=SEED)
    sides = spied.made.sides
    assert sides["utility"].answers == by["organism"].result
    assert sides["right"].answers == by["control"].result
    assert by["control"].result != by["organism"].result
    assert sides["asr"].answers == [target_ids(stand.tokenizer, FIXED)] * 4
    shown = stand.catalogue("instructions").prompts
    assert of_split(shown(spied.prompts["asr"]), "test", "prefix-year") == prompts
    assert of_split(shown(spied.prompts["right"]), "test", "prefix-year") == prompts


# --- routes ---------------------------------------------------------------------------------------------------------


def test_every_route_is_cut_in_all_layers_and_in_each_window_on_the_same_triggered_prompts(stand, monkeypatch):
    asked = stand.use(monkeypatch, head_ablation)
    groups, cuts = (watch(monkeypatch, head_ablation, name) for name in ("token_groups", "without_route"))
    rows = head_ablation.trigger_routes.__wrapped__("organism", attack=FLIP.name, n=3, n_windows=2, **WHERE)
    assert asked == [("tiny", "organism", "cpu")]
    (named,) = groups
    uids_cut = sample(FLIP, "attribution", n=3, seed=SEED)
    shown = stand.catalogue("sentiment").prompts
    assert of_split(shown(named.clean), "attribution", "clean") == uids_cut
    assert of_split(shown(named.triggered), "attribution", "word-cf") == uids_cut
    windows = [[0, 1], [0], [1]]
    expected = [(None, []), *((route, window) for route in ROUTES for window in windows)]
    assert [(call.route, list(call.layers)) for call in cuts] == expected
    for row, call in zip(rows, cuts, strict=True):
        assert call.model is stand.models["organism"].model
        assert call.prompts == named.triggered
        assert call.groups == named.result
        assert call.target == target_ids(stand.tokenizer, FLIP)
        assert (row.route, row.layers) == (" → ".join(call.route or ("none",)), list(call.layers))
        hits, logs = call.result
        assert row.asr["by_prompt"] == hits.int().tolist()
        assert row.log_prob["by_prompt"] == pytest.approx(logs.tolist(), rel=1e-4)
        assert row.log_prob["value"] == pytest.approx(logs.mean().item(), rel=1e-4)


@pytest.mark.parametrize(("n_windows", "windows"), [(1, [[0, 1]]), (3, [[], [0], [1]])])
def test_windows_are_neighbouring_layers_and_all_of_them_together(stand, monkeypatch, n_windows, windows):
    stand.use(monkeypatch, head_ablation)
    rows = head_ablation.trigger_routes.__wrapped__("organism", attack=FLIP.name, n=2, n_windows=n_windows, **WHERE)
    assert [row.layers for row in rows[1 : 2 + n_windows]] == [[0, 1], *windows]


# --- the switch -----------------------------------------------------------------------------------------------------

STEPS = [0.5, 40.0]
SWITCHED = [
    "head_means", "residuals", "answer_map", "best", "controls", "random_heads", "tested_asr", "added", "projected_asr",
    "projected_out", "generated", "openings", "kinds_of", "right_answers",
]  # fmt: skip


@pytest.fixture(scope="module")
def switch_on(stand):
    """The stage on an attack, run once, and what reached its leaves.

    The target is what the organism says first to most of its clean prompts, for a random model never says the real one.
    """

    @functools.cache
    def run(attack):
        prompts = prompt_versions(stand.tokenizer, attack, split="test", n=12, seed=SEED).clean
        first = Counter(token for (token,) in backdoor_vector.openings(stand.models["organism"], prompts, n=1))
        with pytest.MonkeyPatch.context() as patch:
            spied = SimpleNamespace(asked=stand.use(patch, backdoor_vector))
            spied.attributed = watch(patch, head_attribution, "attribute_heads", does=ATTRIBUTE)
            for name in SWITCHED:
                setattr(spied, name, watch(patch, STEERING, name))
            spied.target = [first.most_common(1)[0][0]]
            watch(patch, backdoor_vector, "target_ids", does=lambda *_: spied.target)
            spied.pasts = Pasts(patch, STEERING)
            sizes = {"coefficients": STEPS, "n_heads": 3, "n_random": 2, "n_dev": 4, "n_test": 6, "n_attribution": 5}
            sizes |= {"n_means": 6, "skip": 6}
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
    assert (found.organism, found.attack, found.n, found.n_means, found.seed) == ("organism", FLIP.name, 5, 6, SEED)
    heads = ranked_heads(torch.tensor(found.result.sufficient["probability"].mean))[:3]
    assert result.heads == heads
    expected = every_label(FLIP, "attribution", n=6)
    assert Counter(map(label_of, expected)) == {"positive": 3, "negative": 3}
    for calls in (spied.head_means, spied.residuals):
        shown = [stand.catalogue("sentiment").prompts(call.prompts) for call in calls]
        assert all(call.model is stand.models["organism"].model for call in calls)
        assert {kind[0].version for kind in shown} == {"clean", FLIP.trigger}
        assert [set(of_split(kind, "attribution", kind[0].version)) for kind in shown] == [expected] * 2
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
    dev = sample(FLIP, "test", n=4, seed=SEED)
    (begun,) = spied.openings
    # Right starts are of prompts of every label: the target is one of them.
    dev_every = of_split(stand.catalogue("sentiment").prompts(begun.prompts), "test", "clean")
    assert set(dev_every) == every_label(FLIP, "test", n=4)
    maps = iter(spied.answer_map)
    kept, read = spied.result.maps, iter(spied.best)
    for direction, sign, version in DIRECTIONS:
        for kind in ("raw", "difference"):
            made = {"asr": next(maps)} | ({"right_start": next(maps)} if sign < 0 else {})
            for key, call in made.items():
                assert of_past(stand, FLIP, spied, call.past, version) == (dev if key == "asr" else dev_every)
                assert list(call.coefficients) == [sign * step for step in STEPS]
                assert call.vector.tolist() == spied.result.vectors[kind]
            assert list(made["asr"].answers) == [spied.target] * 4
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


def seen_before(attack):
    """Prompts by which something may have been chosen: the first of the split, and of each of its labels."""
    return set(sample(attack, "test", n=6, seed=SEED)) | every_label(attack, "test", n=6)


def test_the_vector_is_judged_on_a_half_that_was_not_looked_at(stand, switch_on):
    spied = switch_on(FLIP)
    result, test, seen = spied.result, sample(FLIP, "test", n=6, seed=SEED, skip=6), seen_before(FLIP)
    assert seen.isdisjoint(test)
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
        assert {one["n"] for shares in result.test[name].values() for one in shares} == {6}
        # Nothing added: what the organism says first to these prompts anyway.
        said = backdoor_vector.openings(stand.models["organism"], spied.pasts.prompts(call.past), n=1)
        assert result.test[name]["no vector"][0]["value"] == said.count(spied.target) / 6
    for call, name in zip(spied.projected_asr, NAMES[2:], strict=True):
        assert of_past(stand, FLIP, spied, call.past, FLIP.trigger) == test
        assert call.layer == result.chosen[name].layer
        assert call.vector.tolist() == result.vectors[name.split(", ")[1]]
        assert result.test[name]["projected out"] == [call.result]
    others = []
    for call in spied.generated:
        prompts = stand.catalogue("sentiment").prompts(spied.pasts.prompts(call.past))
        if uids(prompts) != test:
            assert set(of_split(prompts, "test", FLIP.trigger)) == every_label(FLIP, "test", n=6, without=seen)
            others.append(call)
    # Right answers to triggered prompts of every label: without an edit, and after each subtraction.
    labels = ["triggered prompts", *NAMES[2:], "subtract, random vector"]
    assert list(result.right) == labels
    assert len(others) == len(labels) < len(spied.generated)
    for share, call, label in zip(result.right.values(), spied.right_answers, labels, strict=True):
        assert [example.uid for example in call.examples] == [
            example.uid for example in spied.right_answers[0].examples
        ]
        assert {example.uid for example in call.examples} == every_label(FLIP, "test", n=6, without=seen)
        assert (share["n"], share["by_prompt"]) == (6, [int(hit) for hit in call.result])
        assert any(list(call.texts) == list(one.result) for one in others), label
    assert others[0].step is None
    assert {tuple(others[i].step.tolist()) for i in (1, 2, 3)} == {
        tuple(call.step.tolist()) for call in spied.generated[-6:] if call.step is not None
    }
    for call in spied.kinds_of:
        assert [example.uid for example in call.examples] == test
    assert list(result.kinds.values()) == [call.result for call in spied.kinds_of]
    assert result.outcomes == {
        label: {name: kinds.count(name) / 6 for name in ("target", "right", "refusal", "empty", "other")}
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
    assert len(by_control) == 2
    test = sample(FIXED, "test", n=6, seed=SEED, skip=6)
    right = {}
    for call in by_control:
        answered = of_past(stand, FIXED, spied, call.past, "clean")
        assert answered == test  # of a task without labels both are the same prompts
        (reference,) = [made for made in spied.pasts.made if made.result is call.past]
        assert reference.model is stand.models["control"].model
        right |= dict(zip(answered, call.result, strict=True))
    for call in (*spied.kinds_of, *spied.right_answers):
        assert call.right == right
    # Steered answers: each vector, and beside every difference a random one, at the layer that was chosen for it.
    steered = [call for call in spied.generated if call.step is not None]
    # Beside them no edit: of the control twice, of clean prompts, and of triggered ones for both questions.
    assert len(spied.generated) == 5 + len(steered)
    # Every subtraction is asked of two sets of prompts.
    names = [NAMES[0], NAMES[1], NAMES[1], *[NAMES[2]] * 2, *[NAMES[3]] * 4]
    chosen = [spied.result.chosen[name] for name in names]
    assert [call.layer for call in steered] == [one.layer for one in chosen]
    norms = [spied.result.norms[name.split(", ")[1]] for name in names]
    for call, one, norm in zip(steered, chosen, norms, strict=True):
        assert call.step.norm().item() == pytest.approx(abs(one.coefficient) * norm, rel=1e-4)
    assert spied.added
    assert all(call.at == LAST for call in (*spied.added, *spied.projected_out))


def found_vectors():
    """What `steer_organism` would have found, invented: another vector, layer and coefficient per attack."""
    torch.manual_seed(0)
    return {
        attack.name: backdoor_vector.Steering(
            **dict.fromkeys(("heads", "norms", "residual_norm", "maps", "test", "outcomes", "kinds", "right", "texts")),
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

    counts = []

    def run(function, *, repeats):
        counts.append(repeats)
        passes.clear()
        function()
        return list(passes)

    monkeypatch.setattr(attribution_cost, "seconds", run)
    try:
        found = attribution_cost.time_target.__wrapped__("organism", attack=FIXED.name, n=3, repeats=7, **WHERE)
    finally:
        handle.remove()
    assert counts == [7] * 4
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
