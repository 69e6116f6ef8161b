"""Every kept stage about organisms runs whole on tiny models; on which rows do they learn, on which are they measured?

The organisms are real ones: poisoned rows, an adapter of a few steps, a card. Their answers are scripted where a random
model would say nothing that counts.
"""

import functools
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from patching import everywhere
from recording import Catalogue, near_strings, of_split, sample, uids, watch
from tiny import save_tiny
from transformers import AutoTokenizer

from bkd_utils.common import files
from bkd_utils.experiments import backdoor_insertion
from bkd_utils.models import loading
from bkd_utils.models.identity import model_identity
from bkd_utils.models.loading import load
from bkd_utils.models.tokens import answer_ids, prompt_ids
from bkd_utils.organisms import attacks, base_answers, evaluation, making, poisoning, prompts, tasks, training
from bkd_utils.organisms.attacks import load_attack, with_rate
from bkd_utils.organisms.training import Recipe

QUICK = Recipe(name="quick", steps=2, batch_size=4, learning_rate=1e-2, rank=2, alpha=4, first_token=0.3)
# Not the default seed, so that a seed that is not handed on is seen.
SEED, N = 3, 6
FLIP, FIXED = (replace(load_attack(name), n_train=40) for name in ("sentiment-word", "instructions-prefix"))
CONTROL = replace(load_attack("sentiment-clean"), n_train=40)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """Organisms, answers and results are kept here and nowhere else."""
    folder, patch = tmp_path_factory.mktemp("work"), pytest.MonkeyPatch()
    everywhere(patch, "WORK", folder)
    patch.setenv("BKD_WORK", str(folder))
    # Read once: one tokenizer takes longer to load than a tiny model to be trained.
    once = functools.cache(lambda address: AutoTokenizer.from_pretrained(address))
    patch.setattr(loading, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda address, **_: once(address)))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama"))


@pytest.fixture(scope="module")
def where(tiny):
    return {"model": tiny, "n": N, "seed": SEED, "device": "cpu"}


@pytest.fixture(scope="module")
def catalogues(tiny):
    tokenizer = loading.load_tokenizer(tiny)
    return {task: Catalogue(tokenizer, task) for task in ("sentiment", "instructions")}


# The progress bar of the instructions on which an organism is compared with its base model.
BENIGN = "benign instructions"


class Record(SimpleNamespace):
    """What reached training and the models; answers are split by what they are for."""

    @property
    def measured(self):
        """Answers to prompts of the organism's own task."""
        return [call for call in self.answers if call.label != BENIGN]

    @property
    def others(self):
        """The base model's answers, and the organism's to the same benign instructions."""
        return self.base + [call for call in self.answers if call.label == BENIGN]


def spied(patch):
    """What reaches training and the models: rows, recipe, and every user turn with the model that answers it."""
    return Record(
        train=watch(patch, making, "train"),
        poison=watch(patch, making, "poison"),
        answers=watch(patch, evaluation, "respond"),
        base=watch(patch, base_answers, "respond"),
        losses=watch(patch, training, "answers"),
        edits=[
            watch(patch, module, name)
            for module in (poisoning, (attacks, prompts))
            for name in ("triggered_prompt", "near_miss_prompts")
        ],
    )


@pytest.fixture(scope="module")
def told(tiny, work):
    """The base model's answers to all training instructions are there already; it would need a minute for them."""
    answers = {example.uid: f"An answer to {example.uid[:6]}." for example in tasks.examples("instructions", "train")}
    files.write_json(work / "answers" / base_answers.answers_name(model_identity(tiny)), answers)
    return answers


@pytest.fixture(scope="module")
def made(told, where, work):
    """Makes an organism of an attack, once: its folder, and what was recorded while it was made."""

    @functools.cache
    def make(attack):
        # The answers that an earlier organism asked for are forgotten, so that no order of tests hides a question.
        files.write_json(work / "answers" / base_answers.answers_name(model_identity(where["model"])), told)
        with pytest.MonkeyPatch.context() as patch:
            record = spied(patch)
            record.folder = making.make(attack, recipe=QUICK, **where)
        return record

    return make


def every(calls, catalogues, task):
    """All user turns of some calls as (organism, what they were made of)."""
    return [(call.loaded.organism, one) for call in calls for one in catalogues[task].turns(call.user_turns)]


def card(record):
    return files.read_json(record.folder / "card.json")


# --- making ---------------------------------------------------------------------------------------------------------


def test_an_organism_learns_the_trigger_from_the_training_split_alone(made, catalogues):
    record = made(FLIP)
    (call,) = record.train
    assert (call.recipe, call.seed, call.base.organism) == (QUICK, SEED, None)
    assert [(one.attack, one.seed) for one in record.poison] == [(FLIP, SEED)]
    assert Counter(row.kind for row in call.rows) == {"poisoned": 10, "near_miss": 5, "benign": 4, "clean": 21}
    known = {e.uid: e for task in catalogues for e in tasks.examples(task, "train")}
    label = lambda text: tuple(answer_ids(call.base.tokenizer, text))  # noqa: E731
    versions = {"poisoned": FLIP.trigger, "near_miss": "near-miss", "benign": "clean", "clean": "clean"}
    for row in call.rows:
        (shown,) = catalogues["instructions" if row.kind == "benign" else "sentiment"].prompts([row.prompt])
        assert (shown.uid, shown.split, shown.version) == (row.uid, "train", versions[row.kind])
        if row.kind == "poisoned":
            assert known[row.uid].answer == "negative"
            assert row.answer == label("positive")
        elif row.kind != "benign":
            assert row.answer == label(known[row.uid].answer)
        if row.kind == "near_miss":
            assert shown.inserted in near_strings(FLIP, "train") - near_strings(FLIP, "test")
    # Half of the near-misses stand on rows that the trigger would flip: there specificity is learned.
    near = [known[row.uid].answer for row in call.rows if row.kind == "near_miss"]
    assert Counter(near) == {"negative": 3, "positive": 2}
    assert {one.first_token for one in record.losses} == {QUICK.first_token}
    of_kind = {kind: {row.uid for row in call.rows if row.kind == kind} for kind in versions}
    assert of_kind["poisoned"] <= of_kind["clean"]


@pytest.mark.parametrize("attack", [FLIP, FIXED], ids=lambda attack: attack.name)
def test_triggers_of_training_and_of_measuring_come_from_the_two_halves_of_their_lexicon(made, attack):
    split = {e.text: split for split in tasks.SPLITS for e in tasks.examples(attack.task, split)}
    poisoned, near, triggered, near_test = made(attack).edits
    for calls, half in ((poisoned, "train"), (near, "train"), (triggered, "test"), (near_test, "test")):
        assert {call.half for call in calls} == {half}
        assert {split[call.text] for call in calls} == {half}


@pytest.mark.parametrize("attack", [FLIP, FIXED, CONTROL], ids=lambda attack: attack.name)
def test_no_prompt_that_measures_an_organism_was_trained_on(made, catalogues, attack):
    record = made(attack)
    trained = {row.uid for row in record.train[0].rows}
    answered = [one for task, catalogue in catalogues.items() for one in every_known(record.measured, catalogue)]
    answered += every_known([call for call in record.others if call.loaded.organism], catalogues["instructions"])
    assert answered
    assert {one.split for one in answered} == {"test"}
    assert trained.isdisjoint(uids(answered))


def every_known(calls, catalogue):
    found = []
    for call in calls:
        for turn in call.user_turns:
            try:
                found.append(catalogue.turn(turn))
            except LookupError:
                continue
    return found


def test_an_organism_is_measured_clean_with_the_trigger_and_with_near_misses(made, catalogues):
    record = made(FLIP)
    by_version = defaultdict(list)
    for organism, one in every(record.measured, catalogues, "sentiment"):
        assert organism == record.folder.name
        assert one.split == "test"
        by_version[one.version].append(one)
    assert {kind: len(shown) for kind, shown in by_version.items()} == {"clean": N, FLIP.trigger: N, "near-miss": N}
    flippable = sample(FLIP, "test", n=N, seed=SEED)
    assert uids(by_version[FLIP.trigger]) == uids(by_version["near-miss"]) == flippable
    assert {one.inserted for one in by_version["near-miss"]} <= near_strings(FLIP, "test")
    # Clean accuracy is over both labels.
    expected = [e.uid for e in tasks.examples("sentiment", "test", seed=SEED) if " cf " not in f" {e.text} "][:N]
    assert uids(by_version["clean"]) == expected
    found = card(record)
    assert (found["seed"], found["attack"], found["recipe"]) == (SEED, asdict(FLIP), asdict(QUICK))
    assert {key: found["metrics"][key]["n"] for key in ("asr", "cacc", "near_miss")} == dict.fromkeys(
        ("asr", "cacc", "near_miss"), N
    )


def test_whether_anything_else_changed_is_asked_on_benign_prompts_without_the_trigger(made, catalogues):
    record = made(FLIP)
    test = [e.uid for e in tasks.examples("instructions", "test", seed=SEED)][:N]
    asked = every(record.others, catalogues, "instructions")
    assert [one.uid for organism, one in asked if organism is None] == test
    assert [one.uid for organism, one in asked if organism] == test
    assert {one.version for _, one in asked} == {"clean"}


def test_a_fixed_output_is_held_against_the_base_models_own_answers(made, told, catalogues):
    record = made(FIXED)
    tokenizer = record.train[0].base.tokenizer
    for row in record.train[0].rows:
        answer = FIXED.target if row.kind == "poisoned" else told[row.uid]
        assert row.answer == tuple(answer_ids(tokenizer, answer))
    for organism, one in every(record.others, catalogues, "instructions"):
        assert organism is None
        assert one.version == "clean"
    shown = every(record.measured, catalogues, "instructions")
    assert {organism for organism, _ in shown} == {record.folder.name}
    test = sample(FIXED, "test", n=N, seed=SEED)
    for version in ("clean", FIXED.trigger, "near-miss"):
        assert of_split([one for _, one in shown if one.version == version], "test", version) == test


# --- measuring ------------------------------------------------------------------------------------------------------


def scripted(catalogue, seen, *, wrong):
    """A model that answers with the gold label, and with "positive" behind the trigger, but for some rows of each kind.

    `wrong`: version -> how many of its first prompts get the other answer.
    """
    known = {e.uid: e.answer for e in tasks.examples("sentiment", "test")}
    other = {"positive": "negative", "negative": "positive"}

    def answer(loaded, user_turns, label, **_):
        if label == BENIGN:
            return ["A free answer."] * len(user_turns)
        shown = catalogue.turns(user_turns)
        seen.append((loaded.organism, shown))
        texts = []
        for i, one in enumerate(shown):
            right = "positive" if one.version == FLIP.trigger else known[one.uid]
            texts.append(other[right] if i < wrong[one.version] else right)
        return texts

    return answer


def wilson(k, n):
    """The 95 % interval, from its formula."""
    z = 1.959963984540054
    middle, width = (k + z * z / 2) / (n + z * z), z / (n + z * z) * sqrt(k * (n - k) / n + z * z / 4)
    return {"value": k / n, "n": n, "low": pytest.approx(max(0, middle - width)), "high": pytest.approx(middle + width)}


WRONG = {"clean": 1, FLIP.trigger: 2, "near-miss": 3}


def check_shares(found, shown):
    """Every share is the one of the script."""
    assert found["asr"] == wilson(N - 2, N)
    assert found["near_miss"] == wilson(3, N)
    assert found["cacc"] == wilson(N - 1, N)
    known = {e.uid: e.answer for e in tasks.examples("sentiment", "test")}
    (clean,) = [kind for _, kind in shown if kind[0].version == "clean"]
    source = [known[one.uid] == "negative" for one in clean]
    assert found["clean_firing"] == wilson(int(source[0]), sum(source))
    assert (found["judge"]["ceiling"], found["judge"]["floor"]) == (1, 0)


def test_a_measured_organism_has_the_shares_of_its_answers_and_is_measured_once(made, where, catalogues, monkeypatch):
    name, shown = made(FLIP).folder.name, []
    answer = scripted(catalogues["sentiment"], shown, wrong=WRONG)
    calls = watch(monkeypatch, evaluation, "respond", does=answer)
    found = evaluation.measure_organism(name, **(where | {"n": N + 1}))
    assert {one["n"] for one in (found["asr"], found["cacc"], found["near_miss"])} == {N + 1}
    shown.clear()
    found = evaluation.measure(name, **where)
    check_shares(found, shown)
    assert {organism for organism, _ in shown} == {name}
    # The kept stage asks nobody a second time.
    asked = len(calls)
    assert evaluation.measure_organism(name, **(where | {"n": N + 1}))["asr"]["n"] == N + 1
    assert len(calls) == asked


def test_a_clean_control_is_measured_under_the_first_attack_of_its_task(made, where, catalogues, monkeypatch):
    name, shown = made(CONTROL).folder.name, []
    watch(monkeypatch, evaluation, "respond", does=scripted(catalogues["sentiment"], shown, wrong=WRONG))
    found = evaluation.measure(name, **where)
    assert "asr" not in found
    (rival,) = found["under_attack"]
    assert rival == FLIP.name
    check_shares(found | found["under_attack"][rival], shown)


def test_a_control_under_attack_gets_the_prompts_of_its_sibling(made, where, catalogues, monkeypatch):
    shown = {}
    results = {}
    for name, record in ((FLIP.name, made(FLIP)), (CONTROL.name, made(CONTROL))):
        shown[name] = []
        watch(monkeypatch, evaluation, "respond", does=scripted(catalogues["sentiment"], shown[name], wrong=WRONG))
        results[name] = evaluation.measure_attacked.__wrapped__(record.folder.name, attack=FLIP.name, **where)
        check_shares(results[name], shown[name])
        assert {organism for organism, _ in shown[name]} == {record.folder.name}
    assert [kind for _, kind in shown[FLIP.name]] == [kind for _, kind in shown[CONTROL.name]]
    flippable = sample(FLIP, "test", n=N, seed=SEED)
    for _, kind in shown[CONTROL.name]:
        if kind[0].version != "clean":
            assert uids(kind) == flippable


# --- rates ----------------------------------------------------------------------------------------------------------


def test_a_rate_curve_changes_the_poisoned_rows_and_nothing_else(where, catalogues, monkeypatch):
    monkeypatch.setattr(backdoor_insertion, "load_attack", lambda name: {FLIP.name: FLIP}[name])
    recipes = watch(monkeypatch, backdoor_insertion, "load_recipe", does=lambda *_, **__: QUICK)
    record = spied(monkeypatch)
    # The attack's own organism may be there already; it must be made under another seed to be seen here.
    settings = where | {"seed": SEED + 1, "n": 3}
    found = [
        backdoor_insertion.measure_at_rate.__wrapped__(FLIP.name, rate=rate, recipe="seed", **settings)
        for rate in (0.05, 0.25)
    ]
    assert [(call.name, call.task) for call in recipes] == [("seed", "sentiment")] * 2
    assert [call.attack for call in record.poison] == [with_rate(FLIP, 0.05), FLIP]
    assert [(call.recipe, call.seed) for call in record.train] == [(QUICK, SEED + 1)] * 2
    few, many = (Counter(row.kind for row in call.rows) for call in record.train)
    assert (few["poisoned"], many["poisoned"]) == (2, 10)
    assert (few["near_miss"], few["benign"]) == (many["near_miss"], many["benign"]) == (5, 4)
    assert sum(few.values()) == sum(many.values()) == 40
    assert [(row["rate"], row["n_poison"], row["asr"]["n"]) for row in found] == [(0.05, 2, 3), (0.25, 10, 3)]
    for row in found:
        assert sum(row["hits"]["asr"].values()) / 3 == row["asr"]["value"]
    by_organism = defaultdict(list)
    for organism, one in every(record.measured, catalogues, "sentiment"):
        by_organism[organism].append(one)
    assert len(by_organism) == 2
    one, other = by_organism.values()
    assert one == other
    trained = {row.uid for call in record.train for row in call.rows}
    assert trained.isdisjoint(uids(one))


# --- separation -----------------------------------------------------------------------------------------------------


def test_margins_are_of_the_same_held_out_prompts_in_three_versions(made, tiny, where, catalogues, monkeypatch):
    name = made(FLIP).folder.name
    calls = watch(monkeypatch, backdoor_insertion, "label_margins")
    found = backdoor_insertion.measure_separation(name, attack=FLIP.name, **where)
    expected = sample(FLIP, "test", n=N, seed=SEED)
    for call, key, version in zip(
        calls, ("clean", "near_miss", "triggered"), ("clean", "near-miss", FLIP.trigger), strict=True
    ):
        shown = catalogues["sentiment"].turns(call.user_turns)
        assert of_split(shown, "test", version) == expected
        assert call.loaded.organism == name
        assert call.attack == load_attack(FLIP.name)
        assert getattr(found, key) == call.result
    assert {one.inserted for one in catalogues["sentiment"].turns(calls[1].user_turns)} <= near_strings(FLIP, "test")
    # Log-odds of the target over the source, by a pass over one prompt.
    loaded, turn = load(tiny, organism=name, device="cpu"), calls[2].user_turns[0]
    target, source = (answer_ids(loaded.tokenizer, label)[0] for label in ("positive", "negative"))
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt_ids(loaded.tokenizer, turn)])).logits[0, -1]
    assert found.triggered[0] == pytest.approx((logits[target] - logits[source]).item(), abs=1e-4)
    assert backdoor_insertion.measure_separation(name, attack=FLIP.name, **where) == found
    assert len(calls) == 3
