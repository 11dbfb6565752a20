"""What both stages speak: the sample schema, settings, errors, files, progress. Imports neither of them."""

__version__ = "0.1.0"
