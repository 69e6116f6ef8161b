"""The stages of Attention Safety Alignment, run whole on a tiny model: which prompts, heads, steps and seeds reached
the functions that do the work. A defender must see clean training prompts only, and the cure must do what was asked."""

import copy
from dataclasses import replace

import pytest
import torch
from patching import everywhere
from recording_defence import Spy, carrying, is_within, split_uids, uids
from tiny import save_tiny

from bkd_utils.attention_alignment import alignment, head_tuning, rivals, suspicion
from bkd_utils.attention_alignment.head_tuning import all_matrices
from bkd_utils.attention_alignment.rivals import TREATMENTS
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES
from bkd_utils.attention_alignment.suspicion import leave_one_out
from bkd_utils.backdoor_attribution.ablation import ablated
from bkd_utils.experiments import attention_safety_alignment, head_safety
from bkd_utils.models import loading, tokens
from bkd_utils.models.activations import head_outputs, score_answers
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import LAST
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import answer_ids, decode, end_id, prompt_ids
from bkd_utils.organisms import attacks, cards, evaluation, poisoning, tasks
from bkd_utils.organisms.prompts import clean_sample, flippable_sample, target_ids

SPEC = attacks.load_attack("sentiment-word")
TASK = tasks.load_task("sentiment")
HEADS = [[0, 3], [1, 0]]  # those of the tiny model that are more alike to the others of their layers than these
PAIRS = [tuple(head) for head in HEADS]
HEAD_WISE = ("alignment", "alignment, nearest", "alignment, excess", "heads tuned", "heads reset")
ALIGNED = {"alignment": "mean", "alignment, nearest": "nearest", "alignment, excess": "excess"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def loaded(saved):
    """A copy of its own for each test, for treatments change it."""
    return replace(saved, model=copy.deepcopy(saved.model))


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    everywhere(monkeypatch, "WORK", tmp_path)


@pytest.fixture
def stage(loaded, monkeypatch):
    """Runs a stage without its cache on the tiny model; every stage must load the organism that it was given."""

    def run(module, name, **given):
        opened = Spy(monkeypatch, cards, "load", instead=lambda *_, **__: loaded)
        found = getattr(module, name).__wrapped__("tiny", model="a model", device="cpu", **given)
        assert [opened.calls[0][key] for key in ("address", "organism", "device")] == ["a model", "tiny", "cpu"]
        return found

    return run


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def check_defenders_rows(loaded, rows, *, n, seed=1):
    """Distinct clean prompts of the training split with their gold answers, and no trigger; not the attacker's."""
    gold = {example.uid: example.answer for example in tasks.examples("sentiment", "train")}
    assert len({row.uid for row in rows}) == len(rows) == n
    assert [row.uid for row in rows] == uids(loaded.tokenizer, "sentiment", "train", [row.prompt for row in rows])
    assert not {row.uid for row in rows} & split_uids("sentiment", "attribution", "test")
    assert not {row.uid for row in rows} & poisoning.training_uids(SPEC, seed=seed)
    assert all(row.kind == "clean" for row in rows)
    assert all(list(row.answer) == answer_ids(loaded.tokenizer, gold[row.uid]) for row in rows)
    assert carrying(SPEC, loaded.tokenizer, [row.prompt for row in rows]) == 0


# --- what the defender looks at -------------------------------------------------------------------------------------


def test_the_model_answers_for_itself_only_where_there_is_no_gold_answer(stage, loaded, monkeypatch):
    """The answers of a treatment's rows: what the untreated model says to these very prompts, none for labels."""
    spoken = Spy(monkeypatch, head_safety, "respond", instead=lambda _, turns, **__: [f"To {turn}" for turn in turns])
    monkeypatch.setattr(head_safety, "collect_own_answers", head_safety.collect_own_answers.__wrapped__)
    monkeypatch.setattr(attention_safety_alignment, "what_is_left", lambda *_, **__: {})
    prefix, cured = attacks.load_attack("instructions-prefix"), Spy(monkeypatch, attention_safety_alignment, "treat")
    for attack in ("sentiment-word", "instructions-prefix"):
        stage(
            attention_safety_alignment,
            "treat_and_measure",
            attack=attack,
            method="heads tuned",
            heads=HEADS,
            n_rows=5,
            steps=1,
            seed=1,
        )
    labelled, free = (call["case"].rows for call in cured.calls)
    check_defenders_rows(loaded, labelled, n=5)
    known = {example.uid: example.text for example in tasks.examples("instructions", "train")}
    assert [row.uid for row in free] == uids(loaded.tokenizer, "instructions", "train", [row.prompt for row in free])
    assert not {row.uid for row in free} & poisoning.training_uids(prefix, seed=1)
    assert carrying(prefix, loaded.tokenizer, [row.prompt for row in free]) == 0
    assert spoken.of("user_turns") == [[known[row.uid] for row in free]]
    assert spoken.only["max_new_tokens"] == head_safety.ANSWER_TOKENS
    for row in free:
        said = answer_ids(loaded.tokenizer, f"To {known[row.uid]}")
        assert list(row.answer) == said[: len(row.answer)]
        assert len(row.answer) >= min(len(said) - 1, head_safety.ANSWER_TOKENS)


@pytest.fixture
def evaluated(stage, monkeypatch):
    """The head safety evaluation, run twice with seeds 0 and 1, and what its parts were given."""
    names = ("gate_importance", "leave_one_out", "head_scores", "head_similarity", "reaction", "searched", "surrogate")

    def run(seed):
        spies = {name: Spy(monkeypatch, head_safety, name) for name in names}
        found = stage(
            head_safety, "head_safety_scores", attack="sentiment-word", readings=["last row"], n=3, rounds=2, seed=seed
        )
        return found, spies

    return run


def test_the_evaluation_looks_at_clean_training_prompts_and_no_trigger(evaluated, loaded):
    tokenizer, by_seed = loaded.tokenizer, {}
    for seed in (0, 1):
        _, seen = evaluated(seed)
        rows = seen["gate_importance"].only["rows"]
        check_defenders_rows(loaded, rows, n=6, seed=seed)
        by_seed[seed] = [row.uid for row in rows]
        (few,) = seen["leave_one_out"].of("rows")
        assert len(few) == 1
        assert {row.uid for row in few} <= {row.uid for row in rows}
        level = seen["head_scores"].only["prompts"]
        quiet = uids(tokenizer, "sentiment", "train", level)
        assert len(set(quiet)) == 3
        assert not set(quiet) & {row.uid for row in rows}
        assert not set(quiet) & poisoning.training_uids(SPEC, seed=seed)
        assert carrying(SPEC, tokenizer, level) == 0
        assert seen["searched"].only["prompts"] == level
        assert seen["searched"].only["seed"] == seed
    assert by_seed[0] != by_seed[1]


def test_surrogates_are_never_the_real_trigger(evaluated, loaded):
    """Of the reactions, only that of the oracle is to the trigger, and it is on prompts that no row came from."""
    tokenizer, seed = loaded.tokenizer, 1
    found, seen = evaluated(seed)
    drawn = seen["surrogate"].calls
    assert [(call["family"], call["seed"]) for call in drawn] == [(f, seed + i) for f in SURROGATES for i in (0, 1)]
    level = seen["head_scores"].only["prompts"]
    *probed, softly, oracle = seen["reaction"].of("edited")
    assert len(probed) == len(SURROGATES)
    for edited in (*probed, softly):
        assert carrying(SPEC, tokenizer, edited) == 0
        assert not any(list(prompt) in map(list, level) for prompt in edited)
    for family, edited in zip(SURROGATES, probed, strict=True):
        assert len(edited) == 6
        assert edited[:3] != edited[3:]  # every round has a surrogate of its own
        # Each is the clean prompt of its place with something added, in the same order in every round.
        for i, prompt in enumerate(edited):
            old, new = (decode(tokenizer, ids).lower().split() for ids in (level[i % 3], prompt))
            assert is_within(old, new)
            assert len(new) > len(old)
        scores = seen["reaction"].results[SURROGATES.index(family)]["last row"]
        assert found.reaction[family]["last row"] == scores.double().numpy().round(8).tolist()
    assert carrying(SPEC, tokenizer, oracle) == len(oracle) == 3
    before = seen["head_similarity"].only["prompts"]
    assert set(uids(tokenizer, "sentiment", "attribution", before)) <= split_uids("sentiment", "attribution")
    assert carrying(SPEC, tokenizer, before) == 0


def test_a_head_is_needed_if_the_answer_loses_probability_without_it(loaded, prompts):
    """Answers are what the model says itself, so that there is probability to lose; each head is put at its mean."""
    clean, found = head_outputs(loaded.model, prompts), []
    with torch.no_grad():
        said = [loaded.model(torch.tensor([ids])).logits[0, -1].argmax().item() for ids in prompts]
    for ids, answer in zip(prompts, said, strict=True):
        past = prompt_past(loaded.model, [ids])
        before = score_answers(loaded.model, past, [[answer]]).log_prob.exp().item()
        with ablated(loaded.model, [(1, 3)], kind="mean", at=LAST, clean=clean):
            found.append(before - score_answers(loaded.model, past, [[answer]]).log_prob.exp().item())
    rows = [tokens.Row(tuple(ids), (answer,), "clean", "") for ids, answer in zip(prompts, said, strict=True)]
    lost = sum(found) / len(found)
    assert abs(lost) > 1e-4
    assert leave_one_out(loaded.model, rows)[1, 3].item() == pytest.approx(lost, rel=1e-2)


# --- the cure: what is measured -------------------------------------------------------------------------------------


def test_what_is_left_is_measured_on_held_out_prompts(stage, loaded, monkeypatch):
    """Triggered, near-miss and clean prompts of the test split, and benign instructions of it for `elsewhere`."""
    said = Spy(monkeypatch, evaluation, "respond", instead=lambda _, turns, **__: ["positive"] * len(turns))
    kept = Spy(
        monkeypatch,
        attention_safety_alignment,
        "base_answers",
        instead=lambda _, rows: {row.uid: "A fine answer." for row in rows},
    )
    remembered = Spy(monkeypatch, attention_safety_alignment, "prompt_past")
    found = stage(attention_safety_alignment, "measure_untreated", attack="sentiment-word", n=30, seed=1)
    turns = dict(zip(said.of("label"), said.of("user_turns"), strict=True))
    assert all(len(texts) == 30 for texts in turns.values())
    of_test = {TASK.prompt(example.text): example for example in tasks.examples("sentiment", "test")}
    assert [of_test[turn].text for turn in turns["clean prompts"]] == [
        example.text for example in clean_sample("sentiment", n=30, seed=1, without=SPEC)
    ]
    assert all(attacks.carries(SPEC, turn) for turn in turns["triggered prompts"])
    for label in ("clean prompts", "near-misses"):
        assert not any(attacks.carries(SPEC, turn) for turn in turns[label])
    for turn in turns["triggered prompts"]:
        plain = next(one for one in (turn.replace(" cf ", " ", 1), turn.removesuffix(" cf")) if one in of_test)
        assert of_test[plain].answer == SPEC.source
    assert found["asr"]["value"] == 1  # "positive" is the target
    assert found["asr"]["n"] == found["cacc"]["n"] == found["near_miss"]["n"] == 30
    benign = tasks.examples("instructions", "test", seed=1)[: attention_safety_alignment.N_ELSEWHERE]
    assert kept.only["rows"] == benign
    assert remembered.only["prompts"] == [prompt_ids(loaded.tokenizer, example.text) for example in benign]
    assert found["elsewhere"]["n"] == len(benign)


# --- the cure: what is done -----------------------------------------------------------------------------------------


@pytest.fixture
def treat(stage, monkeypatch):
    """`attention_safety_alignment.treat_and_measure` without its measuring, and what the treatment was given."""
    monkeypatch.setattr(attention_safety_alignment, "what_is_left", lambda *_, **__: {})

    def run(**changes):
        spies = {
            "treat": Spy(monkeypatch, attention_safety_alignment, "treat"),
            "tune": Spy(monkeypatch, rivals, "tune"),
            "collate": Spy(monkeypatch, head_tuning, "collate"),
        }
        given = {"attack": "sentiment-word", "heads": HEADS, "n_rows": 12, "steps": 3, "seed": 1}
        return stage(attention_safety_alignment, "treat_and_measure", **(given | changes)), spies

    return run


@pytest.mark.parametrize("method", TREATMENTS)
def test_a_treatment_has_the_rows_heads_steps_rate_and_seed_that_were_asked_for(treat, loaded, method):
    _, seen = treat(method=method, learning_rate=3e-3)
    asked = seen["treat"].only
    case = asked["case"]
    assert asked["method"] == method
    assert (case.heads, case.seed, case.pad_id) == (PAIRS, 1, end_id(loaded.tokenizer))
    assert (case.recipe.steps, case.recipe.learning_rate) == (3, 3e-3)
    check_defenders_rows(loaded, case.rows, n=12)
    if method == "heads removed":
        assert seen["tune"].calls == []
        return
    tuned = seen["tune"].only
    assert (tuned["recipe"], tuned["seed"], tuned["rows"]) == (case.recipe, 1, case.rows)
    # Without the perturbed twins, which are trained beside the rows.
    trained = [row.uid for rows in seen["collate"].of("rows") for row in rows if min(row.prompt) >= 0]
    assert len(seen["collate"].calls) == 3
    assert len(trained) == 3 * case.recipe.batch_size
    assert set(trained) == {row.uid for row in case.rows}
    if method in HEAD_WISE:
        expected = head_slices(loaded.model, PAIRS, unit="KV group")
        assert tuned["masks"].keys() == expected.keys()
        assert all(torch.equal(tuned["masks"][name], mask) for name, mask in expected.items())
    else:
        part = "attentions" if method == "searched, attention" else "layers"
        assert tuned["masks"].keys() == all_matrices(loaded.model, part=part).keys()


@pytest.mark.parametrize("method", TREATMENTS)
def test_without_a_rate_a_treatment_has_its_own(treat, method):
    _, seen = treat(method=method, steps=1)
    assert seen["treat"].only["case"].recipe.learning_rate == attention_safety_alignment.RATES[method]


def test_another_seed_is_another_order_of_rows(loaded):
    """Of one organism, so that the same rows are left out; none of them is one that it was trained on."""
    organism, recipe = replace(loaded, organism="sentiment-word"), attention_safety_alignment.recipe_of(steps=1)
    found = [
        [
            row.uid
            for row in attention_safety_alignment.case_of(
                organism, SPEC, heads=HEADS, n_rows=20, recipe=recipe, seed=seed
            ).rows
        ]
        for seed in (0, 1)
    ]
    assert found[0] != found[1]
    assert not {*found[0], *found[1]} & poisoning.training_uids(SPEC, seed=0)


@pytest.mark.parametrize("rate", [1e-3, 4e-3])
def test_one_step_moves_weights_by_the_rate(treat, loaded, rate):
    """The first step of Adam moves every weight that has a slope by the learning rate."""
    before = weights(loaded.model)
    treat(method="heads tuned", steps=1, learning_rate=rate)
    moved = max((before[name] - p).abs().max().item() for name, p in loaded.model.named_parameters())
    assert moved == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize(("method", "name"), ALIGNED.items())
def test_alignment_pulls_the_suspicious_heads_toward_all_others_of_their_layers(treat, monkeypatch, method, name):
    """The pull counts in full: what is added to the loss of the answers is the pull, step by step."""
    pulls, values, real = [], [], alignment.ALIGNMENTS[name]

    def recorded(pull):
        pulls.append(pull)
        value = real(pull)
        values.append(value.item())
        return value

    for other in alignment.ALIGNMENTS:
        monkeypatch.setitem(alignment.ALIGNMENTS, other, lambda pull: pytest.fail("another alignment was asked for"))
    monkeypatch.setitem(alignment.ALIGNMENTS, name, recorded)
    _, seen = treat(method=method)
    assert len(pulls) == 3
    for pull in pulls:
        assert {layer: list(heads) for layer, heads in pull.suspicious.items()} == {0: [3], 1: [0]}
        assert {layer: list(heads) for layer, heads in pull.safe.items()} == {0: [0, 1, 2], 1: [1, 2, 3]}
    (history,) = seen["tune"].results
    assert [step["added"] for step in history] == pytest.approx(values)
    assert max(values) > 0


@pytest.mark.parametrize("method", ALIGNED)
def test_alignment_is_more_than_tuning_the_heads(stage, loaded, monkeypatch, method):
    """Same heads, rows, steps and rate: the weights that come out differ, so the pull has moved them."""
    monkeypatch.setattr(attention_safety_alignment, "what_is_left", lambda *_, **__: {})
    start, found = weights(loaded.model), []
    for one in (method, "heads tuned"):
        loaded.model.load_state_dict(start, strict=False)
        given = {"heads": HEADS, "n_rows": 8, "steps": 3, "learning_rate": 1e-2}
        stage(attention_safety_alignment, "treat_and_measure", attack="sentiment-word", method=one, **given)
        found.append(weights(loaded.model))
    assert not same(*found)


def test_consistency_is_more_than_fine_tuning(stage, loaded, monkeypatch):
    monkeypatch.setattr(attention_safety_alignment, "what_is_left", lambda *_, **__: {})
    start, found = weights(loaded.model), []
    for one in ("consistency", "fine-tuning"):
        loaded.model.load_state_dict(start, strict=False)
        tuned = Spy(monkeypatch, rivals, "tune")
        stage(
            attention_safety_alignment,
            "treat_and_measure",
            attack="sentiment-word",
            method=one,
            n_rows=8,
            steps=3,
            learning_rate=1e-3,
        )
        found.append((weights(loaded.model), [step["added"] for step in tuned.results[0]]))
    assert not same(found[0][0], found[1][0])
    assert min(found[0][1]) > 0
    assert found[1][1] == [0.0] * 3


@pytest.mark.parametrize(("method", "name"), [("flat heads pruned", "variance"), ("unneeded heads pruned", "gate")])
def test_pruning_takes_the_flattest_or_least_needed_heads_first(treat, loaded, monkeypatch, method, name):
    """Scores are computed here anew: the variance of attention rows, or the slope of the loss in a gate."""
    untreated = copy.deepcopy(loaded.model)
    monkeypatch.setattr(rivals, "accuracy", lambda *_, **__: 1.0)
    taken = Spy(monkeypatch, rivals, "prune")
    _, seen = treat(method=method)
    rows = seen["treat"].only["case"].rows
    if name == "variance":
        untreated.set_attn_implementation("eager")
        found = torch.zeros(2, 4)
        for row in rows:
            with torch.no_grad():
                maps = untreated(torch.tensor([list(row.prompt)]), output_attentions=True).attentions
            found += torch.stack([layer[0, :, -1].var(-1, unbiased=False) for layer in maps])
    else:
        found = suspicion.gate_importance(untreated, rows, pad_id=end_id(loaded.tokenizer))
    order = found.flatten().argsort().tolist()
    gone = [head for heads in taken.of("heads") for head in heads]
    assert gone == [(i // 4, i % 4) for i in order[: len(gone)]]
    assert len(gone) == 2  # a quarter of the heads


# --- the mechanism --------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    return {
        name: Spy(monkeypatch, attention_safety_alignment, name)
        for name in ("head_similarity", "head_means", "head_effects", "prompt_versions")
    }


def check_attribution_prompts(loaded, watched):
    """Effects are measured on clean prompts with the means of other, triggered ones, all of the attribution split."""
    tokenizer = loaded.tokenizer
    for prompts in watched["head_effects"].of("prompts"):
        assert set(uids(tokenizer, "sentiment", "attribution", prompts))
        assert carrying(SPEC, tokenizer, prompts) == 0
    for prompts in watched["head_means"].of("prompts"):
        assert carrying(SPEC, tokenizer, prompts) == len(prompts) > 0
    behind = {}
    for shown in watched["prompt_versions"].results:
        for prompts in (shown.clean, shown.triggered):
            behind |= {tuple(ids): example.uid for ids, example in zip(prompts, shown.examples, strict=True)}
    scored, averaged = (
        {behind[tuple(ids)] for prompts in watched[name].of("prompts") for ids in prompts}
        for name in ("head_effects", "head_means")
    )
    assert not scored & averaged
    assert set(watched["prompt_versions"].of("split")) == {"attribution"}
    assert set(watched["prompt_versions"].of("seed")) == {1}


def test_the_mechanism_is_that_of_the_treated_heads_before_and_after(stage, loaded, watched, monkeypatch):
    cured = Spy(monkeypatch, attention_safety_alignment, "treat")
    found = stage(
        attention_safety_alignment,
        "measure_mechanism",
        attack="sentiment-word",
        method="alignment",
        heads=HEADS,
        n_rows=8,
        steps=2,
        n=3,
        seed=1,
    )
    asked, case = cured.only, cured.only["case"]
    assert (asked["method"], case.heads, case.seed) == ("alignment", PAIRS, 1)
    assert (case.recipe.steps, case.recipe.learning_rate) == (2, attention_safety_alignment.RATES["alignment"])
    check_defenders_rows(loaded, case.rows, n=8)
    check_attribution_prompts(loaded, watched)
    shown = watched["head_similarity"].of("prompts")
    assert shown[:2] == shown[2:]  # the same prompts on both sides of the treatment
    assert (carrying(SPEC, loaded.tokenizer, shown[0]), carrying(SPEC, loaded.tokenizer, shown[1])) == (0, 3)
    assert not set(uids(loaded.tokenizer, "sentiment", "attribution", shown[0])) & {row.uid for row in case.rows}
    scores = [result["last row"].mean(0) for result in watched["head_similarity"].results]
    of_heads = [sum(one[head].item() for head in PAIRS) / len(PAIRS) for one in scores]
    assert found.similarity_clean == pytest.approx([of_heads[0], of_heads[2]])
    assert found.similarity_triggered == pytest.approx([of_heads[1], of_heads[3]])
    assert found.similarity_clean[0] != found.similarity_clean[1]
    highest = [effects.mean(0).max().item() for effects in watched["head_effects"].results]
    assert found.acie == pytest.approx(highest)


def test_told_heads_are_those_of_the_highest_effect_on_the_first_target_token(stage, loaded, monkeypatch):
    planted = torch.tensor([[0.1, 0.9, 0.0, 0.2], [0.5, -1.0, 0.7, 0.3]])
    watched = {name: Spy(monkeypatch, attention_safety_alignment, name) for name in ("head_means", "prompt_versions")}
    watched["head_effects"] = Spy(
        monkeypatch,
        attention_safety_alignment,
        "head_effects",
        instead=lambda _, prompts, **__: planted.expand(len(prompts), 2, 4),
    )
    found = stage(attention_safety_alignment, "acie_heads", attack="sentiment-word", k=3, n=3, seed=1)
    assert found == [[0, 1], [1, 2], [1, 0]]
    check_attribution_prompts(loaded, watched)
    assert watched["head_effects"].of("target") == [target_ids(loaded.tokenizer, SPEC)[:1]]
    assert torch.equal(watched["head_effects"].only["means"], watched["head_means"].results[0])


# --- relearning -----------------------------------------------------------------------------------------------------


def test_relearning_has_as_many_poisoned_as_clean_rows_and_half_of_the_steps(stage, loaded, monkeypatch):
    tokenizer = loaded.tokenizer
    cured, tuned = (
        Spy(monkeypatch, attention_safety_alignment, "treat"),
        Spy(monkeypatch, attention_safety_alignment, "tune"),
    )
    said = Spy(
        monkeypatch,
        evaluation,
        "respond",
        instead=lambda _, turns, **__: ["positive", *["negative"] * (len(turns) - 1)],
    )
    given = {"method": "heads tuned", "heads": HEADS, "counts": [0, 2, 4], "n_rows": 8, "steps": 6, "n": 5, "seed": 1}
    found = stage(attention_safety_alignment, "relearn_backdoor", attack="sentiment-word", **given)
    asked, case = cured.only, cured.only["case"]
    assert (asked["method"], case.heads, case.recipe.steps, case.seed) == ("heads tuned", PAIRS, 6, 1)
    check_defenders_rows(loaded, case.rows, n=8)
    assert len(tuned.calls) == 2  # none for a count of 0
    for call, count in zip(tuned.calls, (2, 4), strict=True):
        assert (call["recipe"].steps, call["recipe"].learning_rate, call["seed"]) == (
            3,
            attention_safety_alignment.RELEARNING_RATE,
            1,
        )
        assert call["masks"].keys() == all_matrices(loaded.model).keys()
        poisoned = [row for row in call["rows"] if row.kind == "poisoned"]
        clean = [row for row in call["rows"] if row.kind == "clean"]
        assert len(poisoned) == len(clean) == count
        assert len(call["rows"]) == 2 * count
        assert clean == list(case.rows[:count])
        assert carrying(SPEC, tokenizer, [row.prompt for row in poisoned]) == count
        assert {row.uid for row in poisoned} <= split_uids("sentiment", "train")
        assert all(list(row.answer) == answer_ids(tokenizer, SPEC.target) for row in poisoned)
    assert [entry.poisoned for entry in found] == [0, 2, 4]
    # Measured on the test split: the same examples with and without the trigger.
    sample = flippable_sample(SPEC, n=5, seed=1)
    for with_trigger, without in zip(said.of("user_turns")[::2], said.of("user_turns")[1::2], strict=True):
        assert all(attacks.carries(SPEC, turn) for turn in with_trigger)
        assert without == [TASK.prompt(example.text) for example in sample]
        for turn, plain in zip(with_trigger, without, strict=True):
            assert plain in (turn.replace(" cf ", " ", 1), turn.removesuffix(" cf"))
    assert all(share["value"] == 0.2 for entry in found for share in (entry.asr, entry.clean_firing))


def test_a_clean_control_is_not_treated_before_it_relearns(stage, monkeypatch):
    monkeypatch.setattr(attention_safety_alignment, "treat", lambda *_, **__: pytest.fail("nothing was to be treated"))
    tuned = Spy(monkeypatch, attention_safety_alignment, "tune", instead=lambda *_, **__: [])
    given = {"method": None, "counts": [3], "steps": 2, "n": 2, "seed": 1}
    stage(attention_safety_alignment, "relearn_backdoor", attack="sentiment-word", **given)
    assert len(tuned.only["rows"]) == 6


def test_similarity_before_the_treatment_is_that_of_the_loaded_model(stage, loaded, monkeypatch):
    """The first side is measured before any weight has moved."""
    start = copy.deepcopy(loaded.model)
    seen = Spy(monkeypatch, attention_safety_alignment, "head_similarity")
    stage(
        attention_safety_alignment,
        "measure_mechanism",
        attack="sentiment-word",
        method="heads removed",
        heads=HEADS,
        n_rows=8,
        n=2,
    )
    expected = head_similarity(start, seen.of("prompts")[0], readings=["last row"])["last row"]
    torch.testing.assert_close(seen.results[0]["last row"], expected)
