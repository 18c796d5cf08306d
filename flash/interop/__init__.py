"""Formats of other projects: Hugging Face folders, GGUF, ExecuTorch's `export_llm`."""
