"""What differs is found, with its place, the value that is there and what it should be."""

import io

import matplotlib.image
import nbformat
import numpy as np
import pytest

from bkd_utils.running.comparing import AT_MOST, Comparison, outputs

WHERE = {"place": "a.json", "source": "b.json"}


def found(one, other):
    comparison = Comparison("things")
    comparison.values(one, other, **WHERE)
    return comparison.compared, comparison.findings


def picture(pixels):
    stream = io.BytesIO()
    matplotlib.image.imsave(stream, pixels, format="png")
    return stream.getvalue()


SHARE = 23 / 24
VALUE = {"asr": [SHARE, {"n": 12, "who": "a"}], "none": None, "yes": True}


def test_equal_values_are_counted():
    assert found(VALUE, VALUE) == (5, [])


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            VALUE | {"asr": [0.9583333333333333, VALUE["asr"][1]]},
            "a.json, /asr/0: 0.9583333333333333, should be 0.9583333333333334",
        ),
        (VALUE | {"asr": [SHARE, {"n": 13, "who": "a"}]}, "a.json, /asr/1/n: 13, should be 12"),
        (VALUE | {"asr": [SHARE, {"n": 12, "who": "b"}]}, "a.json, /asr/1/who: b, should be a"),
        (VALUE | {"none": 0}, "a.json, /none: 0, should be None"),
        (VALUE | {"yes": 1}, "a.json, /yes: 1, should be True"),
        (VALUE | {"asr": [SHARE]}, "a.json, length of /asr: 1, should be 2"),
        (VALUE | {"more": 1}, "a.json, /more: is not in b.json"),
        ({key: VALUE[key] for key in ("asr", "none")}, "a.json, /yes: is missing; it is in b.json"),
    ],
)
def test_a_value_is_named_by_its_path(changed, line):
    (finding,) = found(changed, VALUE)[1]
    assert finding.startswith(line)


def test_a_number_in_a_text_is_named_by_its_line_and_by_its_place_there():
    text = "one\n| a | 97.5 % [94.3, 98.9] |\n"
    assert found(text, text) == (3, [])
    line = "a.json, line 2, number 3: 98.8, should be 98.9 (from b.json)"
    assert found(text.replace("98.9", "98.8"), text)[1] == [line]
    assert found(text.replace("| a", "| b"), text)[1] == [
        "a.json, line 2: | b | 97.5 % [94.3, 98.9] |, should be | a | 97.5 % [94.3, 98.9] | (from b.json)"
    ]
    assert found(text + "more", text)[1] == ["a.json, number of lines: 3, should be 2 (from b.json)"]
    assert found(text.strip(), text)[1] == ["a.json: spaces or ends of lines differ"]
    assert found(f" {text}", text)[1] == ["a.json: spaces or ends of lines differ"]
    assert found("-0.5\n", "0.5\n")[1] == ["a.json, line 1: -0.5, should be 0.5 (from b.json)"]
    assert found({"a": ["x\n1"]}, {"a": ["x\n2"]})[1] == [
        "a.json, /a/0, line 2, number 1: 1, should be 2 (from b.json)"
    ]


def test_many_differences_of_one_place_are_a_few_lines_and_a_count():
    findings = found(list(range(100)), list(range(1, 101)))[1]
    assert len(findings) == AT_MOST + 1
    assert findings[-1] == f"a.json: {100 - AT_MOST} more differences"


def test_pictures_are_compared_by_their_pixels():
    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    changed = pixels.copy()
    changed[2, 5, 0] = 1
    assert found(picture(pixels), picture(pixels)) == (1, [])
    assert found(picture(changed), picture(pixels))[1] == [
        "a.json: 1 of 24 pixels differ, the first at 5, 2: [1, 0, 0, 0], should be [0, 0, 0, 0] (from b.json)"
    ]
    (other,) = found(picture(pixels[:3]), picture(pixels))[1]
    assert other == "a.json: 6 x 3 pixels, should be 6 x 4 pixels (from b.json)"
    assert "no whole picture" in found(picture(pixels)[:40], picture(pixels))[1][0]


def test_outputs_of_another_kind_or_number_are_found():
    text = nbformat.v4.new_output("stream", name="stdout", text="1\n")
    shown = nbformat.v4.new_output("display_data", data={"text/plain": "1"})
    result = nbformat.v4.new_output("execute_result", data={"text/plain": "1"})
    one, two, three, none = (
        outputs(nbformat.v4.new_code_cell(outputs=given)) for given in ([text], [shown], [result], [])
    )
    assert found(one, one) == (2, [])
    assert found(two, one)[1] == [
        "a.json, /0/type: display_data, should be stream (from b.json)",
        "a.json, /0/stdout: is missing; it is in b.json",
        "a.json, /0/text/plain: is not in b.json",
    ]
    assert found(three, two)[1] == ["a.json, /0/type: execute_result, should be display_data (from b.json)"]
    assert found(none, one)[1] == ["a.json, length of /: 0, should be 1 (from b.json)"]
    changed = nbformat.v4.new_output("stream", name="stdout", text="2\n")
    assert found(outputs(nbformat.v4.new_code_cell(outputs=[changed])), one)[1] == [
        "a.json, /0/stdout, line 1, number 1: 2, should be 1 (from b.json)"
    ]
