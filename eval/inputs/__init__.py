"""What studies share: rows of data sets, networks to ask, shards of what was found."""
