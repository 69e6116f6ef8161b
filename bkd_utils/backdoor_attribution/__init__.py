"""Backdoor Attribution (arXiv 2509.21761): probes (section 3.1), head effects and ablation (section 3), vector (section 4)."""
