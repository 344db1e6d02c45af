"""The version number, in the one place that every other file reads it from."""

__version__ = "0.1.0"
