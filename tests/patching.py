"""Replace a constant in every module of the package that holds it, wherever it was imported to."""

import sys


def everywhere(monkeypatch, name, value):
    """Set `name` in all loaded modules of the package that have it. Fails if there is none."""
    holders = [module for key, module in sys.modules.items() if key.startswith("bkd_utils.") and name in vars(module)]
    assert holders, name
    for module in holders:
        monkeypatch.setattr(module, name, value)
