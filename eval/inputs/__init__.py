"""Inputs that all studies share: rows of data sets, networks, shards of results."""
