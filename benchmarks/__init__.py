"""Measurements of slope_pl against dense training and against its peers; ``python -m benchmarks.run --help``."""
