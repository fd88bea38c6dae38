"""Byte text: where it comes from, how it is cut into windows, in what order it is read."""
