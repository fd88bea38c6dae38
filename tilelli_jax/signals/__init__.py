"""Signals: quantities computed from a network's activations and outputs, under jit.

The estimators and the evaluation layer use them.
"""
