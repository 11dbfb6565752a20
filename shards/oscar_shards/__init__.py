"""The format between the stages: tar shards with a Parquet index beside each, and one manifest a folder."""
