"""Token arrays as `.npy` files."""

from pathlib import Path

import numpy as np

from flash.errors import InputError
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


def map_array(path: Path) -> np.ndarray:
    """Map a file of `write_array` into memory.

    Raises:
        InputError: The file is damaged, or holds something else than token ids.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy reads headers as Python, which fails in its own ways
        raise InputError(f"{path}: damaged ({error}); make it again") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind != "u":
        raise InputError(f"{path}: expected an array of token ids; make it again")
    return array
