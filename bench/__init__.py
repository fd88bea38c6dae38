"""Benchmarks: each module is one command that prints a table of timings. They are not tests."""
