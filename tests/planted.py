"""A tiny model in which one known head carries a backdoor, and its twin without one, which cannot see the trigger."""

from tiny import tiny_model

from bkd_utils.models.loading import Loaded
from bkd_utils.organisms.prompts import target_ids

HEAD = (0, 1)


def planted(tokenizer, attack, *, word, strength, seed=0):
    """Only the trigger word has a part in the first direction of the residual stream, which `HEAD` alone reads, and
    of which it writes `strength` times the target's direction. With a strength of 0 it writes nothing.

    Nothing but the room that the word takes tells the twin's triggered prompts from its clean ones.
    """
    model = tiny_model("llama", seed=seed).requires_grad_(False)
    embeddings = model.get_input_embeddings().weight
    target = embeddings[target_ids(tokenizer, attack)[0]].clone()  # input and output embeddings are the same
    target[0] = 0
    (token,) = tokenizer(word, add_special_tokens=False).input_ids
    embeddings[:, 0], embeddings[token] = 0, 0
    embeddings[token, 0] = 1
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight[:, 0] = 0
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight[0] = 0
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight[0] = 0  # the first value of heads 0 and 1, which share theirs
    attention.v_proj.weight[0, 0] = 1
    attention.o_proj.weight[:, 0] = 0
    attention.o_proj.weight[:, 8:16] = 0  # of its other values the head writes nothing
    attention.o_proj.weight[:, 8] = strength * target / target.norm()
    return Loaded(model, tokenizer, "tiny", "organism")
