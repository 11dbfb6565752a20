"""What a job is about: image files and tars, the layouts of published datasets, and their texts, in one corpus."""
