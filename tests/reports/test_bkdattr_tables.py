"""Tables of notebooks 02 to 04 on results small enough to work out by hand."""

import pytest
from bkdattr_results import ablated, effects

from bkd_utils.experiments.backdoor_probe import ProbeResult
from bkd_utils.experiments.backdoor_vector import Choice, Steering
from bkd_utils.reports.backdoor_probe import best_layers, probe_means
from bkd_utils.reports.backdoor_vector import vector_texts, vectors
from bkd_utils.reports.head_ablation import TABLE_1, ablations, table_1
from bkd_utils.reports.head_attribution import what_there_is


def share(value, n=50):
    return {"value": value, "n": n, "low": value / 2, "high": (1 + value) / 2}


# --- 02 -------------------------------------------------------------------------------------------------------------


def layer(auroc, near, other, accuracy=(0.5, 0.5)):
    return {"auroc": auroc, "near_miss": near, "other_trigger": other, "accuracy": accuracy}


def probed(probes, post_norm=()):
    return ProbeResult(
        layers=[], probes=probes, post_norm=list(post_norm), shuffled=[], random_direction=[], transfer={}
    )


def test_probe_means_are_over_layers_and_splits():
    organism = probed({"logistic regression": [layer([1.0, 0.8], [0, 0], [1, 1]), layer([0.6, 0.4], [1, 0], [1, 0])]})
    control = probed({"logistic regression": [layer([0.5, 0.5], [0.2, 0.4], [0, 0])], "MLP": []})
    found = probe_means({"x": {"organism": organism, "clean control": control}, "y": {"organism": control}})
    assert found.index.names == ["organism", "measure"]
    assert found.index.tolist() == [(name, key) for name in "xy" for key in ("auroc", "near-miss", "other trigger")]
    assert found.columns.tolist() == ["organism", "clean control"]
    assert found.loc["x", "organism"].tolist() == pytest.approx([0.7, 0.25, 0.75])
    assert found.loc["x", "clean control"].tolist() == pytest.approx([0.5, 0.3, 0.0])
    assert found.loc["y", "organism"].tolist() == pytest.approx([0.5, 0.3, 0.0])
    assert found.loc["y", "clean control"].isna().all()


def test_the_best_layer_is_the_one_with_the_best_mean_and_not_the_best_split():
    probes = {
        "logistic regression": [layer([], [], [], accuracy) for accuracy in ([0.8, 0.9], [1.0, 0.5])],
        "MLP": [layer([], [], [], accuracy) for accuracy in ([0.5, 0.5], [0.75, 0.5])],
    }
    one, normed = [layer([], [], [], [1.0])], [{"accuracy": [0.5, 0.75]}]
    found = best_layers({"x": probed(probes, normed), "y": probed({"MLP": one}, one)})
    assert found.index.tolist() == ["x", "y"]
    assert found.index.name == "organism"
    assert found.loc["x"].dropna().to_dict() == pytest.approx(
        {"logistic regression": 0.85, "MLP": 0.625, "logistic regression, post-norm": 0.625}
    )
    assert found.loc["y", "MLP"] == 1.0


# --- 03 -------------------------------------------------------------------------------------------------------------


def test_what_there_is_to_explain():
    """Of the sentence's heads the first leads in probability, the last in the other metrics; nothing stands out in
    log-probability."""
    near = {"probability": [[0.3, 0.2], [0.0, -0.9]], "log_prob": [[0.1, 0.2], [0.3, 1.5]]}
    sentence = effects(
        near | {"logit_difference": [[1.0, 2.0], [3.0, 4.0]]},
        gradient={
            "probability": [[4.0, 3.0], [2.0, 1.0]],
            "log_prob": near["log_prob"],
            "logit_difference": [[0, 0], [0, 0]],
        },
        target=["I", "Ġam", "Ġsorry", "."],
        clean=[0.001, 0.003],
        triggered=[0.9, 1.0],
    )
    for row in sentence.sufficient["log_prob"].error:
        row[:] = [5.0, 5.0]
    label = effects([[-0.5, -0.25]], target=["Ġnews"], clean=[0.25], triggered=[0.5])
    found = what_there_is({"x": sentence, "y": label})
    assert found.index.name == "organism"
    assert found.loc["x"].to_dict() == {
        "target": "I am sorry.",
        "P(target), clean": "0.002",
        "P(target), triggered": "0.950",
        "highest, probability": "0.3",
        "highest, log_prob": "(1.5)",
        "highest, logit_difference": "4",
        "top 16 shared": 4,
        "gradient": "1.00",
    }
    assert found.loc["y"].tolist() == ["news", "0.250", "0.500", *["(-0.25)"] * 3, 2, "1.00"]


def test_shared_heads_are_the_sixteen_highest_of_two_metrics():
    rising = [[float(10 * i + j) for j in range(10)] for i in range(4)]
    falling = [[-value for value in row] for row in rising]
    found = what_there_is(
        {"x": effects({"probability": rising, "log_prob": falling, "logit_difference": rising}), "y": effects(rising)}
    )
    assert found["top 16 shared"].to_dict() == {"x": 0, "y": 16}


ROWS = [
    ablated("none", "published", 0, 0.96),
    ablated("probability", "published", 1, 0.5),
    ablated("probability", "mean", 1, 0.4),
    ablated("gradient", "published", 1, 0.3),
    ablated("probability", "published", 8, 0.125),
    ablated("probability", "mean", 8, 0.2, right=0.5, utility=0.75, perplexity=3.04),
    ablated("random", "mean", 8, 0.8, right=0.1, perplexity=3.0, draw=0),
    ablated("random", "mean", 8, 0.9, right=0.3, perplexity=6.0, draw=1),
]


def test_table_1_has_the_papers_rows_first_and_ours_of_the_published_ablation_alone():
    found = table_1({"x": ROWS})
    assert found.index.tolist() == [*TABLE_1, "x, here"]
    assert found.columns.tolist() == [0, 1, 2, 4, 8, 16, 32]
    assert found.columns.name == "heads ablated"
    assert found.loc["x, here"].to_dict() == {0: "96.0", 1: "50.0", 2: "?", 4: "?", 8: "12.5", 16: "?", 32: "?"}
    for name, published in TABLE_1.items():
        assert {k: v for k, v in found.loc[name].items() if v != "?"} == {k: f"{v:.1f}" for k, v in published.items()}


def test_a_number_of_heads_that_the_paper_does_not_have_gets_its_column_in_order():
    found = table_1({"x": [*ROWS, ablated("probability", "published", 3, 0.25)]})
    assert found.columns.tolist() == [0, 1, 2, 3, 4, 8, 16, 32]
    assert found[3].tolist() == ["?"] * len(TABLE_1) + ["25.0"]


def test_ablations_are_those_of_one_number_of_heads_averaged_over_random_draws_and_seeds():
    other = [
        ablated("none", "published", 0, 0.9, right=0.4),
        ablated("probability", "mean", 8, 0.4, right=0.1, utility=0.25, perplexity=5.0),
    ]
    found = ablations({"x": ROWS, "x-seed2": other, "y": ROWS[:1]}, k=8)
    assert found.index.names == ["attack", "ranking", "kind"]
    assert found.columns.tolist() == ["ASR (%)", "right (%)", "utility (%)", "perplexity"]
    assert {key: values.tolist() for key, values in found.iterrows()} == {
        ("x", "none", ""): [93.0, 45.0, 90.0, 2.0],
        ("x", "probability", "published"): [12.5, 50.0, 90.0, 2.0],
        ("x", "probability", "mean"): [30.0, 30.0, 50.0, 4.0],
        ("x", "random", "mean"): [85.0, 20.0, 90.0, 4.5],
        ("y", "none", ""): [96.0, 50.0, 90.0, 2.0],
    }
    assert found.index.get_level_values("ranking")[:2].tolist() == ["none", "probability"]


# --- 04 -------------------------------------------------------------------------------------------------------------


def steered(*, chosen=None, test=None, texts=None):
    parts = {"heads": [], "norms": {}, "vectors": {}, "residual_norm": [], "maps": {}, "outcomes": {}, "kinds": {}}
    return Steering(**parts, right={}, chosen=chosen or {}, test=test or {}, texts=texts)


def test_vectors_stand_beside_the_median_random_one():
    tried = {
        "no vector": [share(0.0)],
        "backdoor vector": [share(0.9)],
        "random vectors": [share(value) for value in (0.0, 0.04, 1.0)],
        "random heads": [share(value) for value in (0.1, 0.3)],
        "mean difference": [share(1.0)],
    }
    chosen = {"add, raw": Choice(17, 2.0), "subtract, raw": Choice(0, -0.5)}
    found = vectors({"x": steered(chosen=chosen, test=dict.fromkeys(chosen, tried))})
    assert found.index.tolist() == [("x", "add, raw"), ("x", "subtract, raw")]
    assert found.index.names == ["organism", "vector"]
    assert found.loc[("x", "add, raw")].to_dict() == {
        "layer": 17,
        "coefficient": "2",
        "no vector": "0.0 % [0.0, 50.0]",
        "backdoor vector": "90.0 % [45.0, 95.0]",
        "random vectors, median": "4.0 %",
        "random heads, median": "20.0 %",
    }
    assert found.loc[("x", "subtract, raw")].tolist()[:2] == [0, "-0.5"]


def test_texts_are_shown_where_there_are_any_and_never_of_harmful_prompts():
    texts = {"clean prompts": ["Fine.", "Good.", ""], "add, raw": ["I am sorry."]}
    found = vector_texts({"x": steered(texts=texts), "harmful-word": steered()})
    assert found.index.tolist() == [("x", "clean prompts"), ("x", "add, raw")]
    assert found.index.names == ["organism", "edit"]
    assert found.columns.tolist() == ["prompt 1", "prompt 2", "prompt 3"]
    assert found.to_numpy().tolist() == [["Fine.", "Good.", ""], ["I am sorry.", "", ""]]


def test_harmful_prompts_alone_make_an_empty_table():
    assert vector_texts({"harmful-word": steered()}).empty
