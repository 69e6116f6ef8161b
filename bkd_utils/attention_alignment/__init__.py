"""Paper 2, Attention Safety Alignment (ASA, arXiv 2511.13789), in our reading, for its formulas are not known to us:
likeness of heads, head safety evaluation and alignment; beside them rival treatments and guards of the input.

In the examples `model` is a tiny random Llama of 2 layers with 4 heads of 8 numbers, with its `tokenizer`; `prompts`
are four prompts, each a list of token ids. `rows` are eight training rows, each a prompt and an answer in token ids,
and `recipe` is a training of two steps. A head is a pair (layer, head), both counted from 0. torch is imported."""

from bkd_utils.attention_alignment.alignment import aligned
from bkd_utils.attention_alignment.head_tuning import tune
from bkd_utils.attention_alignment.rivals import treat
from bkd_utils.attention_alignment.similarity import READINGS, head_similarity
from bkd_utils.attention_alignment.surrogates import reaction, surrogate
from bkd_utils.attention_alignment.suspicion import gate_importance, suspicious

__all__ = ["READINGS", "aligned", "gate_importance", "head_similarity", "reaction", "surrogate", "suspicious", "treat"]
__all__ += ["tune"]
