"""The folder of a job: all that its processes share, as they see nothing else of one another."""
