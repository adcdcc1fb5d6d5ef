"""glibc's allocator told to keep large blocks for reuse instead of mapping and zeroing fresh pages for each tensor.

By default an allocation above a threshold (at most 32 MiB) is its own `mmap`, given back at `free`; every large
activation then costs page faults anew. The control is run so because an expert would run it so.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_large_blocks(nbytes: int = 1 << 30) -> bool:
    """Blocks up to `nbytes` come from the heap, which is not trimmed; False where the C library has no `mallopt`."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, nbytes)) and bool(mallopt(_M_TRIM_THRESHOLD, nbytes))
