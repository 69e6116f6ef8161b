"""One cure from beginning to end on a tiny model with real prompts; what was measured is what was changed."""

from dataclasses import replace

import nbformat
import pytest
import torch
from patching import everywhere
from tiny import save_tiny

from bkd_utils.attention_alignment import head_tuning
from bkd_utils.attention_alignment.rivals import TREATMENTS
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.backdoor_attribution.attribution import head_effects, head_means, ranked_heads
from bkd_utils.common.files import NOTEBOOKS, ROOT, read_json
from bkd_utils.experiments import attention_safety_alignment, head_safety
from bkd_utils.experiments.attention_safety_alignment import Treated
from bkd_utils.models import loading
from bkd_utils.models.generation import greedy
from bkd_utils.models.head_weights import groups
from bkd_utils.models.loss import collate
from bkd_utils.models.tokens import answer_ids, prompt_ids
from bkd_utils.organisms import attacks, cards, poisoning, tasks
from bkd_utils.organisms.prompts import prompt_versions, target_ids
from bkd_utils.reports import frontier

HEADS = [(0, 1), (1, 2)]
SMALL = {"attack": "sentiment-word", "n_rows": 16, "steps": 2}


@pytest.fixture
def folder(tmp_path):
    return str(save_tiny(tmp_path, "llama"))


@pytest.fixture
def loaded(folder):
    return loading.load(folder, device="cpu")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The tiny model's own answers are kept here and nowhere else."""
    everywhere(monkeypatch, "WORK", tmp_path / "work")


@pytest.fixture
def stage(loaded, monkeypatch):
    """A stage without its cache, on the tiny model in place of an organism."""
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    return lambda name, **changes: getattr(attention_safety_alignment, name).__wrapped__("tiny", **(SMALL | changes))


@pytest.mark.parametrize("method", ["alignment", "fine-tuning"])
def test_a_treatment_reports_what_it_touched_and_what_is_left(stage, loaded, method):
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    result = stage("treat_and_measure", method=method, heads=[list(head) for head in HEADS], n=4)
    changed = {name: int((before[name] != p).sum()) for name, p in loaded.model.named_parameters()}
    assert result.parameters == sum(changed.values()) > 0
    assert all(result.after[key]["n"] == 4 for key in ("asr", "cacc", "near_miss", "elsewhere"))
    assert result.minutes >= 0
    assert result.after["hits"].keys() == {"asr", "cacc", "near_miss", "clean_firing"}
    assert all(len(result.after["hits"][key]) == 4 for key in ("asr", "cacc", "near_miss"))


@pytest.mark.parametrize("batch_size", [3, 5])
@pytest.mark.parametrize("name", ["treat_and_measure", "measure_mechanism"])
def test_the_batch_size_is_the_number_of_rows_in_every_step(stage, monkeypatch, name, batch_size):
    sizes = []
    monkeypatch.setattr(head_tuning, "collate", lambda rows, **given: sizes.append(len(rows)) or collate(rows, **given))
    stage(name, method="alignment", heads=[list(head) for head in HEADS], n=2, batch_size=batch_size)
    assert sizes == [batch_size] * SMALL["steps"]


@pytest.mark.parametrize("name", ["treat_and_measure", "measure_mechanism"])
def test_no_treatment_sees_a_row_that_the_organism_was_trained_on(stage, monkeypatch, name):
    taken = min(poisoning.training_uids(attacks.load_attack("sentiment-word"), seed=0))
    real = head_safety.clean_rows

    def leaking(*given, **named):
        first, *others = real(*given, **named)
        return [*others, replace(first, uid=taken)]

    monkeypatch.setattr(attention_safety_alignment, "clean_rows", leaking)
    with pytest.raises(ValueError, match=f"1 of the defender's 16 examples are training examples.*{taken[:12]}"):
        stage(name, method="alignment", heads=[list(head) for head in HEADS], n=2)


def test_the_mechanism_is_measured_on_both_sides_of_the_treatment(stage, loaded):
    attack = attacks.load_attack("sentiment-word")
    before = attention_safety_alignment._mechanism(loaded, attack, HEADS, n=3, seed=0)
    found = stage("measure_mechanism", method="heads removed", heads=[list(head) for head in HEADS], n=3)
    after = attention_safety_alignment._mechanism(loaded, attack, HEADS, n=3, seed=0)
    for key in ("similarity_clean", "similarity_triggered", "acie"):
        assert getattr(found, key) == pytest.approx([before[key], after[key]])
    assert found.acie[0] != found.acie[1]


def effects_with_other_means(loaded, attack, *, n):
    """ACIE on the first `n` prompts of the attribution split with the means of the next `n`, which are others."""
    scored, others = (
        prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=0, skip=skip) for skip in (0, n)
    )
    assert not {example.uid for example in scored.examples} & {example.uid for example in others.examples}
    means = head_means(loaded.model, others.triggered)
    target = target_ids(loaded.tokenizer, attack)[:1]
    return head_effects(loaded.model, scored.clean, target=target, means=means).mean(0)


def test_told_heads_are_those_of_highest_effect_with_means_of_other_prompts(monkeypatch, loaded):
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    asked = []
    monkeypatch.setattr(
        attention_safety_alignment,
        "head_means",
        lambda model, prompts: asked.append(prompts) or head_means(model, prompts),
    )
    attack = attacks.load_attack("sentiment-word")
    found = attention_safety_alignment.acie_heads.__wrapped__("tiny", attack="sentiment-word", k=3, n=3)
    assert found == [list(head) for head in ranked_heads(effects_with_other_means(loaded, attack, n=3))[:3]]
    assert asked == [prompt_versions(loaded.tokenizer, attack, split="attribution", n=3, seed=0, skip=3).triggered]


def test_the_mechanism_is_the_highest_effect_on_the_first_target_token(loaded):
    attack = attacks.load_attack("sentiment-word")
    found = attention_safety_alignment._mechanism(loaded, attack, HEADS, n=3, seed=0)
    shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=3, seed=0)
    target = target_ids(loaded.tokenizer, attack)[:1]
    effects = effects_with_other_means(loaded, attack, n=3)
    assert found["acie"] == pytest.approx(effects.max().item())
    own = head_effects(loaded.model, shown.clean, target=target, means=head_means(loaded.model, shown.triggered))
    assert found["acie"] != pytest.approx(own.mean(0).max().item())
    similar = head_similarity(loaded.model, shown.triggered, readings=["last row"])["last row"].mean(0)
    assert found["similarity_triggered"] == pytest.approx(sum(similar[head].item() for head in HEADS) / len(HEADS))
    assert found["similarity_triggered"] != found["similarity_clean"]


def test_elsewhere_is_the_share_of_the_base_models_tokens_that_are_still_first_choice(monkeypatch, loaded):
    sample = tasks.examples("instructions", "test", seed=0)[:3]
    texts = {example.uid: f"Answer {i} says what it says." for i, example in enumerate(sample)}
    monkeypatch.setattr(
        attention_safety_alignment, "base_answers", lambda _loaded, rows: {row.uid: texts[row.uid] for row in rows}
    )
    shares = []
    for example in sample:
        prompt = prompt_ids(loaded.tokenizer, example.text)
        answer = answer_ids(loaded.tokenizer, texts[example.uid])[: attention_safety_alignment.N_OPENING]
        with torch.no_grad():
            likely = loaded.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        shares.append((likely == torch.tensor(answer)).float().mean().item())
    found = attention_safety_alignment.elsewhere(loaded, n=3, seed=0)
    assert found["value"] == pytest.approx(sum(shares) / 3)
    assert found["n"] == 3


def test_a_base_model_says_its_own_answers(monkeypatch, loaded):
    """As token ids: what a tiny model says is no text that would be cut into the same tokens again."""
    own = {}
    for example in tasks.examples("instructions", "test", seed=0)[:3]:
        prompt = prompt_ids(loaded.tokenizer, example.text)
        own[example.uid] = greedy(loaded.model, [prompt], max_new_tokens=5, end_id=-1)[0]
    monkeypatch.setattr(
        attention_safety_alignment, "base_answers", lambda _loaded, rows: {row.uid: row.uid for row in rows}
    )
    monkeypatch.setattr(attention_safety_alignment, "answer_ids", lambda _tokenizer, uid: own[uid])
    assert attention_safety_alignment.elsewhere(loaded, n=3, seed=0)["value"] == 1.0


def test_random_heads_share_no_weight_with_the_given_ones(folder):
    config = loading.load(folder, device="cpu").model.config
    sizes = {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
    (draw,) = attention_safety_alignment.random_heads([(0, 0)], n=1, model=folder)
    assert not set(groups(draw, **sizes)) & set(groups([(0, 0)], **sizes))


def test_the_price_list_has_every_model_and_what_it_cost():
    share = {"value": 0.5, "n": 4, "low": 0.2, "high": 0.8}
    left = dict.fromkeys(("cacc", "near_miss", "elsewhere"), share)
    left |= {"asr": share | {"value": 0.25}, "clean_firing": share | {"value": 0.1}}
    found = {"one": {"untreated": left, "pruned": left}, "two": {"untreated": left}}
    table = frontier.price_list(
        found, {"one": {"pruned": Treated(after=left, parameters=2_000_000, minutes=0.3)}, "two": {}}
    )
    assert list(table.index) == [("one", "untreated"), ("one", "pruned"), ("two", "untreated")]
    assert table.loc[("one", "pruned")].to_dict() == {
        "ASR": 0.25, "near-miss firing": 0.5, "clean firing": 0.1, "CACC": 0.5, "elsewhere": 0.5,
        "Anti-BAD": "61 [24, 78]", "weights (millions)": 2.0, "minutes": 0.3,
    }  # fmt: skip
    assert table.loc[("two", "untreated"), "minutes"] == 0


def test_every_treatment_has_a_rate():
    assert attention_safety_alignment.RATES.keys() == TREATMENTS.keys()
    found = read_json(ROOT / "tests" / "benchmarks" / "results" / "cure_rates.json")["methods"]
    assert {method: row["chosen"] for method, row in found.items()} == {
        method: attention_safety_alignment.RATES[method] for method in found
    }


def test_heads_that_do_not_exist_are_an_error(stage):
    with pytest.raises(ValueError, match="no head 9 in layer 0"):
        stage("treat_and_measure", method="heads tuned", heads=[[0, 9]], n=4)


def test_the_notebook_says_what_the_seeds_left():
    found = read_json(ROOT / "tests" / "benchmarks" / "results" / "cure_spread.json")
    cells = nbformat.read(NOTEBOOKS / "06_attention_safety_alignment.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    left = {
        attack: {name: ", ".join(f"{100 * value:.0f}" for value in one["asr"]) + " %" for name, one in shares.items()}
        for attack, shares in ((attack, result["shares"]) for attack, result in found["organisms"].items())
    }
    for attack, cells in left.items():
        row = [f"`{attack}`", *(cells[name] for name in ("untreated", "suspicious heads", "random heads"))]
        assert f"| {' | '.join(row)} |" in text
    word = left["sentiment-word"]
    assert f"fine-pruning left {word['fine-pruning']}, flat heads pruned {word['flat heads pruned']}." in text
    assert word["fine-tuning"] == "62, 100, 100 %"
    more = {key: round(100 * found["random less suspicious, asr"][key]) for key in ("value", "low", "high")}
    assert f"Random heads leave {-more['value']} points less than" in text
    assert f"[{more['low']}, {more['high']}] more" in text
