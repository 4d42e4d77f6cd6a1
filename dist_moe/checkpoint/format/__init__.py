"""The format of checkpoints and of Hugging Face folders on disk."""
