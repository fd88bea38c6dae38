"""Parts of every command: errors, signals, progress and tables."""
