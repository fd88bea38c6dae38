"""Independent reference implementations in NumPy, and test helpers: random weights, distances.

`loops` does not import the library. The PyTorch references are in convert/torch_networks.py.
"""
