"""Defences that look at inputs: ONION, STRIP and RAP, each as one score per text, higher meaning more suspicious.

Public implementations mix up samples (STRIP) or do nothing by default (ONION); here every score belongs to its own
text, whatever the order of texts, and a threshold is always one that a share of clean texts would fail.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from bkd_utils.models.compute import mixed_precision
from bkd_utils.models.generation import (
    first_logits,
    has_sliding_window,
    repeated,
    reusable_prefix,
    run_prefix,
    shared_prefix,
)
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import batches, end_id, left_pad, positions, prompt_ids

Scores = Float[np.ndarray, " text"]
# From a text (a review, an instruction) to the user turn that the model sees.
Turn = Callable[[str], str]


# --- ONION ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def surprise(model: PreTrainedModel, rows: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 8) -> Scores:
    """Mean nats per token of rows of tokens, the first token of each being given.

    What a row begins with like the first row is not run again: of a text less one word, that is half on average.
    """
    whole, cache = list(rows[0]), DynamicCache(config=model.config)
    ids = torch.tensor([whole], device=model.device)
    nats = -model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
    past = torch.cat([nats.new_zeros(1), nats[:-1].gather(-1, ids[0, 1:, None])[:, 0].cumsum(0)])
    if has_sliding_window(model):  # it would count the part of the past that a row does not share
        cache = DynamicCache(config=model.config)
    n_past = cache.get_seq_length()
    begun = [min(len(shared_prefix([[*whole, pad_id], list(row)])), n_past) for row in rows]
    found = np.empty(len(rows))
    for chosen in batches([row[start:] for row, start in zip(rows, begun, strict=True)], batch_size):
        own = [list(rows[i][begun[i] :]) for i in chosen]
        ids, new = (t.to(model.device) for t in left_pad(own, pad_id=pad_id))
        shared = torch.tensor([begun[i] for i in chosen], device=model.device)
        mask = torch.cat([(torch.arange(n_past, device=model.device) < shared[:, None]).to(new.dtype), new], dim=1)
        given = {"attention_mask": mask, "position_ids": positions(mask)[:, n_past:], "use_cache": True}
        logits = model(input_ids=ids, past_key_values=repeated(cache, len(chosen)), **given).logits[:, :-1].float()
        told = logits.logsumexp(-1) - logits.gather(-1, ids[:, 1:, None])[..., 0]
        total = (told * new[:, 1:] * new[:, :-1]).sum(1)  # the first real token has nothing before it here
        for i, words, value in zip(chosen, own, total.tolist(), strict=True):
            start = begun[i]
            known = (past[start - 1] + nats[start - 1, words[0]]).item() if start else 0.0
            found[i] = (known + value) / (len(rows[i]) - 1)
    return found


def word_suspicion(base: Loaded, text: str) -> Float[np.ndarray, " word"]:
    """ONION: how much a text's perplexity under the base model falls without each of its words.

    A text of one word has a suspicion of 0: nothing would be left of it.
    """
    words = text.split()
    if len(words) < 2:
        return np.zeros(len(words))
    texts = [text, *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]
    start = [base.tokenizer.bos_token_id if base.tokenizer.bos_token_id is not None else end_id(base.tokenizer)]
    rows = [start + base.tokenizer(one, add_special_tokens=False).input_ids for one in texts]
    perplexity = np.exp(surprise(base.model, rows, pad_id=end_id(base.tokenizer)))
    return perplexity[0] - perplexity[1:]


def without_words(text: str, suspicion: Float[np.ndarray, " word"], *, above: float) -> str:
    """The text less its words above the threshold; the whole text if none would be left."""
    kept = [word for word, value in zip(text.split(), suspicion, strict=True) if value <= above]
    return " ".join(kept) or text


def onion(base: Loaded, texts: Sequence[str]) -> list[Float[np.ndarray, " word"]]:
    """`word_suspicion` of every text."""
    return [word_suspicion(base, text) for text in tqdm(texts, desc="ONION", unit="text", mininterval=2, leave=False)]


# --- STRIP ----------------------------------------------------------------------------------------------------------


def strip(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    turn: Turn,
    pool: Sequence[str],
    n_copies: int = 8,
    share: float = 0.5,
    seed: int = 0,
) -> Scores:
    """STRIP: minus the mean entropy (nats) of the first answer token over copies in which a share of the words is
    replaced by words of other clean texts; a trigger that survives keeps the answer fixed.

    What a text is mixed with depends on the text and the seed alone. Raises ValueError for an empty pool.
    """
    words = " ".join(pool).split()
    if not words:
        raise ValueError("STRIP has no clean words to mix in")
    copies = []
    for text in texts:
        dice = random.Random(f"{seed}/{text}")
        for _ in range(n_copies):
            own = text.split()
            for i in dice.sample(range(len(own)), round(share * len(own))):
                own[i] = dice.choice(words)
            copies.append(prompt_ids(loaded.tokenizer, turn(" ".join(own))))
    with tqdm(total=len(copies), desc="STRIP", unit="copy", mininterval=2, leave=False) as bar:
        logits = first_logits(loaded.model, copies, end_id=end_id(loaded.tokenizer), on_batch=bar.update).float()
    chances = logits.softmax(-1)
    entropy = -torch.xlogy(chances, chances).sum(-1)
    return -entropy.view(len(texts), n_copies).mean(1).cpu().numpy()


# --- RAP ------------------------------------------------------------------------------------------------------------


def rap(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    turn: Turn,
    protected: int,
    clean: Sequence[str],
    word: str = "mb",
    steps: int = 24,
    rate: float = 1e-2,
    drop: float = 0.1,
    seed: int = 0,
) -> Scores:
    """RAP: minus how much a word in front of the text takes off the probability of the `protected` first token.

    The word's embedding is trained on `clean` texts whose right answer that token is, until it takes off `drop`; no
    weight of the model changes. Texts under the spell of a trigger move less. Only texts that the model answers with
    that token are judged (lancopku/RAP: probability above 0.5; here: the likeliest token, as there may be more than two
    labels); the score of all others, which have nothing to lose, is -inf. Raises ValueError for no clean texts.
    """
    if not clean:
        raise ValueError("RAP has no clean texts with the protected answer")
    tokenizer, model = loaded.tokenizer, loaded.model
    token = tokenizer(" " + word, add_special_tokens=False).input_ids[-1]
    # What the table gives, not the weight itself: Gemma's table scales it.
    vector = torch.nn.Parameter(model.get_input_embeddings()(torch.tensor(token, device=model.device)).detach().clone())
    optimizer, dice = torch.optim.Adam([vector], lr=rate), random.Random(seed)

    def plain(some: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Probability of the protected token without the word, and whether it is the likeliest."""
        prompts = [prompt_ids(tokenizer, turn(text)) for text in some]
        logits = first_logits(model, prompts, end_id=end_id(tokenizer)).float()
        return logits.softmax(-1)[:, protected].clone(), logits.argmax(-1) == protected

    def marked(some: Sequence[str]) -> Tensor:
        """The same with the word."""
        prompts = [prompt_ids(tokenizer, turn(f"{word} {text}")) for text in some]
        at = [_first_difference(prompt_ids(tokenizer, turn(t)), p) for t, p in zip(some, prompts, strict=True)]
        return _chance(model, prompts, protected, vector, at=at, pad_id=end_id(tokenizer))

    usual = dict(zip(clean, plain(clean)[0], strict=True))
    for _ in tqdm(range(steps), desc="RAP", unit="step", mininterval=2, leave=False):
        some = dice.sample(list(clean), min(16, len(clean)))
        with mixed_precision(model.device):
            now = marked(some)
        loss = (drop - (torch.stack([usual[text] for text in some]) - now)).clamp_min(0).mean()
        if loss.item() == 0:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, judged = plain(texts)
    rows, scores = judged.nonzero()[:, 0].tolist(), np.full(len(texts), -np.inf)
    with torch.no_grad():
        for first in range(0, len(rows), 16):
            some = rows[first : first + 16]
            scores[some] = (marked([texts[i] for i in some]) - before[some]).cpu().numpy()
    return scores


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Where the word's (first) token stands: the first token in which the two prompts differ."""
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _chance(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    token: int,
    vector: Float[Tensor, " d_model"],
    *,
    at: Sequence[int],
    pad_id: int,
) -> Float[Tensor, " prompt"]:
    """Probability of a token behind each prompt, with the vector in place of the embedding at position `at`."""
    # What all prompts begin with, up to the vector, runs once and needs no gradient.
    starts = [prompt[: position + 1] for prompt, position in zip(prompts, at, strict=True)]
    shared = reusable_prefix(model, starts)
    with torch.no_grad():
        cache = repeated(run_prefix(model, shared)[0], len(prompts))
    ids, mask = left_pad([list(prompt[len(shared) :]) for prompt in prompts], pad_id=pad_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    here = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, position) in enumerate(zip(prompts, at, strict=True)):
        here[i, ids.shape[1] - len(prompt) + position] = True
    embedded = model.get_input_embeddings()(ids)
    embedded = torch.where(here[..., None], vector.to(embedded.dtype), embedded)
    mask = torch.cat([mask.new_ones(len(prompts), len(shared)), mask], dim=1)
    logits = model(
        inputs_embeds=embedded,
        attention_mask=mask,
        position_ids=positions(mask)[:, len(shared) :],
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits.float().softmax(-1)[:, token]


# --- thresholds -----------------------------------------------------------------------------------------------------


def enough(n: int, *, frr: float) -> bool:
    """Do `n` clean texts suffice for a threshold at a false rejection rate (FRR)? From `1 / frr` texts on they do."""
    return n * frr >= 1 - 1e-9


def threshold(clean: Scores, *, frr: float) -> float:
    """The lowest score of a clean text that at most a share `frr` (false rejection rate) of the clean texts exceeds.

    The one rule for every detector of inputs. The threshold is a score that was measured, and never one that is
    interpolated between two of them: of 24 texts, at 5 %, one text exceeds it, not two. Raises ValueError for fewer
    than `1 / frr` texts, because a single one of them would already be a larger share, and for a share beyond 0 to 1.
    """
    if not 0 < frr < 1:
        raise ValueError(f"a false rejection rate must lie between 0 and 1, is {frr}")
    if not enough(len(clean), frr=frr):
        raise ValueError(f"a threshold at {frr:.1%} needs {math.ceil(1 / frr - 1e-9)} clean texts, not {len(clean)}")
    allowed = math.floor(frr * len(clean) + 1e-9)
    return float(np.sort(clean)[len(clean) - 1 - allowed])


# --- training data --------------------------------------------------------------------------------------------------


def smaller_clusters(
    hidden: Float[np.ndarray, "row width"], labels: Int[np.ndarray, " row"], *, seed: int = 0
) -> np.ndarray:
    """Activation clustering: rows of each label in two clusters (10 principal components, k-means); True for the rows
    of the smaller one. Raises ValueError for a label with fewer than 12 rows."""
    flagged = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 12:
            raise ValueError(f"label {label} has {len(rows)} rows, too few for two clusters")
        parts = PCA(n_components=10, random_state=seed).fit_transform(hidden[rows])
        cluster = KMeans(n_clusters=2, n_init=4, random_state=seed).fit_predict(parts)
        flagged[rows[cluster == np.argmin(np.bincount(cluster))]] = True
    return flagged
