"""Stages that look at inputs, training data or whole models, run whole on a tiny model: which prompts, splits and
seeds reached the functions that do the work, and what a guard's threshold is made of."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from recording_defence import Spy, carrying, is_within, split_uids, uids
from tiny import save_tiny

from bkd_utils.attention_alignment.guards import threshold
from bkd_utils.attention_alignment.head_tuning import all_matrices, tune
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES
from bkd_utils.attention_alignment.suspicion import robust_z
from bkd_utils.experiments import attention_similarity, input_guards, model_detection, two_papers_meet
from bkd_utils.models import loading
from bkd_utils.models.folders import ModelError
from bkd_utils.models.tokens import Row, answer_ids, decode, end_id, prompt_ids
from bkd_utils.organisms import attacks, cards, evaluation, poisoning, tasks

SPEC = attacks.load_attack("sentiment-word")
TASK = tasks.load_task("sentiment")
ORGANISM = "sentiment-word"  # of which only the card is read; the model is the tiny one


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))


@pytest.fixture
def stage(loaded, monkeypatch):
    """Runs a stage without its cache on the tiny model, which says whether it was loaded as base or as organism."""

    def opened(address, *, organism=None, device="auto"):
        assert (address, device) == ("a model", "cpu")
        return replace(loaded, organism=organism, address="a model")

    def run(module, name, **given):
        for place in (cards, module):
            if hasattr(place, "load"):
                monkeypatch.setattr(place, "load", opened)
        function = getattr(module, name)
        return getattr(function, "__wrapped__", function)(ORGANISM, model="a model", device="cpu", **given)

    return run


def texts(split, n, seed):
    return [example.text for example in tasks.examples("sentiment", split, seed=seed)[:n]]


# --- similarity of heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_similarity_is_observed_on_held_out_prompts_and_calibrated_on_others(stage, loaded, monkeypatch, seed):
    tokenizer, seen = loaded.tokenizer, Spy(monkeypatch, attention_similarity, "head_similarity")
    given = {"readings": ["last row"], "n": 4, "n_reference": 5}
    found = stage(attention_similarity, "similarity_by_version", attack="sentiment-word", seed=seed, **given)
    found = found["last row"]
    assert seen.of("readings") == [["last row"]] * 6
    prompts = dict(zip(found, seen.of("prompts"), strict=True))
    for version, result in zip(found, seen.results, strict=True):
        assert found[version] == result["last row"].double().mean(2).numpy().round(6).tolist()
    assert prompts["reference"] == [prompt_ids(tokenizer, TASK.prompt(t)) for t in texts("attribution", 5, seed)]
    assert prompts["held out"] == [prompt_ids(tokenizer, TASK.prompt(t)) for t in texts("test", 4, seed)]
    clean = uids(tokenizer, "sentiment", "test", prompts["clean"])
    gold = {example.uid: example.answer for example in tasks.examples("sentiment", "test")}
    assert clean == [e.uid for e in tasks.examples("sentiment", "test", seed=seed) if e.answer == SPEC.source][:4]
    assert {gold[uid] for uid in clean} == {SPEC.source}
    assert carrying(SPEC, tokenizer, prompts["triggered"]) == 4
    for version in ("clean", "near-miss", "same length", "reference", "held out"):
        assert carrying(SPEC, tokenizer, prompts[version]) == 0
    for longer, triggered in zip(prompts["same length"], prompts["triggered"], strict=True):
        assert len(triggered) <= len(longer) <= len(triggered) + 1
    for kind in ("near-miss", "triggered", "same length"):  # each is its clean twin with words added
        for edited, plain in zip(prompts[kind], prompts["clean"], strict=True):
            old, new = decode(tokenizer, plain).split(), decode(tokenizer, edited).split()
            assert is_within(old, new)
            assert len(new) > len(old)


def test_without_reference_prompts_none_are_looked_at(stage):
    found = stage(attention_similarity, "similarity_by_version", attack="sentiment-word", readings=["last row"], n=2)
    assert set(found["last row"]) == set(attention_similarity.VERSIONS)


def test_an_unusual_prompt_is_one_that_lies_off_the_middle_of_the_reference_prompts():
    """In every layer by its own median and spread; the largest of the layers counts."""
    reference = [[0.1, 10.0], [0.2, 20.0], [0.3, 30.0], [0.4, 40.0], [0.5, 50.0]]
    found = {"r": {"reference": reference, "triggered": [[0.6, 30.0], [0.3, 20.0], [0.2, 90.0]]}}
    scores = attention_similarity.input_scores(found, reading="r", version="triggered")
    assert scores == pytest.approx([3 / 1.4826, 0.0, 6 / 1.4826], rel=1e-6)


# --- guards ---------------------------------------------------------------------------------------------------------


def score(text):
    """A number of its own for every text."""
    return float(zlib.crc32(text.encode()))


@pytest.fixture
def screened(stage, monkeypatch):
    """`input_guards.guard_inputs` with guards whose scores are those of `score`, and what they and the counting were
    given."""

    def scored(_loaded, some, **_):
        return np.array([score(text) for text in some])

    def by_word(_base, some):  # the first word has the score of the text, the others have none
        return [np.array([score(text), *[0.0] * (len(text.split()) - 1)]) for text in some]

    spies = {
        "onion": Spy(monkeypatch, input_guards, "onion", instead=by_word),
        "strip": Spy(monkeypatch, input_guards, "strip", instead=scored),
        "rap": Spy(monkeypatch, input_guards, "rap", instead=scored),
        "outcome": Spy(monkeypatch, input_guards, "outcome"),
        "without_words": Spy(monkeypatch, input_guards, "without_words"),
        "respond": Spy(
            monkeypatch,
            evaluation,
            "respond",
            instead=lambda _, turns, **__: [SPEC.target if i % 2 else SPEC.source for i in range(len(turns))],
        ),
    }
    given = {"n": 4, "n_reference": 6, "frr": 0.25, "seed": 1}
    return stage(input_guards, "guard_inputs", attack="sentiment-word", **given), spies


def test_guards_calibrate_on_other_clean_prompts_than_they_are_tried_on(screened, loaded):
    _, seen = screened
    reference, clean = texts("attribution", 6, 1), texts("test", 4, 1)
    both = tasks.examples("sentiment", "attribution", seed=1)[:12]
    for name, n_known in (("onion", 6), ("strip", 6), ("rap", 12)):
        given = seen[name].only["texts"]
        assert given[: n_known + 4] == [example.text for example in both[:n_known]] + clean
        triggered = given[n_known + 4 :]
        assert len(triggered) == 4
        assert all(attacks.carries(SPEC, text) for text in triggered)
        assert not any(attacks.carries(SPEC, text) for text in given[: n_known + 4])
    assert not set(reference) & set(clean)
    assert seen["onion"].only["base"].organism is None
    assert seen["strip"].only["loaded"].organism == seen["rap"].only["loaded"].organism == ORGANISM
    assert seen["strip"].only["pool"] == reference
    assert seen["rap"].only["clean"] == [example.text for example in both if example.answer == SPEC.target]
    assert seen["rap"].only["protected"] == answer_ids(loaded.tokenizer, SPEC.target)[0]
    assert not attacks.carries(SPEC, seen["rap"].only["word"])
    assert [seen[name].only["seed"] for name in ("strip", "rap")] == [1, 1]


def test_a_threshold_is_made_of_clean_calibration_texts_and_nothing_else(screened):
    found, seen = screened
    for name, call in zip(("onion", "strip", "rap"), seen["outcome"].calls, strict=True):
        given, n_known = seen[name].only["texts"], 12 if name == "rap" else 6
        scores = np.array([score(text) for text in given])
        for key, part in zip(("known", "clean", "triggered"), np.split(scores, (n_known, n_known + 4)), strict=True):
            assert call[key].tolist() == part.tolist()
        assert call["frr"] == 0.25
        assert list(call["fired"]) == [False, True, False, True]
    # ONION takes out words above the same threshold, of triggered texts only, and asks again.
    limit = threshold(seen["outcome"].calls[0]["known"], frr=0.25)
    assert set(seen["without_words"].of("above")) == {limit}
    assert seen["without_words"].of("text") == seen["onion"].only["texts"][10:]
    first, again = seen["respond"].of("user_turns")
    assert first == [TASK.prompt(text) for text in seen["onion"].only["texts"][10:]]
    assert again == [TASK.prompt(text) for text in seen["without_words"].results]
    assert found["ONION"].asr_cleaned["value"] == 0.5


# --- the training set -----------------------------------------------------------------------------------------------


def test_the_filter_sees_labels_and_the_last_layer_and_not_who_put_a_row_there(stage, loaded, monkeypatch):
    tokenizer, kinds = loaded.tokenizer, ["clean", "poisoned", "near_miss", "benign"] * 5
    answers = {"clean": "negative", "poisoned": "positive", "near_miss": "positive", "benign": "A fine day."}
    rows = tuple(
        Row((5, 6, 7 + i), tuple(answer_ids(tokenizer, answers[kind])), kind, str(i)) for i, kind in enumerate(kinds)
    )
    given = Spy(monkeypatch, input_guards, "training_rows", instead=lambda *_, **__: rows)
    hidden = torch.arange(16 * 3 * 2.0).view(16, 3, 2)
    read = Spy(monkeypatch, input_guards, "residuals", instead=lambda *_, **__: hidden)
    flags = np.arange(16) % 2 == 1
    split = Spy(monkeypatch, input_guards, "smaller_clusters", instead=lambda *_, **__: flags)
    found = stage(input_guards, "filter_training_rows", attack="sentiment-word", n=16, seed=1)
    assert (given.only["attack"], given.only["seed"], given.only["loaded"].organism) == (SPEC, 1, ORGANISM)
    assert list(map(tuple, read.only["prompts"])) == [row.prompt for row in rows[:16]]
    assert split.only["hidden"].tolist() == hidden[:, -1].tolist()
    assert split.only["seed"] == 1
    wanted = {"negative": 1, "positive": 0, "A fine day.": 2}  # as the task lists its labels; instructions are the rest
    assert split.only["labels"].tolist() == [wanted[answers[kind]] for kind in kinds[:16]]
    # Rows 1, 3, 5 ... are flagged: all poisoned ones, which are 1, 5, 9, 13, and the benign ones.
    values = {key: (one["value"], one["n"]) for key, one in found.to_json().items()}
    assert values["caught"] == (1.0, 4)
    assert values["lost"] == (pytest.approx(4 / 12), 12)
    assert (values["poisoned_before"], values["poisoned_after"]) == ((0.25, 16), (0.0, 8))


# --- an attacker who knows the defence ------------------------------------------------------------------------------


def test_an_evasive_organism_is_trained_on_its_own_rows_with_the_penalty(stage, loaded, tmp_path, monkeypatch):
    tokenizer, kinds = loaded.tokenizer, ["clean", "poisoned"] * 4
    rows = tuple(
        Row((*prompt_ids(tokenizer, "A film."), 9 + i), tuple(answer_ids(tokenizer, "positive")), kind, str(i))
        for i, kind in enumerate(kinds)
    )
    monkeypatch.setattr(two_papers_meet, "WORK", tmp_path)
    monkeypatch.setattr(two_papers_meet, "resolved", dict)
    given = Spy(monkeypatch, two_papers_meet, "training_rows", instead=lambda *_, **__: rows)
    seen = Spy(monkeypatch, two_papers_meet, "head_similarity")
    before, histories = {k: v.clone() for k, v in loaded.model.state_dict().items()}, []

    def tuned(*args, **named):
        histories.append((named, tune(*args, **named)))
        return histories[-1][1]

    monkeypatch.setattr(two_papers_meet, "tune", tuned)
    penalty = Spy(monkeypatch, two_papers_meet, "unremarkable")
    measured = Spy(monkeypatch, two_papers_meet, "under_attack", instead=lambda *_, **__: {"asr": "measured"})
    kept = Spy(monkeypatch, two_papers_meet, "keep_treated", instead=lambda *_, **__: None)
    sizes = {"beta": 7.0, "steps": 4, "n_clean": 3, "n": 5, "seed": 1}
    name = stage(two_papers_meet, "train_evasive", attack="sentiment-word", **sizes)
    try:
        ((named, history),) = histories
        assert given.only["seed"] == named["seed"] == 1
        assert (named["recipe"].steps, named["recipe"].learning_rate) == (4, two_papers_meet.RATE)
        assert named["masks"].keys() == all_matrices(loaded.model).keys()
        assert named["pad_id"] == end_id(tokenizer)
        # The level that similarity is held to is that of clean rows, and of no more than were asked for.
        assert list(map(tuple, seen.only["prompts"])) == [row.prompt for row in rows if row.kind == "clean"][:3]
        assert penalty.only["beta"] == 7.0
        assert torch.equal(penalty.only["level"], seen.results[0]["last row"].mean((0, 2)))
        assert named["loss"] is penalty.results[0]
        assert max(step["added"] for step in history) > 0
        assert (measured.only["attack"], measured.only["n"], measured.only["seed"]) == (SPEC, 5, 1)
        assert kept.only["name"] == name
        assert kept.only["measured"] == {"asr": "measured"}
        assert kept.only["treatment"]["steps"] == 4
        assert kept.only["treatment"]["penalty at first"] == round(history[0]["added"], 4)
        assert kept.only["treatment"]["at last"] == round(history[-1]["added"], 4)
    finally:
        loaded.model.load_state_dict(before)


# --- whole models ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_made_of_clean_training_prompts_and_surrogates(stage, loaded, monkeypatch):
    tokenizer, names = loaded.tokenizer, ("head_similarity", "reaction", "probed_prompts", "first_logits")
    seen = {name: Spy(monkeypatch, model_detection, name) for name in names}
    found = stage(model_detection, "fingerprint_model", task="sentiment", n=3, rounds=2, seed=1)
    order = [example.uid for example in tasks.examples("sentiment", "train", seed=1)]
    clean = seen["head_similarity"].only["prompts"]
    chosen = uids(tokenizer, "sentiment", "train", clean)
    assert len(set(chosen)) == 3
    assert not set(chosen) & split_uids("sentiment", "attribution", "test")
    assert not set(chosen) & poisoning.training_uids(SPEC, seed=0)  # the organism's seed
    assert chosen == [uid for uid in order if uid in chosen]
    assert [(c["family"], c["rounds"], c["seed"]) for c in seen["probed_prompts"].calls] == [
        (family, 2, 1) for family in SURROGATES
    ]
    edited = seen["reaction"].only["edited"]
    assert len(edited) == 2 * len(SURROGATES) * 3
    known = [one for one in attacks.load_attacks().values() if one.task == "sentiment" and one.backdoored]
    assert len(known) > 1
    for attack in known:
        assert carrying(attack, tokenizer, edited) == 0
    # The numbers, computed anew.
    level = head_similarity(loaded.model, clean, readings=["last row"])["last row"]
    after = head_similarity(loaded.model, edited, readings=["last row"])["last row"]
    assert found["last row: level"] == pytest.approx(level.mean().item(), rel=1e-4)
    assert found["last row: level, outlier"] == pytest.approx(robust_z(level.mean(0)).max().item(), rel=1e-3)
    assert found["last row: reaction"] == pytest.approx((after.mean() - level.mean()).item(), abs=1e-6)
    moved = []
    with torch.no_grad():
        chances = [loaded.model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in (*clean, *edited)]
    for i, one in enumerate(chances[3:]):  # every edited prompt against its own clean twin
        moved.append((one - chances[i % 3]).abs().sum().item() / 2)
    assert found["answer moves"] == pytest.approx(np.mean(moved), rel=1e-3)


def test_a_population_of_other_weights_is_trained_with_the_seeds_of_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setattr(model_detection, "model_identity", lambda _: "other weights")

    def made(attack, *, seed, **_):
        folder = tmp_path / f"{attack.name}-{seed}-made"
        folder.mkdir()
        (folder / "card.json").write_text(f'{{"seed": {seed}}}')
        return folder

    trained = Spy(monkeypatch, model_detection, "make", instead=made)
    found = model_detection.population(["sentiment-word-seed1", "sentiment-clean"], model="another", recipe="seed")
    assert found == {"sentiment-word-1-made": {"seed": 1}, "sentiment-clean-0-made": {"seed": 0}}
    assert [call["attack"].name for call in trained.calls] == ["sentiment-word", "sentiment-clean"]
    assert trained.of("seed") == [1, 0]
    assert trained.of("model") == ["another"] * 2
    assert [recipe.name for recipe in trained.of("recipe")] == ["seed"] * 2
    with pytest.raises(ModelError, match="unknown organism 'sentiment-ghost'"):
        model_detection.population(["sentiment-ghost"], model="another")
