"""The version of otpo, which other modules may ask without importing the package's names."""

__version__ = "0.1.0"
