"""Both stages as batch jobs of a cluster."""
