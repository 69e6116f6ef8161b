"""Attention Safety Alignment (arXiv 2511.13789), our reading: similarity, suspicion, alignment."""
