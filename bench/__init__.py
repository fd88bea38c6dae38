"""Benchmarks: each one command, each writing a table. Timings do not belong in tests."""
