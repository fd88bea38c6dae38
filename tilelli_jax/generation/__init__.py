"""Generation: decoding with caches, and the rule by which a network abstains."""
