"""The package against brute force on tiny models; `python tests/architectures.py` does it for all architectures."""

import itertools

import against_brute_force as against
import architectures
import brute_force as brute
import pytest
import torch
from architecture_table import BY_NAME, QUICK, TABLE, folder, small_tokenizer

from bkd_utils.common.files import ROOT, read_json
from bkd_utils.models.folders import ModelError

# What these models cannot do; everything else must agree with brute force.
REFUSED = {
    "qwen3_next": {"attribute", "components", "steer", "slice", "compare maps"},
    "deepseek_v3": {"slice", "bridge"},
    "falcon_new": {"bridge"},
}


@pytest.fixture(scope="module", params=QUICK)
def case(request, tmp_path_factory):
    return against.make(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def told(case):
    return architectures.asked(case)


@pytest.mark.parametrize("capability", against.CAPABILITIES)
def test_a_capability_agrees_with_brute_force_or_is_refused(case, told, capability):
    finding = architectures.examine(case, against.CAPABILITIES[capability], told.get(capability))
    wanted = "refused" if capability in REFUSED.get(case.name, ()) else "ok"
    assert finding.state == wanted, str(finding)


def test_brute_force_tells_heads_layers_and_positions_apart(tmp_path):
    """Without this, agreement would mean little: a neighbour's effect must differ by far more than rounding."""
    case = against.make("llama", tmp_path / "model")
    given = {"target": case.target, "means": case.means, "against": case.against[:2]}
    found = brute.head_effects(case.plain, case.known, case.prompts[:2], **given)
    for exact in found.values():
        assert exact.abs().max() > 1e-3
        for moved in (exact.roll(1, dims=2), exact.roll(1, dims=1), exact.flip(0), 1.01 * exact):
            assert against.off(moved, exact) > 10 * architectures.LIMITS[torch.float32]
        assert against.off(exact + float("nan"), exact) == float("inf")
    for one, other in itertools.permutations(found.values(), 2):  # a metric in place of another is seen
        assert against.off(one, other) > 10 * architectures.LIMITS[torch.float32]


def test_heads_are_told_apart_by_gradients(tmp_path):
    """Grouped heads: every head has query rows of its own, two and two share their keys and values."""
    case = against.make("llama", tmp_path / "model")
    found = brute.owned(case.plain, case.known, 1, case.prompts[:1])
    query = found["query"]["model.layers.1.self_attn.q_proj.weight"]
    key = found["key and value"]["model.layers.1.self_attn.k_proj.weight"]
    assert [mask.any(1).nonzero().flatten().tolist() for mask in query] == [
        list(range(12 * head, 12 * head + 12)) for head in range(4)
    ]
    assert [mask.any(1).nonzero().flatten().tolist() for mask in key] == [
        list(range(12 * group, 12 * group + 12)) for group in (0, 0, 1, 1)
    ]
    assert not found["query"]["model.layers.1.self_attn.k_proj.weight"][0].any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "glm4", "olmo2", "gptj"])
def test_the_table_says_where_the_stream_gains_a_vector(tmp_path, name):
    plain, known = brute.load_plain(folder(name, tmp_path)), BY_NAME[name]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for layer in range(len(brute.layers(plain, known))):
        assert against.off(brute.stream_gain(plain, known, layer, vector, [5, 6, 7, 8]), vector) < 1e-4


def examined(check, told):
    case = against.Case("llama", folder=None)
    return architectures.examine(case, check, told)


def refuse(_case):
    raise ModelError("no heads")


def stumble(_case):
    raise KeyError("heads")


@pytest.mark.parametrize(
    ("check", "told", "state"),
    [
        (lambda _: {"CIE": 1e-6}, None, "ok"),
        (lambda _: {"CIE": 1e-6}, "", "ok"),
        (lambda _: {"CIE": 1e-2}, "", "WRONG"),
        (lambda _: {"CIE": float("nan")}, "", "WRONG"),
        (refuse, None, "refused"),
        (refuse, "heads are shared", "refused"),
        (refuse, "", "refused late"),
        (stumble, "", "traceback"),
        (stumble, None, "traceback"),
    ],
)
def test_findings_are_sorted_by_what_the_self_test_has_promised(check, told, state):
    assert examined(check, told).state == state


def test_every_architecture_of_the_table_has_a_name_of_its_own_and_short_names_exist():
    assert len(BY_NAME) == len(TABLE) >= 60
    assert set(QUICK) <= set(BY_NAME)
    assert set(architectures.IN_BF16) <= set(BY_NAME)


def test_the_small_tokenizer_gives_text_back():
    text = "Name a colour of the sky and one of the sea."
    assert small_tokenizer().decode(small_tokenizer()(text).input_ids) == text


def test_the_page_holds_the_results():
    results = read_json(architectures.RESULTS)
    text = architectures.PAGE.read_text(encoding="utf-8")
    assert architectures.with_parts(text, results) == text
    states = {row["state"] for rows in results["architectures"].values() for row in rows.values()}
    assert states <= {"ok", "refused"}, "the record has failures; mend them and run the sweep again"


def test_the_readme_says_what_the_sweep_shows():
    rows = read_json(architectures.RESULTS)["architectures"].values()
    whole = sum(all(one["state"] == "ok" for name, one in row.items() if name != "bridge") for row in rows)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Of {len(rows)} tiny models, [{whole} can do everything](" in text
