"""Slow studies; their result files lie in ``results``."""
