"""`tilelli recall`: predict from activations whether an answer will be correct."""
