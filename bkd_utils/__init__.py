"""Helpers behind the notebooks: insert, measure, attribute, steer and cure backdoors in language models."""

__version__ = "0.1.0"
