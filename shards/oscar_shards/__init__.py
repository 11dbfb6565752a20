"""The format between the two stages: webdataset tars with a Parquet index."""
