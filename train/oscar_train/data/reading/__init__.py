"""Regions: where their bytes are, here or behind a URL, and how they come into a batch."""
