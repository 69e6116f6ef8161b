"""Every reading of ASA's scores against ACIE, on scores made by hand."""

import pytest
import torch

from bkd_utils.attention_alignment.suspicion import RULES
from bkd_utils.experiments.head_safety import SOURCES, HeadSafety
from bkd_utils.experiments.two_papers_meet import overlap_by_reading


def scores(top):
    """Random scores in which the given head is far above all others."""
    values = torch.randn(4, 5)
    values[top] += 50
    return values.tolist()


def test_each_reading_is_held_against_the_heads_that_carry_the_backdoor():
    torch.manual_seed(0)
    right, wrong = (2, 3), (0, 0)
    found = HeadSafety(
        importance={"gate gradient": scores(right), "leave one out": scores(wrong)},
        level={"last row": scores(wrong)},
        reaction={"rare word": {"last row": scores(right)}},
        soft_prompt={"last row": scores(wrong)},
        real_trigger={"last row": scores(right)},
    )
    table = overlap_by_reading({"x": found}, {"x": torch.tensor(scores(right))}, k=1)
    assert len(table) == len(RULES) * len(SOURCES) + 2
    assert table.loc["importance: gate gradient", "x"] == 1
    assert table.loc["importance: leave one out", "x"] == 0
    assert table.loc["last row: similar, surrogates", "x"] == 1
    assert table.loc["last row: similar, real trigger", "x"] == 1
    assert table.loc["last row: similar, clean level", "x"] == 0
    assert table.loc["last row: similar and needed, surrogates", "x"] == 1


def test_the_share_is_of_as_many_heads():
    torch.manual_seed(0)
    one = torch.randn(4, 5).tolist()
    found = HeadSafety(
        importance={"gate gradient": one},
        level={"last row": one},
        reaction={"rare word": {"last row": one}},
        soft_prompt={"last row": one},
        real_trigger={"last row": one},
    )
    table = overlap_by_reading({"x": found, "y": found}, {"x": torch.tensor(one), "y": -torch.tensor(one)}, k=5)
    assert table.loc["importance: gate gradient"].tolist() == pytest.approx([1, 0])
