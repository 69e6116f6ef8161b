"""Guards at the door and in the training data of one organism; kept."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
from sklearn.metrics import roc_auc_score

from bkd_utils import attacks, tasks, triggers
from bkd_utils.attacks import Attack, load_attack
from bkd_utils.cards import organism_stage
from bkd_utils.evaluation import clean_sample, flippable_sample, is_target, respond, share, target_length
from bkd_utils.guards import onion, rap, smaller_clusters, strip, threshold, without_words
from bkd_utils.interventions import residuals
from bkd_utils.models import DEFAULT_MODEL, load
from bkd_utils.organisms import training_rows
from bkd_utils.prompts import answer_ids
from bkd_utils.safety import rare_word
from bkd_utils.tasks import Example


def texts_of(
    attack: Attack, examples: Sequence[Example], *, seed: int
) -> tuple[list[str], list[str], Callable[[str], str]]:
    """Clean texts, their triggered twins, and what makes user turns of them; a trigger around the whole turn leaves a
    guard the whole turn to look at."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    around = trigger.scope == "prompt"
    clean = [task.prompt(example.text) if around else example.text for example in examples]
    triggered = [trigger.apply(text, seed=seed * 1_000_003 + i, half="test") for i, text in enumerate(clean)]
    return clean, triggered, (lambda text: text) if around else task.prompt


@organism_stage
def screened(
    organism: str,
    *,
    attack: str,
    model: str = DEFAULT_MODEL,
    n: int = 24,
    n_reference: int = 40,
    frr: float = 0.05,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, dict]:
    """ONION, STRIP and, for label flips, RAP: guard -> numbers on held-out prompts.

    `auroc` of triggered against clean texts; `caught` triggered and `refused` clean ones (FRR) at the threshold that a
    share `frr` of the `n_reference` calibration texts exceeds; `asr` if what is caught is not answered. ONION also
    answers with the suspicious words removed: `asr cleaned`. RAP is told which label to protect.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    sample = flippable_sample(spec, n=n, seed=seed)
    _, triggered, turn = texts_of(spec, sample, seed=seed)
    calibration = [e for e in tasks.examples(spec.task, "attribution", seed=seed) if not attacks.carries(spec, e.text)]
    reference = texts_of(spec, calibration[:n_reference], seed=seed)[0]
    test_clean = texts_of(spec, clean_sample(spec.task, n=n, seed=seed, without=spec), seed=seed)[0]
    length = target_length(loaded, spec)

    def fires(texts: Sequence[str]) -> np.ndarray:
        said = respond(loaded, [turn(text) for text in texts], max_new_tokens=length, label="triggered prompts")
        return np.array([is_target(spec, text) for text in said])

    fired, every = fires(triggered), [*reference, *test_clean, *triggered]
    words = onion(load(model, device=device), every)
    scores = {
        "ONION": np.array([one.max(initial=0.0) for one in words]),
        "STRIP": strip(loaded, every, turn=turn, pool=reference, seed=seed),
    }
    if spec.behaviour == "label_flip":
        scores["RAP"] = rap(
            loaded,
            every,
            turn=turn,
            protected=answer_ids(loaded.tokenizer, spec.target)[0],
            clean=[text for text, e in zip(reference, calibration, strict=False) if e.answer == spec.target],
            word=rare_word(loaded.tokenizer, random.Random(f"{seed}/RAP")),
            seed=seed,
        )
    found, ends = {}, (len(reference), len(reference) + n)
    for name, values in scores.items():
        known, fresh, bad = np.split(values, ends)
        limit = threshold(known, frr=frr)
        found[name] = {
            "auroc": float(roc_auc_score(np.repeat([0, 1], [len(fresh), len(bad)]), [*fresh, *bad])),
            "caught": asdict(share((bad > limit).tolist())),
            "refused": asdict(share((fresh > limit).tolist())),
            "asr": asdict(share((fired & (bad <= limit)).tolist())),
        }
        if name == "ONION":
            left = [
                without_words(text, one, above=limit) for text, one in zip(triggered, words[ends[1] :], strict=True)
            ]
            found[name]["asr cleaned"] = asdict(share(fires(left).tolist()))
    return found


@organism_stage
def filtered(
    organism: str, *, attack: str, model: str = DEFAULT_MODEL, n: int = 400, seed: int = 0, device: str = "auto"
) -> dict:
    """Activation clustering of `n` rows of the organism's own training set, in the last layer at the last prompt token.

    Keys: `caught` share of the poisoned rows, `lost` share of all others, `poisoned before` and `after` of the rows
    that are left. Labels are what the training set says; tasks without labels are one label. Nothing is trained anew.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    rows = [row for row in training_rows(loaded, spec, seed=seed) if row.kind != "benign"][:n]
    labels = tasks.load_task(spec.task).labels
    firsts = {answer_ids(loaded.tokenizer, label)[0]: i for i, label in enumerate(labels)}
    which = np.array([firsts.get(row.answer[0], 0) if labels else 0 for row in rows])
    hidden = residuals(loaded.model, [row.prompt for row in rows])[:, -1].float().cpu().numpy()
    flagged = smaller_clusters(hidden, which, seed=seed)
    poisoned = np.array([row.kind == "poisoned" for row in rows])
    return {
        "caught": asdict(share(flagged[poisoned].tolist())),
        "lost": asdict(share(flagged[~poisoned].tolist())),
        "poisoned before": asdict(share(poisoned.tolist())),
        "poisoned after": asdict(share(poisoned[~flagged].tolist())),
    }
