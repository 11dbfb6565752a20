"""Fine-tuned models at work on people's own photos: `open_model`, `open_photos`, `score`, `search`."""
