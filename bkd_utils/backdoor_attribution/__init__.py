"""Backdoor Attribution (arXiv 2509.21761): probes, effects of heads, ablation, vector."""
