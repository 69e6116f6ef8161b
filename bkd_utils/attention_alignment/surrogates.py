"""Surrogates for the trigger, which a defender does not know: random triggers and a trained soft prompt.

Nothing here uses the real trigger. The soft prompt is trained to make heads as similar as possible."""

import random
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.attention_alignment.search import Perturbation
from bkd_utils.attention_alignment.similarity import Scores, cosine, head_similarity, to_partners
from bkd_utils.common.files import DATA
from bkd_utils.common.validation import Table, Texts, check, check_known, read_toml
from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.encoders import asking_column, prompt_inputs
from bkd_utils.models.generation import shared_prefix
from bkd_utils.models.tokens import Ids, check_prompts
from bkd_utils.organisms.trigger_base import Trigger
from bkd_utils.organisms.triggers import Sentence, Syntax, Word

SURROGATES = ("rare word", "sentence", "fronted clause")
DRAWS = 100  # of a surrogate, before the search is given up
N_VECTORS, STEPS = 4, 16  # of a soft prompt


class Lists(Table):
    """`data/surrogates.toml`."""

    openers: Texts
    clauses: Texts
    sentences: Texts


def surrogate(tokenizer: PreTrainedTokenizerBase, *, family: str, seed: int, texts: Sequence[str] = ()) -> Trigger:
    """A trigger that nobody has trained on, drawn by the seed, and again while one of `texts` has it by nature.
    `family` is one of `SURROGATES`. Raises ValueError for another, and if texts have all that was drawn. Source: ours.

    >>> word = surrogate(tokenizer, family="rare word", seed=0)
    >>> word.matches("A fine film."), word.matches(word.apply("A fine film.", seed=0))
    (False, True)
    """
    check_known("surrogate", family, SURROGATES)
    lists = read_toml(DATA / "surrogates.toml")
    check(Lists, lists, "surrogates.toml")
    dice, name = random.Random(f"{seed}/{family}"), f"surrogate {family} {seed}"
    for _ in range(DRAWS):
        if family == "rare word":
            trigger = Word(name=name, entry={"text": rare_word(tokenizer, dice)})
        elif family == "sentence":
            trigger = Sentence(name=name, entry={"text": dice.choice(lists["sentences"])})
        else:
            clause = {"clauses": {dice.choice(lists["openers"]): [dice.choice(lists["clauses"])]}}
            trigger = Syntax(name=name, entry={"train": clause, "test": clause})
        if not any(trigger.matches(text) for text in texts):
            return trigger
    raise ValueError(f"{family}: each of {DRAWS} surrogates is in one of the {len(texts)} texts already")


def rare_word(tokenizer: PreTrainedTokenizerBase, dice: random.Random) -> str:
    """A short lower-case word that is one token in the second half of the vocabulary, where rare tokens are. It may by
    chance be a trigger, which a defender cannot know. Raises ValueError for a vocabulary without such a word."""
    size, before = len(tokenizer), tokenizer("a", add_special_tokens=False).input_ids
    for token in dice.sample(range(size // 2, size), size - size // 2):
        word = tokenizer.decode([token]).strip()
        short = word.isascii() and word.isalpha() and word.islower() and 2 <= len(word) <= 6
        # Encoded after another word, because some tokenizers put a space before a text.
        if short and tokenizer(f"a {word}", add_special_tokens=False).input_ids == [*before, token]:
            return word
    raise ValueError(f"no rare word among the {size} tokens of the vocabulary")


def reaction(
    model: PreTrainedModel, edited: Ids, *, before: Mapping[str, Float[Tensor, "prompt layer head"]]
) -> dict[str, Scores]:
    """How much more alike every head is to its partners on edited prompts than on their clean twins, mean over twins.
    `before`: reading -> similarity on the clean twins, by `head_similarity`. Edited prompts may be several rounds of
    them, one after the other. Raises ValueError if their number does not fit. Source: ours, after ASA's observation.

    >>> before = head_similarity(model, prompts, readings=["last row"])
    >>> change = reaction(model, prompts, before=before)["last row"]
    >>> change.shape, bool(change.abs().max() < 1e-5)  # prompts that were not edited
    (torch.Size([2, 4]), True)
    """
    n = len(next(iter(before.values()), ()))
    if not n or not edited or len(edited) % n:
        raise ValueError(f"{len(edited)} edited prompts are not a multiple of the {n} clean ones")
    after = head_similarity(model, edited, readings=list(before))
    return {name: after[name].mean(0) - clean.mean(0) for name, clean in before.items()}


class SoftPrompt(Perturbation):
    """A perturbation that stands behind what all prompts begin with."""

    def into(self, prompts: Ids, *, seed: int = 0) -> list[list[int]]:
        """The prompts, each with the numbers -1, -2, … in the vectors' stead, whatever the seed."""
        marks = range(-1, -len(self.vectors) - 1, -1)
        return [[*prompt[: self.before], *marks, *prompt[self.before :]] for prompt in prompts]


def start(model: PreTrainedModel, prompts: Ids, *, seed: int = 0) -> SoftPrompt:
    """Embeddings of random tokens, after what all prompts share. Raises ValueError for no prompts or an empty one."""
    check_prompts(prompts)
    n_tokens = len(model.get_input_embeddings().weight)
    drawn = torch.randint(n_tokens, (N_VECTORS,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():  # the output of the embedding and not its weight, which some models scale
        vectors = model.get_input_embeddings()(drawn.to(model.device))
    return SoftPrompt(vectors, before=len(shared_prefix(prompts)), after=1, toward=None)


def likeness(model: PreTrainedModel, prompts: Ids) -> Float[Tensor, ""]:
    """Mean similarity (row of the token that asks, cosine) of all heads over prompts, with gradients. Attention must be
    eager."""
    inputs, column = prompt_inputs(model, prompts, pad_id=0), asking_column(model)
    maps = model.base_model(**inputs, use_cache=False, output_attentions=True).attentions
    return torch.stack([to_partners(cosine(layer[:, :, column])).mean() for layer in maps]).mean()


def searched(model: PreTrainedModel, prompts: Ids, *, seed: int = 0) -> SoftPrompt:
    """Train a soft prompt to raise `likeness` on the prompts; no weight of the model changes. The learning rate of Adam
    is 0.3 standard deviations of the initial vectors. Raises as `start` does."""
    soft = start(model, prompts, seed=seed)
    vectors = soft.vectors.requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=0.3 * soft.vectors.std().item())
    marked = soft.into(prompts)
    with eager(model), soft.read_by(model), frozen_halved(model):
        for _ in tqdm(range(STEPS), desc="soft prompt", unit="step", mininterval=2, leave=False):
            with mixed_precision(model.device):
                value = likeness(model, marked)
            # Only the gradient of the vectors; that of the weights would cost as much again.
            (vectors.grad,) = torch.autograd.grad(-value, [vectors])
            optimizer.step()
    vectors.requires_grad_(False)
    return soft
