"""Corpora, tokenizers, packed sequences, and the data module."""
