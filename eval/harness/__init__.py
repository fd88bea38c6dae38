"""Benchmark tasks of lm_eval (EleutherAI's Language Model Evaluation Harness)."""
