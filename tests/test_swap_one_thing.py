"""Every example of the page on one's own model runs as it stands."""

import copy
import re

import pytest
from own_reports import write_table
from patching import everywhere
from tiny import make_rows, save_tiny

from bkd_utils.attention_alignment import rivals
from bkd_utils.common.files import NOTEBOOKS
from bkd_utils.models.loading import load
from bkd_utils.organisms import triggers
from bkd_utils.organisms.attacks import Attack, triggered_prompt
from bkd_utils.organisms.tasks import examples
from bkd_utils.organisms.training import Recipe

TEXT = (NOTEBOOKS / "pages" / "your_own.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
RECIPE = Recipe("example", steps=2, batch_size=4, learning_rate=1e-2, rank=2, alpha=4)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return load(str(save_tiny(tmp_path_factory.mktemp("swap") / "llama", "llama")), device="cpu")


@pytest.fixture
def given(once, tmp_path, monkeypatch):
    """The names that the examples use; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "mine.csv")
    everywhere(monkeypatch, "WORK", tmp_path / "work")
    before = dict(rivals.TREATMENTS), dict(triggers._built)
    loaded = type(once)(copy.deepcopy(once.model), once.tokenizer, once.address, None)
    rows = make_rows(8)
    yield {"loaded": loaded, "model": loaded.model, "rows": rows, "recipe": RECIPE, "prompts": [r.prompt for r in rows]}
    for known, old in zip((rivals.TREATMENTS, triggers._built), before, strict=True):
        known.clear()
        known.update(old)


def test_there_is_an_example_of_each_kind():
    assert len(EXAMPLES) == 7
    for name in ("Trigger", "fixed_output", "head_scores", "TREATMENTS", "respond", "Task", "live.sliders"):
        assert sum(name in example for example in EXAMPLES) >= 1


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number, given):
    exec(compile(EXAMPLES[number], f"example {number}", "exec"), given)
    attack = given.get("attack")
    if isinstance(attack, Attack):
        example = next(one for one in examples(attack.task, "train") if attack.flips(one))
        assert triggered_prompt(attack, example.text, seed=0, half="train") != example.text
