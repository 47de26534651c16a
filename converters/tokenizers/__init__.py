"""Vocabulary, special tokens and chat templates: from a checkpoint's files to GGUF metadata, and back."""
