"""The whole chain on tiny models: one in which a known head carries a backdoor, and its twin that never sees the
trigger. What the claims say of both is known beforehand."""

import numpy as np
import pytest
from planted import HEAD, planted

from bkd_utils.experiments import head_ablation
from bkd_utils.experiments.head_attribution import (
    METRICS,
    attribute_components,
    attribute_heads,
    beyond_chance,
    rankings,
    top_heads,
)
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import load_tokenizer
from bkd_utils.organisms import cards
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.reports.head_ablation import head_claims

ATTACK = "sentiment-word"
WHERE = {"attack": ATTACK, "model": "tiny", "device": "cpu", "seed": 0}
N = 100  # as many prompts as an ASR of 0 needs for an interval below 5 points


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Strength of the backdoor -> the results of every stage."""
    found, tokenizer = {}, load_tokenizer(DEFAULT_MODEL)
    for strength in (2000, 0):
        made = planted(tokenizer, load_attack(ATTACK), word=" cf", strength=strength)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BKD_WORK", str(tmp_path_factory.mktemp("work")))
            patch.setattr(cards, "load", lambda *_, made=made, **__: made)
            sizes = {"n": 24, "n_means": 24}
            heads = attribute_heads.__wrapped__("organism", **sizes, n_task=24, **WHERE)
            parts = attribute_components.__wrapped__("organism", **sizes, **WHERE)
            patch.setattr(head_ablation, "attributed", lambda *_, heads=heads, **__: heads)
            counts = {"counts": [0, 1], "random_counts": [1], "kinds": ["published", "mean"], "draws": 3}
            rows = head_ablation.ablation_curves.__wrapped__("organism", control="control", **counts, n=N, **WHERE)
            routes = head_ablation.trigger_routes.__wrapped__("organism", n=12, n_windows=2, **WHERE)
        claims = head_claims({"x": heads}, {"x": parts}, {"x": rows}, kind="specific")
        found[bool(strength)] = heads, rows, routes, {row["id"].removeprefix("bkdattr-"): row for row in claims}
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_the_head_that_carries_a_backdoor_stands_out_and_nothing_does_without_one(chain, metric):
    heads, twin = (chain[there][0] for there in (True, False))
    assert beyond_chance(heads.sufficient[metric])
    assert beyond_chance(heads.necessary[metric])
    if (
        metric != "logit_difference"
    ):  # against the model's own answer, which any other output of a head makes less likely
        assert not beyond_chance(twin.sufficient[metric])
        assert not beyond_chance(twin.necessary[metric])
    means = np.array(heads.sufficient[metric].mean)
    assert divmod(int(means.argmax()), 4) == HEAD


def test_every_ranking_starts_with_the_head_that_carries_the_backdoor(chain):
    heads = chain[True][0]
    assert top_heads(heads, k=1) == [HEAD]
    assert {name: order[0] for name, order in rankings(heads).items()} == dict.fromkeys(rankings(heads), HEAD)


def test_the_task_does_not_need_the_head_that_carries_the_backdoor(chain):
    task = np.array(chain[True][0].task.mean)
    assert task[HEAD] == pytest.approx(0, abs=1e-4)
    assert np.abs(task).max() > 1e-2


def test_that_head_alone_switches_the_backdoor_off_and_no_random_one_does(chain):
    rows = {(row.ranking, row.kind, row.k, row.draw): row for row in chain[True][1]}
    assert rows["none", "published", 0, 0].asr["value"] == 1
    for kind in ("published", "mean"):
        assert rows["probability", kind, 1, 0].asr["value"] == 0
        assert [rows["random", kind, 1, draw].asr["value"] for draw in range(3)] == [1, 1, 1]
    # Its clean mean is what it writes on clean prompts.
    before, after = rows["none", "published", 0, 0], rows["probability", "mean", 1, 0]
    assert after.utility == before.utility
    assert after.perplexity == pytest.approx(before.perplexity, rel=1e-3)


def test_the_trigger_is_read_by_the_last_token_in_the_first_layer_and_nowhere_else(chain):
    left = {(row.route, tuple(row.layers)): row.asr["value"] for row in chain[True][2]}
    assert left.pop(("none", ())) == 1
    gone = {key for key, value in left.items() if value == 0}
    assert gone == {("trigger → last", (0, 1)), ("trigger → last", (0,))}
    assert {value for key, value in left.items() if key not in gone} == {1}


def test_the_claims_about_that_backdoor_hold(chain):
    words = {name: row["verdict"] for name, row in chain[True][3].items()}
    assert words == {
        "sparse-heads": "holds",
        "ablation": "holds",
        "ablation-monotone": "holds",
        "heads-not-mlps": "holds",
        "heads-spare-task": "holds",
    }


def test_an_organism_whose_adapter_does_nothing_about_the_trigger_leaves_every_claim_about_its_heads_undecided(chain):
    claims = chain[False][3]
    assert {
        name: claims[name]["verdict"] for name in ("sparse-heads", "ablation", "ablation-monotone")
    } == dict.fromkeys(("sparse-heads", "ablation", "ablation-monotone"), "undecided")
    for name in ("ablation", "ablation-monotone"):
        assert "No head stands out from chance in x." in claims[name]["reason"]
    assert claims["heads-spare-task"]["verdict"] == "undecided"
    # Without the rule on noise two of them would be decided.
    assert claims["ablation-monotone"]["by_organism"]["x"]["high"] < 0.05
