"""What studies ask and whom: rows of data sets, and networks."""
