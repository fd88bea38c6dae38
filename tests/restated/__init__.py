"""The networks written a second time, from their formulas alone: in PyTorch and in plain numpy.

`brute` and the `torch_*` files import nothing of the library: what agrees does so for that reason.
"""
