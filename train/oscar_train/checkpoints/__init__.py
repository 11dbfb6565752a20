"""What a run leaves and begins with: checkpoints, initial weights, exports."""
