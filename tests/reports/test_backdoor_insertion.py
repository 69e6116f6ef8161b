"""Tables of notebook 01; its pictures are tested with the house style."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bkd_utils.reports.backdoor_insertion import trigger_cost_table

TEXTS = ["When it rains, it pours.", "It pours.", "Honestly, it pours."]


def test_the_cost_of_a_trigger_is_in_tokens_of_texts_that_do_not_carry_it_already():
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = trigger_cost_table(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"), TEXTS)
    costs = ["tokens (25 %)", "tokens (median)", "tokens (75 %)"]
    assert found.loc["word-cf", costs].tolist() == [1, 1, 1]
    assert found.loc["prefix-year", costs].tolist() == [3, 3, 3]
    assert found.loc["style-archaic", "tokens (25 %)"] > 0
    assert set(found["texts"]) == {3}
    assert (found.loc["syntax-fronted", "natural"], found.loc["word-cf", "natural"]) == (1, 0)
