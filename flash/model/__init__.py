"""The decoder, its losses, and Hugging Face checkpoints."""
