"""Figures, tables and verdicts, made of results: one module per notebook, named like it."""
