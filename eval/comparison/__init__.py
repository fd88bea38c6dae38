"""`tilelli compare`: trains networks at equal budget and tests the difference."""
