"""Formats of the files that other projects read."""

from enum import Enum


class GgufFormat(Enum):
    """Storage of matrices; norms, biases and rotary factors are always float32."""

    f32 = "f32"
    """Exact."""
    f16 = "f16"
    """Format that llama.cpp's own quantization tools start from."""
    q8_0 = "q8_0"
    """8 bits, one scale for 32 weights."""
    q4_0 = "q4_0"
    """4 bits, one scale for 32 weights; embedding and head too, as in our .pte."""
