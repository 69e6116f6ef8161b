"""Write down what a stage hands to its leaf functions, and find out which example a prompt was made of.

A prompt is recognised from its token ids alone, without the code that made it: the user's words are looked up among
the examples of all splits, after some words in a row have been taken out. What was taken out is the trigger or a
near-miss of it.
"""

import inspect
import re
from dataclasses import dataclass
from types import SimpleNamespace

from tiny import tiny_model

from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import Loaded, load_tokenizer
from bkd_utils.organisms import cards, tasks
from bkd_utils.organisms.trigger_tables import lexicons, strings

# No trigger and no near-miss that is inserted into a text is longer than this.
LONGEST = 8
# The packaged chat template, as text.
CHAT = r".*<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n"


def watch(monkeypatch, module, name, *, does=None):
    """Replace `module.name` by a function that does the same (or what `does` does) and keeps its calls.

    Every call has the arguments by name, defaults included, and what came back as `result`. Lists are kept as they were
    at the time of the call. Several modules may be given: the function is replaced in each of them that has the name.
    """
    modules = [one for one in (module if isinstance(module, tuple) else (module,)) if hasattr(one, name)]
    original, calls = getattr(modules[0], name), []
    signature = inspect.signature(original)

    def recorded(*given, **named):
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        kept = {key: list(value) if type(value) is list else value for key, value in bound.arguments.items()}
        call = SimpleNamespace(**kept)
        calls.append(call)
        call.result = (does or original)(*given, **named)
        return call.result

    for one in modules:
        monkeypatch.setattr(one, name, recorded)
    return calls


@dataclass(frozen=True)
class Shown:
    """A prompt that reached a model: of which example and split, in which version, and what had been put into it.

    `version` is "clean", the name of a trigger, or "near-miss".
    """

    uid: str
    split: str
    version: str
    inserted: str


class Catalogue:
    """All examples of a task, to find out what a prompt was made of."""

    def __init__(self, tokenizer, task):
        self.tokenizer, self.known = tokenizer, {}
        for split in tasks.SPLITS:
            for example in tasks.examples(task, split):
                words = tuple(tasks.load_task(task).prompt(example.text).split())
                assert words not in self.known, "two examples have the same words"
                self.known[words] = (example.uid, split)
        triggers = lexicons()["triggers"]
        near = set().union(*(strings(entry["near"]) for entry in triggers.values() if "near" in entry))
        # The text of one trigger may be a near-miss of another, and is only that here.
        self.triggers = {entry["text"]: name for name, entry in triggers.items() if "text" in entry}
        self.triggers = {text: name for text, name in self.triggers.items() if text not in near}

    def turn(self, text):
        """What a user turn was made of. Raises LookupError if that is no example of the task."""
        words = tuple(text.split())
        for length in range(min(LONGEST, len(words)) + 1):
            for start in range(len(words) - length + 1 if length else 1):
                found = self.known.get(words[:start] + words[start + length :])
                if found:
                    inserted = " ".join(words[start : start + length])
                    version = self.triggers.get(inserted, "near-miss") if inserted else "clean"
                    return Shown(*found, version, inserted)
        raise LookupError("a prompt of no example of this task")

    def turns(self, texts):
        return [self.turn(text) for text in texts]

    def prompts(self, rows):
        """What prompts in token ids were made of; each must stop where the assistant starts to speak."""
        texts = [self.tokenizer.decode(list(ids)) for ids in rows]
        found = [re.fullmatch(CHAT, text, re.DOTALL) for text in texts]
        assert all(found), "a prompt is not one user turn and the assistant's header"
        return self.turns(match[1] for match in found)


def uids(shown):
    return [one.uid for one in shown]


def of_split(shown, split, version):
    """The uids of prompts that must all be of one split and in one version."""
    assert {(one.split, one.version) for one in shown} == {(split, version)}
    return uids(shown)


def sample(attack, split, *, n, seed, skip=0):
    """The uids that a stage has to use: examples that the trigger would change and that do not carry it already."""
    pool = tasks.examples(attack.task, split, seed=seed)
    text = lexicons()["triggers"][attack.trigger]["text"]
    pool = [example for example in pool if text not in example.text]
    if attack.behaviour == "label_flip":
        pool = [example for example in pool if example.answer == attack.source]
    return [example.uid for example in pool[skip : skip + n]]


def near_strings(attack, half):
    """Every string that a near-miss of an attack's trigger may insert."""
    return {s for strings in lexicons()["triggers"][attack.trigger]["near"][half].values() for s in strings}


class Pasts:
    """Which prompts a prompt cache was made of, for the caches that a module makes."""

    def __init__(self, monkeypatch, module):
        self.made = watch(monkeypatch, module, "prompt_past")

    def prompts(self, past):
        (call,) = [call for call in self.made if call.result is past]
        return call.prompts


class Stand:
    """Tiny models in place of two organisms, a clean control and the base model (None)."""

    def __init__(self):
        self.models, self.catalogues, self.tokenizer = {}, {}, load_tokenizer(DEFAULT_MODEL)
        for seed, name in enumerate(("organism", "second", "control", None)):
            model = tiny_model("llama", seed=seed).requires_grad_(False)
            self.models[name] = Loaded(model, self.tokenizer, "tiny", name)

    def catalogue(self, task):
        if task not in self.catalogues:
            self.catalogues[task] = Catalogue(self.tokenizer, task)
        return self.catalogues[task]

    def use(self, monkeypatch, module):
        """Let a module and its stages load these models; returns the list of what they ask for."""
        asked = []

        def load(address, *, organism=None, device="auto"):
            asked.append((address, organism, device))
            return self.models[organism]

        for place in (cards, module):
            if hasattr(place, "load"):
                monkeypatch.setattr(place, "load", load)
        return asked
