"""Stage 1: from images and texts to shards of detected regions."""
