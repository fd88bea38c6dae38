"""Other people's checkpoints: a map of names for each family, and the directories they come in."""
