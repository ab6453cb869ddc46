"""Hugging Face config classes of the families, so that their checkpoints load without remote code."""
