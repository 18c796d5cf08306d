"""Formats of other projects: Hugging Face folders, GGUF, ExecuTorch's own `export_llm`."""
