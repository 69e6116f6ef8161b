"""Paper 1, Backdoor Attribution (BkdAttr, arXiv 2509.21761): probes (section 3.1), effects of heads (section 3),
ablation (section 3.3) and the backdoor vector (section 4). Methods only; `experiments` measures with them.

In the examples `model` is a tiny random Llama of 2 layers with 4 heads of 8 numbers, and `prompts` are four prompts,
each a list of token ids. A head is a pair (layer, head), both counted from 0. torch and numpy (as np) are imported.
"""

from bkd_utils.backdoor_attribution.ablation import ablated
from bkd_utils.backdoor_attribution.attribution import gradient_effects, head_effects, head_means, ranked_heads
from bkd_utils.backdoor_attribution.probe import probe_scores
from bkd_utils.backdoor_attribution.vector import backdoor_vector, steer

__all__ = ["ablated", "backdoor_vector", "gradient_effects", "head_effects", "head_means", "probe_scores"]
__all__ += ["ranked_heads", "steer"]
