"""The evaluation layer: NumPy and scikit-learn, on arrays that the library has made."""
