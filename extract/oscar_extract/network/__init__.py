"""The detectors' networks, and where their weights come from."""
