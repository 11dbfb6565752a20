"""Texts and tags: from the indexes of shards to arrays of token ids, once."""
