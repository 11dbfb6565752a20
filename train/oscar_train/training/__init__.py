"""The loop, its steps, and what watches over them."""
