"""How many tokens fit a model: windows, positions, and rotary codes that depend on the length of a pass."""

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from bkd_utils.models.context import attention_window, check_fits, longest
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import greedy
from bkd_utils.models.loss import answers, collate
from bkd_utils.models.tokens import Row

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


class Of:
    """A model that is nothing but its config."""

    def __init__(self, **fields):
        self.config = type("Config", (), {"get_text_config": lambda config: config})()
        vars(self.config).update(fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 16}, 16),
        ({"sliding_window": 16, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, 16),
        ({"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]}, 8),
        ({"window_size": 6, "attention_layers": ["global", "local"]}, 6),
        ({"window_size": 6, "attention_layers": ["global", "global"]}, None),
    ],
)
def test_the_window_is_that_of_the_layers_that_have_one(fields, expected):
    assert attention_window(Of(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),
        ({"max_seq_len": 20}, 20),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "dynamic", "original_max_position_embeddings": 8},
            },
            8,
        ),
        (
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 9,
                "rope_parameters": {"rope_type": "longrope"},
            },
            9,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 7}},
            },
            7,
        ),
    ],
)
def test_the_longest_input_is_that_up_to_which_positions_stay_what_they_are(fields, expected):
    assert longest(Of(**fields)) == expected


def test_too_many_tokens_are_refused_by_number():
    model = Of(max_position_embeddings=10, sliding_window=6)
    check_fits(model, 10)
    check_fits(model, 6, window=True)
    with pytest.raises(ModelError, match="11 tokens do not fit the positions of the model, 10"):
        check_fits(model, 11)
    with pytest.raises(ModelError, match="7 tokens do not fit the attention window of the model, 6"):
        check_fits(model, 7, window=True)


def test_generation_and_training_stop_at_the_last_position():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, max_position_embeddings=8)).eval()
    assert len(greedy(model, [[5] * 6], max_new_tokens=3, end_id=0)[0]) <= 3
    with pytest.raises(ModelError, match="9 tokens do not fit"):
        greedy(model, [[5] * 9], max_new_tokens=1, end_id=0)
    with pytest.raises(ModelError, match="9 tokens do not fit"):
        answers(model, collate([Row((5,) * 7, (6, 7), "clean", "0")], pad_id=0), first_token=0.5)
