"""What a model has learned, asked on images that it was not trained on."""
