"""Built-in corpora, written by deterministic generators: stories, facts of a small world, and a village."""
