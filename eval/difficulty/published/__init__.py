"""The compatibility mode: fm-difficulty-probe's tables from its own files, to its last digit.

What is wrong with its numbers, and what does better, is in docs/difficulty.md. Nothing outside this package
stands on it.
"""
