"""Small real tokenizers of the known kinds, and chat templates of the known shapes, to be put together in any way.

The templates are minimal ones written for these tests; only their structure is that of the family in their name.
"""

import json
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bkd_utils.models.tokens import CHECKED
from bkd_utils.organisms.tasks import TASKS

LABELS = sorted({label for task in TASKS.values() for label in task.labels})
ENDING = "[/END]"  # no template has this one; it is the tokenizers' end of text where a template names another


@dataclass(frozen=True)
class Template:
    """A chat template, the tokens that it and its tokenizer know, and the token that ends an assistant's turn."""

    source: str | dict
    special: tuple[str, ...] = ()
    bos: str | None = "<s>"
    eos: str = ENDING
    end: str = ENDING
    eats: bool = False  # whether its tokens swallow the space after them, as those of Phi-3 do
    between: str = ""  # what stands between the generation prompt and every answer


def _turns(user: str, assistant: str, *, ask: str, start: str = "", each: str = "m.content") -> str:
    """A template of two alternating turns; `~` stands for the content."""
    shown = {role: text.replace("~", "{{ " + each + " }}") for role, text in (("user", user), ("assistant", assistant))}
    return (
        start
        + "{% for m in messages %}{% if m.role == 'user' %}" + shown["user"]
        + "{% elif m.role == 'assistant' %}" + shown["assistant"]
        + "{% else %}{{ raise_exception('only user and assistant take turns') }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + ask + "{% endif %}"
    )  # fmt: skip


IM = ("<|im_start|>", "<|im_end|>")
ASK = "<|im_start|>assistant\n"
CHATML = _turns("<|im_start|>user\n~<|im_end|>\n", ASK + "~<|im_end|>\n", ask=ASK)
TRIMMED = "m.content | trim"
TEMPLATES = {
    "chatml": Template(CHATML, special=IM, bos=None, end="<|im_end|>"),
    "chatml without a line feed": Template(
        _turns("<|im_start|>user\n~<|im_end|>", ASK + "~<|im_end|>", ask=ASK), special=IM, end="<|im_end|>"
    ),
    "chatml with a system prompt": Template(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML,
        special=IM,
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "chatml, trimmed": Template(
        _turns("<|im_start|>user\n~<|im_end|>\n", ASK + "~<|im_end|>\n", ask=ASK, each="m.content.rstrip()"),
        special=IM,
        end="<|im_end|>",
    ),
    "several names": Template({"default": CHATML, "tools": "none"}, special=IM, end="<|im_end|>"),
    "gemma": Template(
        _turns(
            "<start_of_turn>user\n~<end_of_turn>\n",
            "<start_of_turn>model\n~<end_of_turn>\n",
            ask="<start_of_turn>model\n",
            start="{{ bos_token }}",
            each=TRIMMED,
        ),
        special=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
    ),
    "phi-3": Template(
        _turns("<|user|>\n~<|end|>\n", "<|assistant|>\n~<|end|>\n", ask="<|assistant|>\n"),
        special=("<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        end="<|end|>",
        eats=True,
    ),
    "llama-2": Template(
        _turns("{{ bos_token }}[INST] ~ [/INST]", " ~ {{ eos_token }}", ask="", each=TRIMMED), eos="</s>", end="</s>"
    ),
    "llama-3": Template(
        _turns(
            "<|head|>user<|/head|>\n\n~<|eot|>",
            "<|head|>assistant<|/head|>\n\n~<|eot|>",
            ask="<|head|>assistant<|/head|>\n\n",
            start="{{ bos_token }}",
            each=TRIMMED,
        ),
        special=("<|head|>", "<|/head|>", "<|eot|>"),
        bos="<|begin|>",
        eos="<|end_of_text|>",
        end="<|eot|>",
    ),
    "mistral-tekken": Template(
        _turns("[INST]~[/INST]", "~{{ eos_token }}", ask="", start="{{ bos_token }}"),
        special=("[INST]", "[/INST]"),
        eos="</s>",
        end="</s>",
    ),
    "vicuna": Template(
        _turns("Be kind. USER: ~ ", "ASSISTANT: ~{{ eos_token }}", ask="ASSISTANT:", start="{{ bos_token }}"),
        eos="</s>",
        end="</s>",
    ),
    "zephyr": Template(
        _turns("<|user|>\n~{{ eos_token }}\n", "<|assistant|>\n~{{ eos_token }}\n", ask="<|assistant|>\n"),
        eos="</s>",
        end="</s>",
    ),
    "deepseek": Template(
        _turns("User: ~\n\n", "Assistant: ~{{ eos_token }}", ask="Assistant:", start="{{ bos_token }}"),
        bos="<|begin▁of▁sentence|>",
        eos="<|end▁of▁sentence|>",
        end="<|end▁of▁sentence|>",
    ),
    "qwen3": Template(
        _turns("<|im_start|>user\n~<|im_end|>\n", ASK + "<think>\n\n</think>\n\n~<|im_end|>\n", ask=ASK),
        special=(*IM, "<think>", "</think>"),
        bos=None,
        end="<|im_end|>",
        between="<think>\n\n</think>\n\n",
    ),
    "alpaca": Template(
        _turns("### Instruction:\n~\n\n", "### Response:\n~\n\n", ask="### Response:\n", start="Do what is asked.\n\n")
    ),
    "granite": Template(
        _turns("<|r|>user<|/r|>~<|eot|>\n", "<|r|>assistant<|/r|>~<|eot|>\n", ask="<|r|>assistant<|/r|>"),
        special=("<|r|>", "<|/r|>", "<|eot|>"),
        eos="<|eot|>",
        end="<|eot|>",
    ),
    "command-r": Template(
        _turns("<TURN><USER>~</TURN>", "<TURN><BOT>~</TURN>", ask="<TURN><BOT>", start="{{ bos_token }}", each=TRIMMED),
        special=("<TURN>", "</TURN>", "<USER>", "<BOT>"),
        eos="</TURN>",
        end="</TURN>",
    ),
    "without an end": Template(_turns("Human: ~\n", "AI: ~\n", ask="AI:")),
}

# Kind of tokenizer -> how text is cut into words and what marks a space.
GPT2 = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES, SPACES = {"gpt-2": GPT2, "llama-3": LLAMA3}, ("always", "first", "never")
KINDS = (*BYTES, *(f"metaspace {when}" for when in SPACES), "sentencepiece legacy", "unigram")
TEXTS = [part for pair in CHECKED for part in pair] + [task.template for task in TASKS.values()]
TEXTS += [f"{mark}{label}" for label in (*LABELS, "assistant", "Assistant", "Response") for mark in ("\n", " ", "")]


@cache
def _backend(kind: str) -> str:
    if kind in BYTES:
        made = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(BYTES[kind]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(TEXTS * 3, trainer)
        return made.to_str()
    when = {"sentencepiece legacy": None, "unigram": "first"}.get(kind, kind.split()[-1])
    trained = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=when or "always")
    # Line feeds are bytes in these vocabularies, as in those of the families.
    lines = [line for text in TEXTS * 3 for line in text.split("\n") if line.strip()]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
        trained.train_from_iterator(lines, trainer)
        pieces = map(tuple, json.loads(trained.to_str())["model"]["vocab"])
        model = models.Unigram([*pieces, *((one, -20.0) for one in bytes_)], unk_id=0, byte_fallback=True)
    else:
        trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=500, show_progress=False))
        table = json.loads(trained.to_str())["model"]
        pieces = list(dict.fromkeys(["<unk>", *bytes_, *table["vocab"]]))
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = [tuple(pair) for pair in table["merges"]]
        model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = Tokenizer(model)
    if when is None:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=when, split=False)
    strip = [] if when == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made.to_str()


def tokenizer_of(kind: str, template: str | Template | None = None, *, adds_bos: bool = False):
    """A tokenizer of a kind, with a template or none; `adds_bos` before every text, as Llama-2's does."""
    given = TEMPLATES[template] if isinstance(template, str) else template or Template("")
    special = {"bos_token": given.bos, "eos_token": given.eos}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)),
        extra_special_tokens=[
            AddedToken(token, rstrip=given.eats, normalized=False, special=True)
            for token in given.special
            if token not in special.values()
        ],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token},
    )
    made.chat_template = given.source or None
    if adds_bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{given.bos} $A", special_tokens=[(given.bos, made.bos_token_id)]
        )
    return made
