"""Four public extractors, each written out slowly and literally, to hold the package's own against."""
