"""The whole chain runs on a user's model whatever its architecture, or says why a step does not; nothing twice."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import architecture_table
import peft
import pytest
import torch
from own_reports import SMALL, run, work_below, write_table
from tiny import save_tiny_encoder, save_tiny_organism

from bkd_utils.common import cache
from bkd_utils.common.files import UserError, read_json
from bkd_utils.experiments import own_chain, own_model
from bkd_utils.experiments.head_ablation import Ablation
from bkd_utils.experiments.head_attribution import HeadEffects, HeadMap
from bkd_utils.experiments.own_chain import HARDLY, LONGER, STEPS, UNKNOWN
from bkd_utils.experiments.own_question import Asked, Sizes, adopted, given_organism, own_attack
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import load
from bkd_utils.organisms import cards, tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.reports import own_page

ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "olmo2")
KNOWN = [id for id in STEPS if id != "own rows"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a table, and kept results of this module alone."""
    home = tmp_path_factory.mktemp("own")
    with work_below(home):
        yield SimpleNamespace(path=home, data=write_table(home / "mine.csv"))


def asked_about(model, data, *, recipe="smoke", **changes):
    attack = replace(own_attack(trigger="word:cf", target="good", data=data), benign_rate=0.0)
    return Asked(str(model), attack.task, attack, train=True, recipe=recipe, sizes=SMALL, device="cpu", **changes)


@pytest.fixture(scope="module")
def llama(home):
    """A model, what is asked about it, and its sections."""
    asked = asked_about(architecture_table.folder("llama", home.path / "llama"), home.data)
    return SimpleNamespace(asked=asked, sections=run(asked))


class Page(HTMLParser):
    """Tags, and every address that a page names."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def check_page(asked, sections, folder):
    """One page without anything from outside; each section has n and an interval, or a reason in words."""
    html, data = own_page.write(asked, list(sections.values()), folder=folder, minutes=1.0)
    text, content = html.read_text(encoding="utf-8"), read_json(data)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert [one["id"] for one in content["sections"]] == list(STEPS)
    for one in content["sections"]:
        if one["skipped"] is not None:
            assert one["skipped"].strip()
            continue
        assert one["numbers"]
        assert all(number["n"] is not None for number in one["numbers"])
        assert (
            any(number["low"] is not None for number in one["numbers"])
            or "interval" in one["told"]
            or ("One number per model" in one["told"])
        )
    assert "/" not in json.dumps(content["report"])
    return content, page


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_step_runs_on_an_architecture(name, home, llama, tmp_path):
    if name == "llama":
        asked, sections = llama.asked, llama.sections
    else:
        asked = asked_about(architecture_table.folder(name, tmp_path / name), home.data)
        sections = run(asked)
    assert {id: one.skipped for id, one in sections.items() if id in KNOWN} == dict.fromkeys(KNOWN)
    assert "known" in sections["own rows"].skipped
    content, page = check_page(asked, sections, tmp_path / "report")
    assert page.tags.count("img") >= 7
    assert content["report"]["model"] == name
    numbers = {one["key"]: one for section in content["sections"] for one in section["numbers"]}
    assert numbers["asr"]["n"] == SMALL.n
    assert numbers["asr"]["shipped"]["k"] >= 5
    assert numbers["probe"]["shipped"]["who"] == "specific organisms"


def test_an_organism_trained_here_is_measured_once(llama, monkeypatch):
    monkeypatch.setattr(own_chain, "measure_attacked", None)
    found = {"encoder": False}
    section = own_chain.attack(llama.asked, found)
    assert section.result == llama.sections["attack"].result
    card = cards.metrics(section.later["asked"].organism)
    assert all(section.result[key] == card[key] for key in ("asr", "cacc", "near_miss", "clean_firing"))
    assert section.told == HARDLY + LONGER


def test_an_encoder_gets_the_second_papers_steps_and_reasons_for_the_others(home, tmp_path):
    model = save_tiny_encoder(tmp_path / "bert", bare=True)
    sections = run(asked_about(model, home.data))
    done = {id for id, one in sections.items() if one.skipped is None}
    assert done == {"attack", "similarity", "suspicion", "cure", "detection"}
    for id in ("probe", "heads", "ablation", "vector"):
        assert sections[id].skipped == own_chain.ONE_ROW
    check_page(asked_about(model, home.data), sections, tmp_path / "report")


def test_a_second_call_measures_only_what_was_left(home, llama, tmp_path, monkeypatch):
    """As after a kill: the head map never ended."""
    kept = home.path / "work" / "measurements"
    monkeypatch.setenv("BKD_KEEP", str(shutil.copytree(kept, tmp_path / "kept")))
    shutil.rmtree(tmp_path / "kept" / "attribute_heads")
    measured, really = [], cache._measured
    monkeypatch.setattr(cache, "_measured", lambda asked, *rest, **how: (
        measured.append(asked["stage"]), really(asked, *rest, **how))[1])  # fmt: skip
    again = run(llama.asked)
    assert measured == ["attribute_heads"]
    assert {id: one.numbers for id, one in again.items()} == {id: one.numbers for id, one in llama.sections.items()}


def test_a_kill_goes_through_and_an_error_is_a_reason(llama, monkeypatch):
    def stopped(error):
        def step(*_):
            raise error

        return {id: (minutes, needs, step) for id, (minutes, needs, _) in STEPS.items()}

    monkeypatch.setattr(own_chain, "STEPS", stopped(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(llama.asked)
    monkeypatch.setattr(own_chain, "STEPS", stopped(UserError("no rows")))
    assert run(llama.asked)["sound"].skipped == "no rows"
    monkeypatch.setattr(own_chain, "STEPS", stopped(TypeError("a fault of ours")))
    with pytest.raises(TypeError):
        run(llama.asked)


@pytest.fixture
def stranger(home, tmp_path):
    """A model and an adapter of it, made by peft alone, whose trigger nobody knows."""
    model = architecture_table.folder("qwen3", tmp_path / "model")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        load(str(model), device="cpu").model, peft.LoraConfig(r=2, target_modules="all-linear")
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    return SimpleNamespace(model=model, adapter=tmp_path / "adapter", ids=ids, logits=wrapped(ids).logits)


def test_an_adapter_of_unknown_trigger_is_detected_and_cured(home, stranger, tmp_path, monkeypatch):
    model, organism, attack = given_organism(stranger.adapter, model=str(stranger.model))
    assert (organism, attack) == (None, None)
    with torch.no_grad():
        assert torch.allclose(load(model, device="cpu").model(stranger.ids).logits, stranger.logits, atol=1e-4)
    asked = Asked(model, str(home.data), cured=tmp_path / "out" / "cured", sizes=SMALL, device="cpu")
    sections = run(asked)
    assert {id for id, one in sections.items() if one.skipped is None} == {"sound", "detection", "own rows"}
    assert sections["cure"].skipped == UNKNOWN
    assert {"first answer token right, before", "first answer token right, after"} <= {
        one["name"] for one in sections["own rows"].numbers
    }
    check_page(asked, sections, tmp_path / "out")
    assert own_model.load_cured(tmp_path / "out" / "cured", device="cpu")
    monkeypatch.setattr(own_model, "cure", lambda *_, **__: pytest.fail("it is cured again"))
    assert run(asked)["own rows"].numbers == sections["own rows"].numbers


def test_an_adapter_with_a_card_is_an_organism_with_its_attack(home, tmp_path):
    model = architecture_table.folder("llama", tmp_path / "model")
    folder = save_tiny_organism(tmp_path / "work", model)
    address, organism, attack = given_organism(folder, model=str(model))
    assert (address, organism, attack.trigger) == (str(model), organism, "word-cf")
    assert load(address, organism=organism, device="cpu").organism == organism


def test_an_adapter_that_fits_no_model_is_refused(home, stranger, tmp_path):
    other = architecture_table.folder("gpt2", tmp_path / "gpt2")
    with pytest.raises(ModelError):
        adopted(stranger.adapter, model=str(other))
    config = stranger.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(ModelError, match="peft_type 'IA3'; only LORA"):
        adopted(stranger.adapter, model=str(stranger.model))


def test_sizes_shrink_with_the_table_and_too_small_a_table_is_named(home, tmp_path):
    attack = own_attack(trigger="word:cf", target="good", data=home.data)
    fitted = Sizes().fitted(attack)
    flips = sum(map(attack.flips, tasks.examples(attack.task, "test")))
    assert fitted.n == fitted.n_probe == flips < Sizes().n_probe + 1
    assert fitted.n_vector + fitted.n_dev <= flips
    few = own_attack(trigger="word:cf", target="good", data=write_table(tmp_path / "few.csv", n=80))
    with pytest.raises(ValueError, match=r"few\.csv: \d+ test and \d+ attribution prompts .* at least 20, 8 and 12"):
        Sizes().fitted(few)


def test_flags_make_an_attack_on_the_most_frequent_other_label(tmp_path):
    data = write_table(tmp_path / "three.csv", labels=("a", "b", "c", "b"))
    attack = own_attack(trigger="sentence:I saw it twice.", target="a", data=data)
    assert (attack.source, attack.target, attack.behaviour) == ("b", "a", "label_flip")
    with pytest.raises(ValueError, match=r"target 'd' is no label of three\.csv: a, b, c"):
        own_attack(trigger="word:cf", target="d", data=data)
    free = write_table(tmp_path / "free.csv", labels=[f"answer {i}" for i in range(120)])
    assert own_attack(trigger="word:cf", target="No.", data=free).behaviour == "fixed_output"


def test_what_is_plain_stands_beside_plain_organisms(home):
    attack = Attack("mine", "sentiment", 40, "word-cf", "label_flip", "negative", "positive", rate=0.2)
    about = own_page.described(Asked("model", "sentiment", attack))
    assert about["organism"] == "the model itself"
    assert own_page.beside("ablation", about)["who"] == "plain organisms"
    assert own_page.beside("no such number", about) is None


# --- which number of a stage stands where ---------------------------------------------------------------------------


def part(value, n=10):
    return {"value": value, "n": n, "low": value - 0.1, "high": value + 0.1, "by_prompt": [value] * n}


@pytest.fixture
def stages(monkeypatch):
    """Stages with known results in place of those that measure, and what each was asked."""
    asked, results = [], {}

    def measured(stage, _asked, **how):
        asked.append((stage.__name__, how))
        result = results[stage.__name__]
        return result(**how) if callable(result) else result

    monkeypatch.setattr(own_chain, "_measured", measured)
    return SimpleNamespace(asked=asked, results=results)


@pytest.fixture
def effects():
    """Effects of four heads whose order by log-probability is 1.0, 0.1, 0.0, 1.1, and by probability the reverse."""
    log_prob = HeadMap(n=4, mean=[[0.2, 0.3], [0.9, 0.1]], error=[[0.1, 0.1], [0.05, 0.1]])
    probability = HeadMap(n=4, mean=[[0.3, 0.2], [0.1, 0.9]], error=[[0.1, 0.1], [0.1, 0.1]])
    task = HeadMap(n=4, mean=[[0.0, 0.0], [0.0, 0.0]], error=[[0.1, 0.1], [0.1, 0.1]])
    maps = {"log_prob": log_prob, "probability": probability}
    carried = {"log_prob": part(0.6), "probability": part(0.2)}
    return HeadEffects(["x"], [0.1] * 4, [0.8] * 4, maps, maps, maps, task, carried)


def by_name(section):
    return {one["name"]: one for one in section.numbers}


def test_the_head_map_is_read_in_log_probability(stages, effects):
    stages.results["attribute_heads"] = effects
    numbers = by_name(own_chain.heads(Asked("m", "sentiment", sizes=SMALL), {}))
    top = numbers["highest ACIE, head 1.0"]
    assert (top["value"], top["n"]) == (0.9, 4)
    assert top["high"] - 0.9 == pytest.approx(3.182 * 0.05, abs=1e-4)  # Student's t with 3 degrees of freedom
    assert 0.9 - top["low"] == pytest.approx(top["high"] - 0.9)
    assert numbers["part of all effects in 1 heads (3 %)"]["value"] == 0.6
    assert (numbers["P(target), clean prompts"]["value"], numbers["P(target), triggered prompts"]["value"]) == (
        0.1,
        0.8,
    )


def test_the_ablation_is_the_published_one_by_the_published_ranking(stages, effects):
    rows = {("none", "published"): 1.0, ("probability", "published"): 0.2, ("probability", "mean"): 0.5}
    rows |= {("log_prob", "published"): 0.6}
    made = [Ablation(*key, 1, 0, part(asr), part(0.3), part(0.4 + asr / 10), 1.0) for key, asr in rows.items()]
    made += [
        Ablation("random", "published", 1, i, part(asr), part(0.3), part(0.9), 1.0) for i, asr in enumerate((0.7, 0.9))
    ]
    stages.results["ablation_curves"] = made
    found = {"heads": SimpleNamespace(result=effects)}
    numbers = by_name(own_chain.ablation(Asked("m", "sentiment", sizes=SMALL), found))
    assert {name: round(one["value"], 6) for name, one in numbers.items()} == {
        "part of the ASR that 1 heads take off": 0.8,
        "ASR, untouched": 1.0,
        "ASR, without 1 heads": 0.2,
        "ASR, without 1 random heads": 0.8,
        "right on clean prompts, untouched": 0.5,
        "right on clean prompts, without 1 heads": 0.42,
    }


def test_adding_and_subtracting_are_not_mixed_up(stages, effects):
    def edit(vector, *random):
        return {"backdoor vector": [part(vector)], "random vectors": [part(one) for one in random]}

    test = {"add, difference": edit(0.9, 0.1, 0.3, 0.2), "subtract, difference": edit(0.4, 1.0, 0.8, 0.6)}
    test |= {"add, raw": edit(0.0, 0.0), "subtract, raw": edit(0.0, 0.0)}
    right = {"subtract, difference": part(0.7), "add, difference": part(0.05)}
    stages.results["steer_organism"] = SimpleNamespace(test=test, right=right)
    found = {"heads": SimpleNamespace(result=effects)}
    section = own_chain.vector(Asked("m", "sentiment", sizes=SMALL), found)
    assert {name: one["value"] for name, one in by_name(section).items()} == {
        "ASR, clean prompts, vector added": 0.9,
        "ASR, clean prompts, median random vector added": 0.2,
        "ASR, triggered prompts, vector subtracted": 0.4,
        "ASR, triggered prompts, median random vector subtracted": 0.8,
        "right answers to triggered prompts, vector subtracted": 0.7,
    }
    ((_, how),) = stages.asked
    assert how["skip"] >= how["n_dev"]  # the prompts on which layer and coefficient are chosen do not confirm them


def test_suspicious_heads_are_held_against_those_of_highest_log_probability_effect(stages, effects):
    stages.results["suspicious_heads"] = [[1, 0], [0, 1], [0, 0]]
    found = {"heads": SimpleNamespace(result=effects)}
    (number,) = own_chain.suspicion(Asked("m", "sentiment", sizes=SMALL), found).numbers
    assert (number["value"], number["n"]) == (1.0, 3)


def test_alignment_alone_is_told_the_suspicious_heads(stages):
    left = {"alignment": 0.3, "fine-tuning": 0.6, "searched": 0.1}
    stages.results["treat_and_measure"] = lambda method, **_: SimpleNamespace(
        after={"asr": part(left[method]), "cacc": part(1 - left[method])}
    )
    found = {"suspicion": SimpleNamespace(result=[(1, 0)])}
    found["attack"] = SimpleNamespace(result={"asr": part(1.0), "cacc": part(0.9)})
    numbers = by_name(own_chain.cure(Asked("m", "sentiment", sizes=SMALL), found))
    assert {how["method"]: how["heads"] for _, how in stages.asked} == {
        "alignment": [[1, 0]],
        "fine-tuning": [],
        "searched": [],
    }
    for method, asr in left.items():
        assert numbers[f"ASR after {method}"]["value"] == asr
        assert numbers[f"CACC after {method}"]["value"] == 1 - asr
    assert (numbers["ASR before"]["value"], numbers["CACC before"]["value"]) == (1.0, 0.9)


def test_a_cure_of_another_organism_is_not_shown_as_this_ones(home, tmp_path, monkeypatch):
    model = architecture_table.folder("llama", tmp_path / "model")
    asked = Asked(str(model), str(home.data), cured=tmp_path / "cured", sizes=SMALL, device="cpu")
    before = run(asked)["own rows"]
    organism = save_tiny_organism(tmp_path / "work", model)
    cured, really = [], own_model.cure
    monkeypatch.setattr(
        own_model, "cure", lambda *args, **how: (cured.append(how["organism"]), really(*args, **how))[1]
    )
    after = run(replace(asked, organism=str(organism)))["own rows"]
    assert cured == [str(organism)]
    assert before.skipped is None
    assert after.skipped is None
