"""Code that `tilelli convert --to hf` copies into a directory, for `trust_remote_code` of transformers."""
