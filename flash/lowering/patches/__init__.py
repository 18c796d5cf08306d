"""Replacements of parts of ExecuTorch, each with a test that says what it relies on."""
