"""Networks over several devices: the mesh, sharding rules, and the collectives of a compiled program."""
