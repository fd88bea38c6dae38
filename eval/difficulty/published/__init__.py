"""The compatibility mode: recomputes fm-difficulty-probe's tables from its own files, to the last digit.

docs/difficulty.md lists the problems of these numbers and what this project does instead. No code outside
this package imports it.
"""
