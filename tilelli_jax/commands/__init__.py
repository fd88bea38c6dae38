"""The commands that need the library alone; those of the studies lie beside them, in eval and convert."""
