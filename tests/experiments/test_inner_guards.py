"""Guards inside the model as a stage: which prompts set thresholds, train the probe and are judged; what works."""

import numpy as np
import pytest
from recording_defence import Spy, carrying, changed_organism, uids
from tiny import save_tiny

from bkd_utils.experiments import inner_guards
from bkd_utils.experiments.input_guards import outcome
from bkd_utils.models import loading
from bkd_utils.organisms import attacks, cards, tasks

SPEC = attacks.load_attack("sentiment-word")
SIZES = {"n": 4, "n_reference": 8, "n_oracle": 5, "frr": 0.25, "seed": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def loaded(base, monkeypatch, tmp_path):
    """An organism that differs from the base in one output matrix."""
    written = "model.layers.0.mlp.down_proj.weight"
    return changed_organism(monkeypatch, base, tmp_path, change=lambda model: model.get_parameter(written).add_(0.1))


def watch(**given):
    return inner_guards.watch_inside.__wrapped__("an organism", attack="sentiment-word", **SIZES | given)


def test_every_set_of_prompts_is_what_it_is_said_to_be(loaded, monkeypatch):
    read = Spy(monkeypatch, inner_guards, "residuals")
    counted = Spy(monkeypatch, inner_guards, "outcome")
    found = watch()
    known, clean, triggered, plain, poisoned = read.of("prompts")

    def of(split, prompts):
        return uids(loaded.tokenizer, "sentiment", split, prompts)

    assert of("attribution", known) == [one.uid for one in tasks.examples("sentiment", "attribution", seed=1)[:8]]
    assert of("test", clean) == [one.uid for one in tasks.examples("sentiment", "test", seed=1)[:4]]
    assert len(set(of("train", plain))) == 5
    assert [len(triggered), len(poisoned)] == [4, 5]
    assert [carrying(SPEC, loaded.tokenizer, some) for some in (triggered, poisoned)] == [4, 5]
    assert [carrying(SPEC, loaded.tokenizer, some) for some in (known, clean, plain)] == [0, 0, 0]
    assert list(found.guards) == ["weight spectra", "weight spectra, range", "layer steps", "probe (oracle)"]
    for call in counted.calls:
        assert [len(call[name]) for name in ("known", "clean", "triggered")] == [8, 4, 4]
        assert call["frr"] == 0.25
        assert list(call["fired"]) == [bool(hit) for hit in found.fired["by_prompt"]]


def test_known_prompts_are_scored_without_themselves(loaded, monkeypatch):
    """But for the published rule, by which they are inside."""
    counted = Spy(monkeypatch, inner_guards, "outcome")
    left = Spy(monkeypatch, inner_guards.inside, "by_known")
    watch()
    spectra, published, steps, probe = counted.calls
    assert [call["score"] for call in left.calls] == [
        inner_guards.inside.beyond_range,
        inner_guards.inside.unusual_steps,
    ]
    assert spectra["known"].tolist() == left.results[0][0].tolist()
    assert spectra["known"].max() > 0  # the widest prompt leaves the range of the others
    assert published["known"].tolist() == [0.0] * 8
    assert published["triggered"].tolist() == spectra["triggered"].tolist()
    assert steps["known"].tolist() == left.results[1][0].tolist()
    assert probe["known"].shape == (8,)


def test_what_cannot_be_watched_is_refused(loaded, base, monkeypatch):
    with pytest.raises(ValueError, match=r"n_reference must be at least 1 / frr = 20, is 8"):
        watch(frr=0.05)
    monkeypatch.setattr(cards, "load", lambda *_, **__: base)
    with pytest.raises(ValueError, match="a base model has no weight difference"):
        watch()


# --- the trigger is there, or the attack works ----------------------------------------------------------------------


def guarded(fired):
    """Two of four triggered prompts are caught, the first and the last."""
    return outcome(np.arange(10.0), np.zeros(4), np.array([9.0, 1.0, 2.0, 10.0]), frr=0.1, fired=fired)


def test_recall_over_the_attacks_that_work_leaves_the_others_out():
    fired = [1, 1, 0, 0]
    found = inner_guards.executed(guarded(fired), fired)
    assert (found["value"], found["n"], found["by_prompt"]) == (0.5, 2, [1, 0])
    assert guarded(fired).caught["value"] == 0.5
    only = [1, 0, 0, 1]
    assert inner_guards.executed(guarded(only), only)["value"] == 1
    assert inner_guards.executed(guarded([0] * 4), [0] * 4) is None


def test_prompts_of_another_measurement_are_refused():
    row = guarded([1, 1, 0, 0])
    for other in ([1, 1, 0], [1, 0, 0, 0]):  # by the guard's own count the second prompt fires
        with pytest.raises(ValueError, match="not the prompts of the guard"):
            inner_guards.executed(row, other)
