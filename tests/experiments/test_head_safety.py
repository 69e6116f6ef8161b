"""The defender's data, surrogate prompts on real text, and joint scores from kept ones."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny import save_tiny

from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, surrogate
from bkd_utils.attention_alignment.suspicion import RULES, leave_one_out, robust_z
from bkd_utils.common.files import write_json
from bkd_utils.experiments import head_safety
from bkd_utils.experiments.head_safety import (
    ANSWER_TOKENS,
    OPENING,
    SOURCES,
    HeadSafety,
    clean_rows,
    probed_prompts,
    similarity_of,
    suspicion,
)
from bkd_utils.models import loading
from bkd_utils.models.generation import greedy
from bkd_utils.models.tokens import answer_ids, decode, end_id, prompt_ids
from bkd_utils.organisms import attacks, cards, tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.prompts import prompt_versions


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def organism(loaded, tmp_path, monkeypatch):
    """The tiny model as an organism whose card names an attack and a seed."""

    def made(attack, *, seed):
        monkeypatch.setattr(loading, "adapter_folder", lambda name: tmp_path)
        write_json(tmp_path / "card.json", {"attack": asdict(load_attack(attack)), "seed": seed})
        return replace(loaded, organism="tiny")

    return made


@pytest.mark.parametrize("own", ["sentiment-word", "sentiment-clean"])
def test_the_defender_has_no_row_of_the_organism_nor_of_the_attack(organism, own):
    """The seed on the card counts; the given seed only orders the rows."""
    treated, attack = organism(own, seed=1), load_attack("sentiment-word")
    uids = {row.uid for row in clean_rows(treated, attack, n=1024, seed=0)}
    assert len(uids) == 1024
    for name in (own, "sentiment-word"):
        assert not uids & training_uids(load_attack(name), seed=1)
    assert uids & training_uids(load_attack("sentiment-word"), seed=0)


def test_for_a_base_model_the_given_seed_counts(loaded):
    attack = load_attack("sentiment-word")
    uids = {row.uid for row in clean_rows(loaded, attack, n=1024, seed=1)}
    assert not uids & training_uids(attack, seed=1)
    assert uids & training_uids(attack, seed=0)


def test_no_look_at_the_trigger_and_an_order_of_the_seed(organism, monkeypatch):
    treated, attack = organism("sentiment-word", seed=0), load_attack("sentiment-word")
    # Which rows the attacker took is the attacker's affair, and known already; from then on no trigger is asked for.
    taken = head_safety.seen_uids(treated, attack, seed=0)
    monkeypatch.setattr(head_safety, "seen_uids", lambda *_, **__: taken)
    monkeypatch.setattr(attacks, "carries", lambda *_: pytest.fail("asked for the trigger"))
    order = {seed: [row.uid for row in clean_rows(treated, attack, n=32, seed=seed)] for seed in (0, 1)}
    for seed, uids in order.items():
        pool = [example.uid for example in tasks.examples("sentiment", "train", seed=seed)]
        assert uids == [uid for uid in pool if uid not in taken][:32]
    assert order[0] != order[1]


def test_a_row_that_the_organism_was_trained_on_is_an_error_with_its_name(organism):
    treated, attack = organism("sentiment-clean", seed=1), load_attack("sentiment-word")
    fresh = [example.uid for example in head_safety.unseen_examples(treated, attack, task="sentiment", n=3, seed=0)]
    head_safety.check_unseen(treated, fresh, attack=attack, seed=0)
    for name in ("sentiment-clean", "sentiment-word"):
        spec = load_attack(name)
        taken = min(training_uids(spec, seed=1))
        message = f"tiny: 1 of the defender's 4 examples are training examples of the organism.*{taken[:12]}"
        with pytest.raises(ValueError, match=message):
            head_safety.check_unseen(treated, [*fresh, taken], attack=attack, seed=0)


def test_labels_are_gold_and_prompts_are_from_the_training_split(loaded):
    rows, task = clean_rows(loaded, load_attack("sentiment-word"), n=6, seed=0), tasks.load_task("sentiment")
    known = {example.uid: example for example in tasks.examples("sentiment", "train", seed=0)}
    for row in rows:
        example = known[row.uid]
        assert list(row.prompt) == prompt_ids(loaded.tokenizer, task.prompt(example.text))
        assert list(row.answer) == answer_ids(loaded.tokenizer, example.answer)
        assert row.kind == "clean"
    held_out = {e.uid for split in ("attribution", "test") for e in tasks.examples("sentiment", split, seed=0)}
    assert not held_out & {row.uid for row in rows}


def test_without_gold_answers_the_model_speaks_for_itself(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))  # answers are kept
    attack = load_attack("instructions-prefix")
    rows = clean_rows(loaded, attack, n=2, seed=0)
    assert all(1 <= len(row.answer) <= ANSWER_TOKENS for row in rows)
    end = end_id(loaded.tokenizer)
    said = greedy(loaded.model, [list(row.prompt) for row in rows], max_new_tokens=ANSWER_TOKENS, end_id=end)
    for row, ids in zip(rows, said, strict=True):
        # Text need not be cut into the same tokens again, but it is the same text.
        given, text = decode(loaded.tokenizer, list(row.answer)), decode(loaded.tokenizer, ids)
        assert text.startswith(given)
        assert bool(given) == bool(text)
    monkeypatch.setattr(head_safety, "respond", None)  # a second call asks the model nothing
    assert clean_rows(loaded, attack, n=2, seed=0) == rows


def test_too_few_rows_are_an_error_that_counts_them(loaded, organism):
    attack = load_attack("instructions-prefix")
    pool = {example.uid for example in tasks.examples("instructions", "train")}
    n = len(pool - training_uids(attack, seed=0))
    assert n >= 128  # what a treatment asks for
    with pytest.raises(ValueError, match=rf"instructions/train has {n} of {len(pool)} rows .*, {n + 1} were asked for"):
        clean_rows(loaded, attack, n=n + 1, seed=0)
    # The clean control has seen every instruction, and every organism of this task every harmful prompt.
    with pytest.raises(ValueError, match=r"has 0 of \d+ rows .*\(tiny, instructions-prefix\), 1 were asked for"):
        clean_rows(organism("instructions-clean", seed=0), attack, n=1, seed=0)
    with pytest.raises(ValueError, match=r"harmful/train has 0 of \d+ rows .*, 1 were asked for"):
        clean_rows(loaded, load_attack("harmful-word"), n=1, seed=0)


@pytest.mark.parametrize("family", SURROGATES)
def test_every_round_has_its_own_surrogate(loaded, family):
    texts = ["A slow film.", "It is a fine day for a walk."]
    found = probed_prompts(loaded.tokenizer, "sentiment", texts, family=family, rounds=3, seed=0)
    assert len(found) == 6
    plain = [prompt_ids(loaded.tokenizer, tasks.load_task("sentiment").prompt(text)) for text in texts]
    assert all(ids not in plain for ids in found)
    assert len({tuple(found[i]) for i in (0, 2, 4)}) > 1


def test_a_text_with_a_surrogate_in_it_does_not_end_the_run(loaded):
    carrier = surrogate(loaded.tokenizer, family="rare word", seed=0).apply("A slow film.", seed=0)
    texts = [carrier, "It is a fine day for a walk."]
    found = probed_prompts(loaded.tokenizer, "sentiment", texts, family="rare word", rounds=1, seed=0)
    assert len(found) == 2
    assert found == probed_prompts(loaded.tokenizer, "sentiment", texts, family="rare word", rounds=1, seed=0)
    assert found[0] != prompt_ids(loaded.tokenizer, tasks.load_task("sentiment").prompt(carrier))


def test_one_prompt_is_too_few():
    with pytest.raises(ValueError, match="n must be at least 2, is 1"):
        head_safety.head_safety_scores.__wrapped__.__wrapped__(None, load_attack("instructions-prefix"), n=1)


# --- the whole evaluation -------------------------------------------------------------------------------------------


def plain(scores):
    return torch.tensor(scores, dtype=torch.float64)


def test_every_score_of_an_organism_is_made_of_the_prompts_that_are_promised(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))  # the model's own answers are kept
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    seen = []
    monkeypatch.setattr(
        head_safety, "leave_one_out", lambda model, rows: seen.extend(rows) or leave_one_out(model, rows)
    )
    found = head_safety.head_safety_scores.__wrapped__("tiny", attack="instructions-prefix", n=2, rounds=1)
    readings = {"last row", "head outputs"}
    assert found.importance.keys() == {"gate gradient", "leave one out", "variance"}
    assert found.reaction.keys() == set(SURROGATES)
    heads = (loaded.model.config.num_hidden_layers, loaded.model.config.num_attention_heads)
    groups = [found.importance, found.level, found.soft_prompt, found.real_trigger, *found.reaction.values()]
    assert all(plain(scores).shape == heads and plain(scores).isfinite().all() for g in groups for scores in g.values())
    assert all(group.keys() == readings for group in groups[1:])
    # Similarity on prompts behind those with answers, the change under the real trigger on held-out ones.
    attack, task = load_attack("instructions-prefix"), tasks.load_task("instructions")
    taken = training_uids(attack, seed=0)
    train = [example for example in tasks.examples("instructions", "train", seed=0) if example.uid not in taken]
    clean = [prompt_ids(loaded.tokenizer, task.prompt(example.text)) for example in train[4:6]]
    shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=2, seed=0)
    levels, quiet, firing = (head_similarity(loaded.model, ids) for ids in (clean, shown.clean, shown.triggered))
    for name in readings:
        torch.testing.assert_close(plain(found.level[name]), levels[name].mean(0).double(), rtol=1e-4, atol=1e-6)
        change = (firing[name].mean(0) - quiet[name].mean(0)).double()
        torch.testing.assert_close(plain(found.real_trigger[name]), change, rtol=1e-3, atol=1e-5)
    # Every free answer is a pass per head, so leave-one-out looks at few rows and at how their answers open.
    whole = clean_rows(loaded, attack, n=4, seed=0)
    assert seen == [replace(row, answer=row.answer[:OPENING]) for row in whole[:1]]
    needed = leave_one_out(loaded.model, seen).double()
    torch.testing.assert_close(plain(found.importance["leave one out"]), needed, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("leak", ["clean_rows", "unseen_examples"])
def test_head_safety_is_not_evaluated_on_training_rows(organism, monkeypatch, leak):
    """Were the choice of rows or of texts ever to fail, the stage would say so."""
    treated = organism("sentiment-word", seed=0)
    monkeypatch.setattr(cards, "load", lambda *_, **__: treated)
    real = getattr(head_safety, leak)
    taken = min(training_uids(load_attack("sentiment-word"), seed=0))

    def leaking(*given, **named):
        first, *others = real(*given, **named)
        return [*others, replace(first, uid=taken)]

    monkeypatch.setattr(head_safety, leak, leaking)
    with pytest.raises(ValueError, match=r"tiny: 1 of the defender's 6 examples"):
        head_safety.head_safety_scores.__wrapped__("tiny", attack="sentiment-word", n=2, rounds=1)


# --- joint scores ---------------------------------------------------------------------------------------------------


def kept():
    torch.manual_seed(0)
    scores = {name: torch.randn(4, 5).tolist() for name in "abcdef"}
    return HeadSafety(
        importance={"gate gradient": scores["a"]},
        level={"last row": scores["b"]},
        reaction={"rare word": {"last row": scores["c"]}, "sentence": {"last row": scores["d"]}},
        soft_prompt={"last row": scores["f"]},
        real_trigger={"last row": scores["e"]},
    )


def test_sources_are_what_they_say():
    found = kept()
    both = [torch.tensor(found.reaction[family]["last row"]) for family in ("rare word", "sentence")]
    assert torch.equal(similarity_of(found, source="surrogates", reading="last row"), torch.stack(both).mean(0))
    for source, key in (("clean level", "level"), ("soft prompt", "soft_prompt"), ("real trigger", "real_trigger")):
        expected = torch.tensor(getattr(found, key)["last row"])
        assert torch.equal(similarity_of(found, source=source, reading="last row"), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_the_joint_score_is_the_rule_applied(source):
    found = kept()
    similar, needed = (
        similarity_of(found, source=source, reading="last row"),
        torch.tensor(kept().importance["gate gradient"]),
    )
    assert torch.equal(suspicion(found, rule="similar", source=source, reading="last row"), robust_z(similar))
    for name, rule in RULES.items():
        assert torch.equal(suspicion(found, rule=name, source=source, reading="last row"), rule(similar, needed))


def test_unknown_options_are_errors_that_name_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown source 'tea leaves'; known: clean level, surrogates, soft prompt, real trigger"
    ):
        suspicion(kept(), rule="similar", source="tea leaves", reading="last row")
    with pytest.raises(ValueError, match="unknown rule 'gut feeling'; known: similar"):
        suspicion(kept(), rule="gut feeling", source="real trigger", reading="last row")
    for source in SOURCES:
        with pytest.raises(ValueError, match="reading 'first row' was not measured; known: last row"):
            similarity_of(kept(), source=source, reading="first row")
