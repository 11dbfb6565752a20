"""What a fine-tuned model says of one's own photos."""
