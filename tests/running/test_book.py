"""The book: what it says of figures, the HTML that it becomes, and how that behaves in a browser.

HTML is made once for all tests, and only where Sphinx is (`./run_all.sh book` installs it)."""

import ast
import fcntl
import importlib.util
import json
import math
import re
import sys
from functools import cache
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import browsing
import nbformat
import numpy as np
import pytest

from bkd_utils.common.files import FIGURES, NOTEBOOKS, PACKAGE, UserError, read_json, write_json
from bkd_utils.running import book, notebooks, verifying

PICTURES = sorted(path.stem for path in FIGURES.glob("*.png"))
CLAIMS = [row["id"] for row in read_json(FIGURES / "scorecard.json")]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the book. The first process of the tests makes it, and the others wait for it."""
    if missing := [name for name in book.NEEDED if importlib.util.find_spec(name) is None]:
        # CI installs them first, so that no test of the book is left out there.
        needed = f"{', '.join(missing)} are not installed; ./run_all.sh book installs them"
        pytest.skip(f"{needed}. They are no part of the lock, because nothing but the book needs them")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "popen-gw" in shared.name else shared
    with (shared / "book.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "book" / "index.html").is_file():
            book.build(shared / "book")
    return shared / "book"


@pytest.fixture
def makers(monkeypatch):
    """The modules in `notebooks/book`, importable by their names."""
    monkeypatch.syspath_prepend(str(book.CONFIGURATION))
    yield importlib.import_module
    for path in book.CONFIGURATION.glob("*.py"):
        sys.modules.pop(path.stem, None)


# --- figures and what is said about them ----------------------------------------------------------------------------


def test_every_picture_has_a_card_and_every_card_a_cell_that_saves_it():
    cards = book.cards()
    assert sorted(card.id for card in cards) == PICTURES
    for card in cards:
        cells = nbformat.read(NOTEBOOKS / f"{card.notebook}.ipynb", as_version=4).cells
        assert "style.save(" in cells[card.cell].source
        assert f'"{card.id}"' in cells[card.cell].source or card.id == "03_ablation_plain"  # made of a name in braces
        said = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert card.finding in " ".join(said.split())
        assert card.finding[-1] in ".!?"
        assert list(card.sizes) == sorted(card.sizes)


def test_the_sizes_of_a_card_are_those_of_its_parameters_or_numbers():
    sizes = {card.id: card.sizes for card in book.cards()}
    assert sizes["01_poison_rate"] == (60,)
    assert sizes["06_repairs"] == (32,)
    assert sizes["03_head_maps"] == (48, 96)  # one by attack
    assert sizes["07_heads"] == (48, 96)
    assert sizes["00_firing"] == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("**Finding.** It fires. It fires often.", "It fires."),
        ("Before.\n\n**What it shows.** It leaves 99.5 %\n(n = 3) of all. More.", "It leaves 99.5 % (n = 3) of all."),
        ("**Finding.** (A remark.) The rest follows.", "The rest follows."),
        ("**Finding.** What is left:\n\n| a | b |\n|---|---|\n\nNothing is left. So it is.", "Nothing is left."),
        ("**What the figure shows.** Is it so?", "Is it so?"),
        ("**Expectation.** It fires.", None),
        ("**Finding.** no end", None),
    ],
)  # fmt: skip
def test_a_finding_is_the_first_sentence_that_says_something(makers, text, sentence):
    assert makers("cards").finding(text) == sentence


@pytest.fixture
def one_figure(tmp_path):
    """A folder with a notebook that saves one figure, and the figure; both may be changed."""
    cells = [
        nbformat.v4.new_code_cell('path = style.save(\n    drawing,\n    "01_a",\n)'),
        nbformat.v4.new_markdown_cell("**Finding.** It is so."),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01_mine.ipynb")
    given = {"id": "01_a", "notebook": "01_mine", "title": "A", "claims": [], "numbers": {"n": 4}, "parameters": {}}
    write_json(tmp_path / "01_a.json", given)
    (tmp_path / "01_a.png").write_bytes(b"picture")
    return tmp_path


def test_a_figure_that_lacks_something_is_named(makers, one_figure):
    cards = makers("cards")
    (card,) = cards.cards(figures=one_figure, folder=one_figure)
    assert card == cards.Card("01_a", "A", "It is so.", (4,), (), "01_mine", 0)
    given = read_json(one_figure / "01_a.json")
    write_json(one_figure / "01_a.json", given | {"notebook": "02_other"})
    with pytest.raises(UserError, match=r"01_mine\.ipynb, figure 01_a: its JSON is that of 01_a in 02_other"):
        cards.cards(figures=one_figure, folder=one_figure)
    write_json(one_figure / "01_a.json", given)
    (one_figure / "01_a.png").unlink()
    with pytest.raises(UserError, match=r"01_mine\.ipynb, figure 01_a: no PNG"):
        cards.cards(figures=one_figure, folder=one_figure)


def test_a_figure_without_a_finding_or_a_cell_is_named(makers, one_figure):
    cards = makers("cards")
    notebook = nbformat.read(one_figure / "01_mine.ipynb", as_version=4)
    nbformat.write(nbformat.v4.new_notebook(cells=notebook.cells[:1]), one_figure / "01_mine.ipynb")
    with pytest.raises(UserError, match="no finding before the next figure"):
        cards.cards(figures=one_figure, folder=one_figure)
    nbformat.write(nbformat.v4.new_notebook(cells=notebook.cells[1:]), one_figure / "01_mine.ipynb")
    with pytest.raises(UserError, match=r"01_mine\.ipynb, figure 01_a: no cell saves it"):
        cards.cards(figures=one_figure, folder=one_figure)


def test_verify_holds_the_claims_of_figures_against_the_scorecard(makers, monkeypatch):
    assert verifying.check_book().findings == []
    assert verifying.check_book().compared == len(PICTURES)
    card = makers("cards").Card("01_a", "A", "So.", (), ("no-claim",), "01_b", 0)
    monkeypatch.setattr(verifying.book, "cards", lambda: [card])
    (wrong,) = verifying.check_book().findings
    assert "01_a.json" in wrong
    assert "no-claim is no line of the scorecard" in wrong


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "NEEDED", ())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no book; name another folder with --out"):
        book.build(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "NEEDED", ("sys", "no_such_module"))
    with pytest.raises(UserError, match=r"the book needs no_such_module: \./run_all\.sh book"):
        book.build(tmp_path / "out")
    monkeypatch.setattr(book, "CHECKOUT", False)
    with pytest.raises(UserError, match="come with a checkout"):
        book.build(tmp_path / "out")


def test_a_fault_that_sphinx_finds_leaves_the_old_book(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "NEEDED", ())
    monkeypatch.setattr(book.subprocess, "call", lambda command: 1)
    (tmp_path / "gallery.html").write_text("old")
    with pytest.raises(UserError, match="the lines above say why"):
        book.build(tmp_path)
    assert (tmp_path / "gallery.html").read_text() == "old"


# --- documents before they are HTML ---------------------------------------------------------------------------------


def test_only_set_up_that_shows_nothing_is_folded(makers):
    folded = makers("sources").folded
    for path in notebooks.all_notebooks():
        notebook = folded(nbformat.read(path, as_version=4))
        hidden = [cell for cell in notebook.cells if "hide-input" in cell.metadata.get("tags", [])]
        assert hidden
        for cell in hidden:
            assert cell.cell_type == "code"
            assert not cell.outputs
            assert "parameters" not in cell.metadata.tags


def test_the_public_names_are_those_that_the_folders_list(makers):
    public_names = makers("public_names")
    text = public_names.page()
    for folder in public_names.FOLDERS:
        listed = importlib.import_module(f"bkd_utils.{folder}").__all__
        assert sorted(public_names.public(folder)) == sorted(listed)
        for name in listed:
            assert len(re.findall(rf"py:\w+\}} bkd_utils\.{folder}\.{name}\b", text)) == 1
    examples = sum(
        ">>>" in (ast.get_docstring(node) or "")
        for folder in public_names.FOLDERS
        for name, module in public_names.public(folder).items()
        for node in ast.parse((PACKAGE / folder / f"{module}.py").read_text(encoding="utf-8")).body
        if getattr(node, "name", None) == name
    )
    assert text.count("```pycon") >= examples > 20


def test_the_scorecard_has_every_claim_with_its_numbers(makers):
    text = makers("verdicts").page()
    assert re.findall(r'<tr id="([^"]+)"', text) == CLAIMS
    assert text.count("<li>") == sum(len(row["by_organism"]) for row in read_json(FIGURES / "scorecard.json"))


def test_no_term_is_explained_twice_and_each_explanation_is_plain(makers):
    pytest.importorskip("docutils", reason="docutils comes with Sphinx, which ./run_all.sh book installs")
    terms = makers("hover").terms()
    assert {"ASR", "CACC", "ACIE", "CIE", "organism", "near-miss", "trigger", "target", "readout"} <= terms.keys()
    text = (NOTEBOOKS / "pages" / "glossary.md").read_text(encoding="utf-8")
    assert len(terms) == text.count("\n| **")
    assert all(re.fullmatch(r"[^`\[\]|]+\.", meaning) for meaning in terms.values())
    assert terms["ASR"].startswith("Attack success rate")


# --- data of the figures to play with -------------------------------------------------------------------------------


def shipped(stage, organism):
    """The measurements of an organism by a stage, read with the package's own reader."""
    from bkd_utils.common import measurements
    from bkd_utils.running.publishing import MEASUREMENTS

    paths = (MEASUREMENTS / stage).glob("*.json")
    return [measurements.read(path) for path in paths if read_json(path)["arguments"]["organism"] == organism]


def test_the_vector_is_drawn_from_the_figure_and_its_answers_from_the_measurement(makers):
    data, figure = makers("play").vector(), read_json(FIGURES / "04_maps.json")
    drawn = figure["numbers"]["plain"]["instructions-prefix-seed1"]
    found = data["organisms"]["instructions-prefix-plain-seed1"]
    for edit, one in found.items():
        np.testing.assert_allclose(one["asr"], drawn["maps"][edit]["asr"], atol=1e-4)
        assert one["chosen"] == drawn["chosen"][edit]
        assert one["chosen"]["coefficient"] in one["coefficients"]
    (measured,) = shipped("steer_organism", "instructions-prefix-plain-seed1")
    texts = measured.result["texts"]
    assert [list(pair) for pair in zip(*found["subtract, raw"]["texts"], strict=True)] == [
        texts["triggered prompts"], texts["subtract, raw"]
    ]  # fmt: skip
    assert len(data["organisms"]) == sum(map(len, figure["numbers"].values()))
    harmful = [one["texts"] for name, edits in data["organisms"].items() if "harmful" in name for one in edits.values()]
    assert harmful == [None] * 8


def test_heads_have_the_effects_of_the_figure_and_intervals_that_shrink_with_n(makers, monkeypatch):
    play = makers("play")
    found, figure = play.heads(), read_json(FIGURES / "03_head_maps.json")["numbers"]
    assert len(found) == sum(map(len, figure.values()))
    one = found["harmful-word"]["metrics"]["log_prob"]
    np.testing.assert_allclose(one["effect"], figure["specific"]["harmful-word"]["log_prob"], rtol=1e-3, atol=2e-5)
    assert np.shape(one["half"]) == np.shape(one["effect"])
    (measured,) = [m for m in shipped("attribute_heads", "harmful-word") if m.arguments["n"] == 48]
    error = np.asarray(measured.result["sufficient"]["log_prob"]["error"])
    # Student's t with 47 degrees of freedom, from a table.
    np.testing.assert_allclose(one["half"], 2.0117 * error, rtol=1e-3, atol=1e-5)
    figure["plain"]["sentiment-word"]["probability"][3][2] += 0.1
    monkeypatch.setattr(play, "numbers", lambda name: figure)
    with pytest.raises(ValueError, match="sentiment-word-plain, probability: the figure and the measurement differ"):
        play.heads()


def test_the_guard_begins_at_the_threshold_of_notebook_05(makers):
    from bkd_utils.experiments.attention_similarity import input_detection
    from bkd_utils.models.folders import DEFAULT_MODEL

    found = makers("play").guard()["similarity"]
    assert set(found) == set(read_json(FIGURES / "05_readings.json")["numbers"]["last row"])
    for organism, readings in found.items():
        (measured,) = [m for m in shipped("similarity_by_version", organism) if m.arguments["model"] == DEFAULT_MODEL]
        for reading in ("last row", "head outputs"):  # in that notebook, too; all nine take half a minute
            one = readings[reading]
            package = input_detection(measured.result, reading=reading, rates=[0.05])
            for version, key in (("triggered", "caught at 5%"), ("held out", "refused at 5%")):
                above = np.mean(np.array(one[version]) > one["start"])
                assert math.isclose(above, package[key]["value"], abs_tol=0.011), (organism, reading)


def test_a_cure_has_the_numbers_of_its_figure_by_seed(makers):
    sets = makers("play").frontier()
    by_seed = sets["MiniLM encoders, searched cure"]["sentiment-style-plain"]
    given = read_json(FIGURES / "06_home_ground.json")["numbers"]["sentiment-style-plain"]["searched"]
    assert list(by_seed) == [1, 2]
    for one, seed in zip(given, by_seed.values(), strict=True):
        assert seed["searched"] == [
            [one[key][part] for part in ("value", "low", "high", "n")] for key in ("asr", "cacc")
        ]
    assert list(sets["SmolLM2, searched cure"]["domain-wrapper"]) == [0, "1", "2"]
    asr, cacc = read_json(FIGURES / "06_frontier.json")["numbers"]["instructions-prefix"]["fine-pruning"]
    ((rows,),) = [sets["SmolLM2, all treatments"]["instructions-prefix"].values()]
    assert [one[0] for one in rows["fine-pruning"]] == [asr["value"], cacc["value"]]


# --- HTML -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads, where it links to, and the addresses in it."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.inline = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given[key] for key in ("id", "name") if given.get(key)]
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon", "prefetch"):
            self.loads.append(given["href"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


@cache
def pages_of(folder):
    """Path -> page, of all that is meant to be read; templates of the theme in `_static` are not."""
    paths = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts]
    return {path: Page(path.read_text(encoding="utf-8")) for path in paths}


def test_every_document_is_in_the_book(built):
    made = {path.relative_to(built).as_posix() for path in pages_of(built)}
    wanted = {f"notebooks/{path.stem}.html" for path in notebooks.all_notebooks()}
    wanted |= {f"notebooks/pages/{path.stem}.html" for path in (NOTEBOOKS / "pages").glob("*.md")}
    assert made >= wanted | {f"{name}.html" for name in ("index", "gallery", "scorecard", "play", "api", "search")}


def test_every_link_and_every_file_of_a_page_is_there(built):
    pages = pages_of(built)
    for path, page in pages.items():
        for address in {*page.links, *page.loads}:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, address)
            if parts.fragment and target in pages and not parts.fragment.startswith(":~:"):
                assert unquote(parts.fragment) in pages[target].ids, (path.name, address)


def test_nothing_is_loaded_from_the_network(built):
    for path, page in pages_of(built).items():
        assert [one for one in page.loads if urlsplit(one).scheme not in ("", "data") or one.startswith("//")] == [], (
            path
        )
    for path in built.rglob("*.css"):
        text = path.read_text(encoding="utf-8", errors="replace")
        assert re.findall(r"(?:@import\s+|url\(\s*)['\"]?(?:https?:)?//[^)'\"]*", text) == [], path


def test_the_gallery_has_every_figure_with_its_picture_and_numbers(built):
    page = pages_of(built)[built / "gallery.html"]
    for card in book.cards():
        assert card.id in page.ids
        assert f"figures/{card.id}.small.png" in page.loads
        assert {f"figures/{card.id}.json", f"notebooks/{card.notebook}.html#cell-{card.cell}"} <= {*page.links}
        assert read_json(built / "figures" / f"{card.id}.json") == read_json(FIGURES / f"{card.id}.json")


def test_the_scorecard_has_every_claim_once(built):
    ids = pages_of(built)[built / "scorecard.html"].ids
    assert [one for one in ids if one in CLAIMS] == CLAIMS


def test_notebooks_show_their_outputs_exercises_and_formulas(built):
    for path in notebooks.all_notebooks():
        text = (built / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        assert text.count("_images/") >= sum("image/png" in output.get("data", {}) for output in outputs)
        assert text.count("<details>") == sum(cell.source.count("<details>") for cell in cells)
        formulas = sum("$$" in cell.source for cell in cells if cell.cell_type == "markdown")
        assert text.count('<div class="math') >= formulas
        assert "hide-input" in text or "tag_hide" in text


def test_terms_lead_to_the_glossary_and_are_explained_on_the_spot(built):
    text = (built / "notebooks" / "03_head_attribution.html").read_text(encoding="utf-8")
    (title,) = {*re.findall(r'href="pages/glossary\.html#term-acie"[^>]*title="([^"]+)"', text)} or {None}
    assert title
    assert title.startswith("Average causal indirect effect")
    assert "term-acie" in pages_of(built)[built / "notebooks" / "pages" / "glossary.html"].ids


def test_the_search_knows_a_word_that_only_one_notebook_has(built):
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    assert "notebooks/03_head_attribution" in index
    assert '"glossari"' in index or "glossari" in index


# --- in a browser ---------------------------------------------------------------------------------------------------

LOOKS = [(width, theme) for width in (1280, 390) for theme in ("light", "dark")]


@pytest.fixture(params=LOOKS, ids=lambda look: f"{look[0]}-{look[1]}")
def browser(request, built):
    """A headless Chromium of one width and one theme, and the book."""
    if lacks := browsing.missing():
        pytest.skip(f"{lacks}. A browser is no Python package; the tests above read the same pages as HTML without one")
    width, theme = request.param
    with browsing.chromium(width=width, loggingPrefs={"browser": "ALL", "performance": "ALL"}) as driver:
        scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        yield driver, width, theme, built


WAIT = """
const done = arguments[0];
const loaded = document.readyState === "complete";
const ready = loaded ? Promise.resolve() : new Promise((go) => addEventListener("load", go));
ready.then(() => window.MathJax?.startup?.promise).then(() => {
  for (const image of document.images) image.loading = "eager";
  return Promise.all([...document.images].map((image) => image.decode().catch(() => null)));
}).then(() => done([
  document.documentElement.dataset.theme, document.documentElement.scrollWidth,
  [...document.images].filter((image) => !image.naturalWidth).map((image) => image.src),
  document.querySelectorAll(".math").length, document.querySelectorAll("mjx-container").length,
]));
"""


def test_pages_are_sound_in_a_browser(browser):
    driver, width, theme, folder = browser
    driver.set_script_timeout(60)
    for path in pages_of(folder):
        driver.get(path.as_uri())
        shown, wide, broken, formulas, drawn = driver.execute_async_script(WAIT)
        assert shown == theme, path
        assert wide <= width, path
        assert broken == [], path
        assert drawn >= formulas, path
        assert [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"] == [], path
    log = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    asked = [line["params"]["request"]["url"] for line in log if line["method"] == "Network.requestWillBeSent"]
    own = [one for one in asked if one.startswith("file:")]
    assert len(own) > 100
    assert [one for one in asked if urlsplit(one).scheme not in ("file", "data", "blob", "chrome")] == []


def test_sliders_move_the_figures(browser):
    driver, _, _, folder = browser
    driver.get((folder / "play.html").as_uri())
    state = """
const box = document.querySelector(`[data-play="${arguments[0]}"]`);
const plot = box.querySelector(".plot");
return JSON.stringify([plot.data, plot.layout?.shapes, box.querySelector(".said").textContent]);
"""
    move = """
const box = document.querySelector(`[data-play="${arguments[0]}"]`);
const control = box.querySelectorAll("input[type=range]")[arguments[1]];
control.value = +control.value === +control.max ? 0 : control.max;
control.dispatchEvent(new Event("input", { bubbles: true }));
"""
    choose = """
const choice = document.querySelector(`[data-play="${arguments[0]}"] select`);
choice.selectedIndex = arguments[1];
choice.dispatchEvent(new Event("input", { bubbles: true }));
return choice.value;
"""
    for name, sliders in (("vector", 2), ("heads", 1), ("guard", 1), ("frontier", 1)):
        first = driver.execute_script(state, name)
        assert len(json.loads(first)[0]) >= 2, name
        if name == "frontier":  # the first set has one seed only
            assert driver.execute_script(choose, name, 1) == "SmolLM2, searched cure"
            assert (first := driver.execute_script(state, name))
        for number in range(sliders):
            before = driver.execute_script(state, name)
            driver.execute_script(move, name, number)
            assert driver.execute_script(state, name) != before, (name, number)
        assert driver.execute_script(state, name) != first
    assert [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []


def test_the_scorecard_sorts_and_filters(browser):
    driver, _, _, folder = browser
    driver.get((folder / "scorecard.html").as_uri())
    rows = """
return [...document.querySelectorAll("#claims tbody tr")].filter((row) => !row.hidden).map((row) => row.id);
"""
    verdicts = {row["id"]: row["verdict"] for row in read_json(FIGURES / "scorecard.json")}
    assert driver.execute_script(rows) == CLAIMS
    column = 'document.querySelectorAll("#claims thead button")[arguments[0]].click();'
    driver.execute_script(column, 3)
    assert [verdicts[one] for one in driver.execute_script(rows)] == sorted(verdicts.values())
    driver.execute_script(column, 3)
    assert [verdicts[one] for one in driver.execute_script(rows)] == sorted(verdicts.values(), reverse=True)
    driver.execute_script("""
const form = document.getElementById("filters");
form.elements.verdict.value = "holds";
form.dispatchEvent(new Event("input"));
""")
    assert {*driver.execute_script(rows)} == {name for name, verdict in verdicts.items() if verdict == "holds"}


def test_the_search_finds_a_word(browser):
    driver, _, _, folder = browser
    driver.get((folder / "search.html").as_uri() + "?q=surrogate")
    found = """
const done = arguments[0];
const look = () => {
  const link = document.querySelector("#search-results li a[href*='pages/glossary.html']");
  link ? done(link.textContent) : setTimeout(look, 100);
};
look();
"""
    driver.set_script_timeout(60)
    assert driver.execute_async_script(found) == "Glossary"
    assert [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []
