"""Commands that need the library only; eval and convert have the commands of studies and conversion."""
