"""What both stages speak: the sample schema, settings, errors, files, progress. Imports no other package of the project."""

__version__ = "0.1.0"
