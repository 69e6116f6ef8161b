"""Tables of the notebooks."""

import math

from bkd_utils.common.spot_checks import Checked
from bkd_utils.reports import tables


def checked(id, *, numbers, worst, tolerance, seconds):
    values = {"beyond": 0, "place": "x", "shipped": 1, "now": 1, "agrees": True}
    return Checked(id=id, numbers=numbers, worst=worst, tolerance=tolerance, seconds=seconds, **values)


def test_what_was_measured_again_has_a_row_by_stage():
    found = [
        checked("attribute_heads/3f2", numbers=270, worst=1e-6, tolerance=0.001, seconds=4.5),
        checked("measure_organism/a01", numbers=24, worst=math.inf, tolerance=0.0, seconds=2.0),
    ]
    table = tables.spot_checks(found)
    assert table.index.name == "measured again"
    assert table.columns.tolist() == ["numbers", "largest difference", "allowed", "seconds"]
    assert table.loc["attribute_heads"].tolist() == [270, 1e-6, 0.001, 4.5]
    assert table.loc["measure_organism"].tolist() == [24, math.inf, 0.0, 2.0]


def test_where_nothing_was_measured_again_one_line_says_so():
    table = tables.spot_checks([])
    assert table.index.tolist() == ["nothing that ships was used"]
    assert set(table.iloc[0]) == {""}
