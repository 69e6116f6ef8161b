"""How many tokens a model can read: its attention windows, its positions, and position codes that depend on length."""

from torch.nn import Module

from bkd_utils.models.folders import ModelError

# Frequencies of these rotary codes change with the length of a pass, so a cache would disagree with a whole prompt.
BY_LENGTH = ("dynamic", "longrope")


def attention_window(model: Module) -> int | None:
    """The number of latest tokens to which some layers attend; None if all layers attend to all tokens."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None and not any(name in kind for kind in kinds for name in ("sliding", "chunked", "local")):
        return None
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    return min((size for size in sizes if size), default=None)


def longest(model: Module) -> int | None:
    """The number of tokens up to which positions are what they were in training; None if the model does not say."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    codes = getattr(config, "rope_parameters", None) or {}
    for code in (codes, *(inner for inner in codes.values() if isinstance(inner, dict))):
        if code.get("rope_type") in BY_LENGTH:
            sizes += [source.get("original_max_position_embeddings") for source in (code, vars(config))]
    return min((size for size in sizes if size), default=None)


def check_fits(model: Module, n_tokens: int, *, window: bool = False) -> None:
    """Raise ModelError for more tokens than the model has positions, or than its attention window if `window`."""
    limits = {"positions": longest(model), "attention window": attention_window(model) if window else None}
    for what, limit in limits.items():
        if limit is not None and n_tokens > limit:
            raise ModelError(f"{n_tokens} tokens do not fit the {what} of the model, {limit}")
