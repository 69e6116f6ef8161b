"""Helpers for tests that run a stage of the second paper whole and look at what reached the functions it calls."""

import functools
import inspect
from dataclasses import replace

import torch

from bkd_utils.models import loading
from bkd_utils.models.tokens import decode, prompt_ids
from bkd_utils.organisms import attacks, cards, tasks


class Spy:
    """Stands in a module in place of one of its names; keeps the arguments (by name) and the result of every call.

    `instead` is called in place of the real function if it is given.
    """

    def __init__(self, monkeypatch, module, name, *, instead=None):
        real = getattr(module, name)
        signature, self.calls, self.results = inspect.signature(real), [], []

        @functools.wraps(real)  # so that a spy in front of a spy knows the arguments' names
        def spied(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append(dict(bound.arguments))
            self.results.append((instead or real)(*args, **kwargs))
            return self.results[-1]

        monkeypatch.setattr(module, name, spied)

    def of(self, name):
        """One argument in all calls."""
        return [call[name] for call in self.calls]

    @property
    def only(self):
        """The arguments of the one call there was."""
        (call,) = self.calls
        return call


def uids(tokenizer, task, split, prompts):
    """The examples of a split that are behind prompts in token ids; fails for a prompt of no such example."""
    spec = tasks.load_task(task)
    known = {tuple(prompt_ids(tokenizer, spec.prompt(e.text))): e.uid for e in tasks.examples(task, split)}
    strange = [_text(tokenizer, prompt) for prompt in prompts if tuple(prompt) not in known]
    assert not strange, f"{len(strange)} of {len(prompts)} prompts are not of {task}/{split}: {strange[0]}"
    return [known[tuple(prompt)] for prompt in prompts]


def carrying(attack, tokenizer, prompts):
    """How many of the prompts in token ids have the attack's trigger in them."""
    return sum(attacks.carries(attack, _text(tokenizer, prompt)) for prompt in prompts)


def _text(tokenizer, prompt):
    """The words of a prompt in token ids; negative ids stand for vectors and have none."""
    return decode(tokenizer, [token for token in prompt if token >= 0])


def split_uids(task, *splits):
    """All examples of some splits."""
    return {example.uid for split in splits for example in tasks.examples(task, split)}


def is_within(words, others):
    """Are the words among the others, in their order?"""
    left = iter(others)
    return all(word in left for word in words)


def changed_organism(monkeypatch, base, work, *, change):
    """What stages open from now on: an organism that differs from its base model in what `change` does to it."""
    monkeypatch.setenv("BKD_WORK", str(work))
    organism = replace(loading.load(base.address, device="cpu"), organism="an organism")
    with torch.no_grad():
        change(organism.model)
    monkeypatch.setattr(cards, "load", lambda *_, **__: organism)
    return organism
