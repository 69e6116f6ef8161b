"""What a model can do here, found out on the model itself with random tokens, whatever its architecture is called.

Every check is an identity that holds for a model whose parts were found: a head that gets its own output, a pass that
starts at a later layer, a vector that the residual stream gains, prompts in one batch or alone. So a new architecture
either gives the right numbers or is refused by the name of what it cannot do, with the reason."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bkd_utils.common.cache import installed_versions
from bkd_utils.common.code_key import code_key
from bkd_utils.common.files import WORK, keep_json, sha256_text
from bkd_utils.models.encoder_checks import ENCODER_CHECKS, REFUSED, EncoderCase
from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.folders import ModelError
from bkd_utils.models.self_checks import CHECKS, Case

log = logging.getLogger(__name__)
_known: dict[str, dict[str, str]] = {}


def capabilities(model: PreTrainedModel) -> dict[str, str]:
    """Capability -> why the model has it not, or an empty text if it has it. Tested once per kind of model: that it can
    do everything is remembered in the work folder, for this code, these libraries and this processor. A refusal is not,
    because its reason may be gone the next time.

    The capabilities are `generate` (batches with a shared beginning and padding), `train` (the loss of answers),
    `attribute` (patch heads, start at a layer), `components` (what attention and feed-forward parts write), `steer`
    (add to the residual stream), `slice` (the weights of a head) and `compare maps` (attention maps)."""
    config = json.dumps(model.config.to_dict() | {"_name_or_path": None}, sort_keys=True, default=str)
    key = f"{type(model).__name__} {model.dtype} {model.device} {config}"
    if key not in _known:
        here = f"{installed_versions()} {torch.backends.cpu.get_cpu_capability()} {code_key(Path(__file__))}"
        passed = WORK / "self_tests" / sha256_text(f"{key} {here}")
        kind, checks, refused = (EncoderCase, ENCODER_CHECKS, REFUSED) if is_encoder(model) else (Case, CHECKS, {})
        case = None if passed.is_file() else kind(model)
        found = {name: _reason(check, case) if case else "" for name, check in checks.items()}
        for name, why in found.items():
            if why:
                log.warning("%r is not possible with a model of type %r: %s", name, model.config.model_type, why)
        if case and not any(found.values()):
            keep_json(passed, sorted(checks))
        _known[key] = {name: found.get(name, refused.get(name, "")) for name in CHECKS}
    return _known[key]


def require(model: PreTrainedModel, *needed: str) -> None:
    """Raise ModelError, with the reason, unless the model has these capabilities."""
    found = capabilities(model)
    for name in filter(found.get, needed):
        raise ModelError(f"{name!r} is not possible with a model of type {model.config.model_type!r}: {found[name]}")


def _reason(check: Callable[[Case], None], case: Case) -> str:
    try:
        with torch.no_grad():
            check(case)
    except Exception as error:  # any error of a library about a layout is a reason
        text = (str(error).strip() or "no message").splitlines()[0]
        return text if isinstance(error, ModelError) else f"{type(error).__name__}: {text}"
    return ""
