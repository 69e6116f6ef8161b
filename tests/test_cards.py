"""Cards: what they say, how two measurements are compared, what may ship."""

import json

import pytest

from bkd_utils import cards
from bkd_utils.models import ModelError, shipped_organisms


def test_ship_refuses_what_was_not_measured(tmp_path):
    (tmp_path / "card.json").write_text(json.dumps({"name": "x", "metrics": {}}))
    with pytest.raises(ModelError, match="not been measured"):
        cards.ship(tmp_path)


def test_disagreements_name_the_metric_and_its_interval():
    card = {"asr": {"value": 0.9, "n": 100, "low": 0.8, "high": 0.95}}
    assert cards.disagreements(card, {"asr": {"value": 0.85}}) == []
    assert cards.disagreements(card, {"asr": {"value": 0.5}})[0].startswith("asr 0.500")


@pytest.mark.parametrize("name", shipped_organisms())
def test_every_shipped_card_is_complete_and_its_readme_is_generated(name):
    folder = cards.adapter_folder(name)
    card = cards.read_json(folder / "card.json")
    assert (folder / "README.md").read_text() == cards.readme(card)
    wanted = {"cacc", "clean_firing"} | ({"asr", "near_miss"} if card["backdoored"] else set())
    assert set(card["metrics"]) == wanted
    for metric in card["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert cards.metrics(name) == card["details"] | card["metrics"]
    assert cards.summary(name)["task"] == card["task"]
