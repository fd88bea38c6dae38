"""`tilelli difficulty`: do activations predict what a network gets wrong?"""
