"""Backdoored models: attack, poison, train, measure."""
