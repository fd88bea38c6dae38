"""Independent reference implementations in NumPy, and helpers of tests: random weights, distances.

`brute` imports nothing of the library. The references in PyTorch are in convert/torch_networks.py.
"""
