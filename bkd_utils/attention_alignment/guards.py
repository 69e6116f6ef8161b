"""Detectors of triggered inputs: ONION, STRIP and RAP. Each gives one score per text; higher is more suspicious.

Public implementations mix up samples (STRIP) or do nothing by default (ONION). Here a text's score does not depend on
the order of texts, and a threshold is always one that a given share of clean texts exceeds."""

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

from bkd_utils.models.activations import token_log_prob
from bkd_utils.models.compute import frozen_halved, mixed_precision
from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import first_logits, inputs_after, repeated, reusable_prefix, run_prefix, shared_prefix
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import batches, end_id, left_pad, positions, prompt_ids

Scores = Float[np.ndarray, " text"]
Turn = Callable[[str], str]  # from a text (a review, an instruction) to the user turn that the model sees
N_COPIES, REPLACED = 8, 0.5  # STRIP: copies of each text, and the share of words that is replaced in them
STEPS, RATE, DROP = 24, 1e-2, 0.1  # RAP: steps at most, their learning rate, and the drop at which training ends


@torch.inference_mode()
def surprise(model: PreTrainedModel, rows: Sequence[Sequence[int]], *, pad_id: int) -> Scores:
    """Mean negative log-probability (nats) of the tokens of every row after its first token. Tokens that a row shares
    with the beginning of the first row are not run again. Raises ModelError for an encoder."""
    if is_encoder(model):
        raise ModelError("an encoder gives no probability of a text; ONION needs a causal language model")
    whole, cache = list(rows[0]), DynamicCache(config=model.config)
    ids = torch.tensor([whole], device=model.device)
    nats = -model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
    past = torch.cat([nats.new_zeros(1), nats[:-1].gather(-1, ids[0, 1:, None])[:, 0].cumsum(0)])
    starts = [len(reusable_prefix(model, [[*whole, pad_id], row])) for row in rows]
    if not any(starts):  # a sliding window would count cached tokens that no row shares
        cache = DynamicCache(config=model.config)
    n_past = cache.get_seq_length()
    found = np.empty(len(rows))
    for chosen in batches([row[start:] for row, start in zip(rows, starts, strict=True)], 8):
        own = [list(rows[i][starts[i] :]) for i in chosen]
        ids, new = (t.to(model.device) for t in left_pad(own, pad_id=pad_id))
        shared = torch.tensor([starts[i] for i in chosen], device=model.device)
        mask = torch.cat([(torch.arange(n_past, device=model.device) < shared[:, None]).to(new.dtype), new], dim=1)
        given = {"attention_mask": mask, "position_ids": positions(mask)[:, n_past:], "use_cache": True}
        logits = model(input_ids=ids, past_key_values=repeated(cache, len(chosen)), **given).logits[:, :-1].float()
        later = -token_log_prob(logits, ids[:, 1:])
        total = (later * new[:, 1:] * new[:, :-1]).sum(1)  # the first real token is predicted by the cached ones
        for i, words, value in zip(chosen, own, total.tolist(), strict=True):
            start = starts[i]
            known = (past[start - 1] + nats[start - 1, words[0]]).item() if start else 0.0
            found[i] = (known + value) / (len(rows[i]) - 1)
    return found


def onion(base: Loaded, texts: Sequence[str]) -> list[Float[np.ndarray, " word"]]:
    """ONION: how much every text's perplexity under the base model falls without each of its words. The suspicion of a
    text's only word is 0, because no text would be left without it."""
    tokenizer, found = base.tokenizer, []
    # Texts stand behind BOS or an end of text, not behind the end of a turn.
    start = [next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, end_id(tokenizer)) if i is not None)]
    for text in tqdm(texts, desc="ONION", unit="text", mininterval=2, leave=False):
        words = text.split()
        if len(words) < 2:
            found.append(np.zeros(len(words)))
            continue
        versions = [text, *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]
        rows = [start + tokenizer(one, add_special_tokens=False).input_ids for one in versions]
        perplexity = np.exp(surprise(base.model, rows, pad_id=end_id(tokenizer)))
        found.append(perplexity[0] - perplexity[1:])
    return found


def without_words(text: str, suspicion: Float[np.ndarray, " word"], *, above: float) -> str:
    """The text without its words above the threshold, or the whole text if no word would be left."""
    kept = [word for word, value in zip(text.split(), suspicion, strict=True) if value <= above]
    return " ".join(kept) or text


def strip(loaded: Loaded, texts: Sequence[str], *, turn: Turn, pool: Sequence[str], seed: int = 0) -> Scores:
    """STRIP: negative mean entropy (nats) of the first answer token over copies with replaced words. Half of the words
    of a copy are replaced by words of other clean texts (`pool`); a trigger that is still there keeps the answer fixed.
    Raises ValueError for an empty pool."""
    words = " ".join(pool).split()
    if not words:
        raise ValueError("STRIP has no clean words to mix in")
    copies = []
    for text in texts:
        dice = random.Random(f"{seed}/{text}")
        for _ in range(N_COPIES):
            own = text.split()
            for i in dice.sample(range(len(own)), round(REPLACED * len(own))):
                own[i] = dice.choice(words)
            copies.append(prompt_ids(loaded.tokenizer, turn(" ".join(own))))
    with tqdm(total=len(copies), desc="STRIP", unit="copy", mininterval=2, leave=False) as bar:
        logits = first_logits(loaded.model, copies, end_id=end_id(loaded.tokenizer), on_batch=bar.update).float()
    chances = logits.softmax(-1)
    entropy = -torch.xlogy(chances, chances).sum(-1)
    return -entropy.view(len(texts), N_COPIES).mean(1).cpu().numpy()


def rap(
    loaded: Loaded, texts: Sequence[str], *, turn: Turn, protected: int, clean: Sequence[str], word: str, seed: int = 0
) -> Scores:
    """RAP: negative drop of the probability of the `protected` first token when a word is put before the text. The
    word's embedding is trained on `clean` texts whose right answer is that token, until the drop is 0.1; no weight of
    the model changes. For triggered texts the drop is smaller. Only texts that the model answers with that token are
    judged (lancopku/RAP: probability above 0.5; here: the likeliest token, as there may be more than two labels). The
    score of all other texts is -inf. Raises ValueError for no clean texts."""
    if not clean:
        raise ValueError("RAP has no clean texts with the protected answer")
    tokenizer, model = loaded.tokenizer, loaded.model
    token = tokenizer(f"a {word}", add_special_tokens=False).input_ids[-1]
    # The output of the embedding module and not its weight, because Gemma scales it.
    vector = torch.nn.Parameter(model.get_input_embeddings()(torch.tensor(token, device=model.device)).detach().clone())
    optimizer, dice = torch.optim.Adam([vector], lr=RATE), random.Random(seed)

    def plain(some: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Probability of the protected token without the word, and whether it is the likeliest."""
        prompts = [prompt_ids(tokenizer, turn(text)) for text in some]
        logits = first_logits(model, prompts, end_id=end_id(tokenizer)).float()
        return logits.softmax(-1)[:, protected].clone(), logits.argmax(-1) == protected

    def marked(some: Sequence[str]) -> Tensor:
        """The same with the word."""
        pairs = [[prompt_ids(tokenizer, turn(one)) for one in (text, f"{word} {text}")] for text in some]
        # The word's (first) token is the first one in which the two prompts differ.
        at = [len(shared_prefix(pair)) for pair in pairs]
        return _with_vector(loaded, [prompt for _, prompt in pairs], at, vector)[:, protected]

    usual = dict(zip(clean, plain(clean)[0], strict=True))
    with frozen_halved(model):
        for _ in tqdm(range(STEPS), desc="RAP", unit="step", mininterval=2, leave=False):
            some = dice.sample(list(clean), min(16, len(clean)))
            with mixed_precision(model.device):
                now = marked(some)
            loss = (DROP - (torch.stack([usual[text] for text in some]) - now)).clamp_min(0).mean()
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


def _with_vector(loaded: Loaded, prompts: list[list[int]], at: Sequence[int], vector: Tensor) -> Tensor:
    """Probabilities of the next token or label `[prompt, vocab]`, with the vector as the embedding at `at`."""
    model = loaded.model
    # The tokens shared by all prompts before the vector are run once, without gradients.
    shared = reusable_prefix(model, [prompt[: i + 1] for prompt, i in zip(prompts, at, strict=True)])
    with torch.no_grad():
        inputs = inputs_after(model, run_prefix(model, shared)[0], prompts, pad_id=end_id(loaded.tokenizer))
    ids = inputs.pop("input_ids")
    here = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt, i in zip(here, prompts, at, strict=True):
        row[i if is_encoder(model) else i - len(prompt)] = True  # padding stands behind, or in front
    embedded = model.get_input_embeddings()(ids)
    embedded = torch.where(here[..., None], vector.to(embedded.dtype), embedded)
    if is_encoder(model):
        return model(inputs_embeds=embedded, **inputs).logits.float().softmax(-1)
    logits = model(inputs_embeds=embedded, **inputs, logits_to_keep=1).logits[:, -1]
    return logits.float().softmax(-1)


def enough(n: int, *, frr: float) -> bool:
    """Do `n` clean texts suffice for a threshold at a false rejection rate (FRR)? It takes `1 / frr` texts."""
    return n * frr >= 1 - 1e-9


def threshold(clean: Scores, *, frr: float) -> float:
    """The lowest score of a clean text that at most a share `frr` (false rejection rate) of the clean texts exceeds. It
    is a measured score and not interpolated: at 5 % and with 24 texts, one text exceeds it. Raises ValueError for a
    rate outside 0 to 1, and for fewer than `1 / frr` texts, because a single text would already be a larger share."""
    if not 0 < frr < 1:
        raise ValueError(f"a false rejection rate must lie between 0 and 1, is {frr}")
    if not enough(len(clean), frr=frr):
        raise ValueError(f"a threshold at {frr:.1%} needs {math.ceil(1 / frr - 1e-9)} clean texts, not {len(clean)}")
    allowed = math.floor(frr * len(clean) + 1e-9)
    return float(np.sort(clean)[len(clean) - 1 - allowed])


def smaller_clusters(
    hidden: Float[np.ndarray, "row width"], labels: Int[np.ndarray, " row"], *, seed: int = 0
) -> np.ndarray:
    """Activation clustering: True for the rows in the smaller one of two clusters of their label. Clusters are by
    k-means on 10 principal components. Raises ValueError for a label with fewer than 12 rows."""
    flagged = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 12:
            raise ValueError(f"label {label} has {len(rows)} rows, too few for two clusters")
        parts = PCA(n_components=10, random_state=seed).fit_transform(hidden[rows])
        cluster = KMeans(n_clusters=2, n_init=4, random_state=seed).fit_predict(parts)
        flagged[rows[cluster == np.argmin(np.bincount(cluster))]] = True
    return flagged
