"""Tests never ask a hub and never open a window; both are set before anything is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
