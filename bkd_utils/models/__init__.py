"""A language model: load it, ask it, read what happens inside it, edit it. Nothing here knows of backdoors.

In the examples `loaded` is a tiny random Llama of 2 layers with 4 heads of 8 numbers, with its tokenizer; `model` is
`loaded.model`, and `folder` is where it is saved. `prompts` are four prompts, each a list of token ids. With a real
model: `loaded = load()` and `prompts = [tokens.prompt_ids(loaded.tokenizer, "Name a colour.")]`. torch is imported."""

from bkd_utils.models.activations import head_outputs, residuals
from bkd_utils.models.generation import respond
from bkd_utils.models.loading import Loaded, load

__all__ = ["Loaded", "head_outputs", "load", "residuals", "respond"]
