"""What is done to a trained model, and what that brings: `python -m moe.post DIR`."""
