"""The network, its losses, and what they cost."""
