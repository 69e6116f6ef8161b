"""A language model: load it, talk to it, read it, edit it."""
