"""From shards to batches: sources, corpus, stream."""
