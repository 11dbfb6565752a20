"""Stage 2: from shards to a pre-trained Oscar."""
