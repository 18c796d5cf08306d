"""Writing of token arrays to `.npy` files."""

from pathlib import Path

import numpy as np

from flash.records import atomic_write


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a contiguous array of one axis as `numpy.save` does; as a whole or not at all.

    Raises:
        OSError: The disk is full; that of `numpy.save` does not tell.
    """
    layout = np.lib.format
    with atomic_write(path) as file:
        layout.write_array_header_1_0(file, layout.header_data_from_array_1_0(array))
        file.write(array.data)
