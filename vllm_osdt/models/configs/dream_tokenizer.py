"""Dream's tokenizer is Qwen2's under another name; with this class it needs no remote code."""

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Found by the name that the checkpoints give."""
