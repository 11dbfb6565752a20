"""Captions: what is trained on, how they are decoded, and how they are scored."""
