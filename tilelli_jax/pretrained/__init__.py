"""Pretrained checkpoints of other libraries: a name map for each family, and Hugging Face directories."""
