"""Building blocks of networks. They depend on shapes only, not on models, files or training."""
