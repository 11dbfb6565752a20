"""What is trained on the stream: the pre-training, and the tasks that a pre-trained model is fine-tuned for."""
