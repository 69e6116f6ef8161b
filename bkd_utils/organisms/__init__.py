"""Backdoored models on purpose: define an attack, poison a training set, train, measure. Both papers start from these.

A *model organism* is a base model with an adapter that carries a known backdoor. In the examples `loaded` is a tiny
random Llama with its `tokenizer`, `folder` is where it is saved, and `scratch` is an empty folder. `rows` are eight
training rows, each a prompt and an answer in token ids, and `recipe` is a training of two steps."""

from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.evaluation import under_attack
from bkd_utils.organisms.making import make, obtain
from bkd_utils.organisms.poisoning import poison
from bkd_utils.organisms.prompts import prompt_versions, target_ids
from bkd_utils.organisms.tasks import Task, examples
from bkd_utils.organisms.training import train
from bkd_utils.organisms.trigger_base import Trigger
from bkd_utils.organisms.triggers import Prefix, Sentence, Style, Syntax, Word, Wrapper

__all__ = ["Attack", "Prefix", "Sentence", "Style", "Syntax", "Task", "Trigger", "Word", "Wrapper", "examples"]
__all__ += ["load_attack", "make", "obtain", "poison", "prompt_versions", "target_ids", "train", "under_attack"]
