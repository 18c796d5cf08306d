"""The decoder, its losses, and checkpoints in Hugging Face format."""
