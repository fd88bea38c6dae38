"""Scores of whether a network knows an answer, from its answer and from samples.

Every score is oriented: higher means more likely to know. `likelihood` scores a greedy answer by its tokens,
`samples` compares sampled answers, `judgement` reads what the network says about its own answer.
"""
