# cython: language_level=3
"""Makes pixels brighter, in all workers at once: `Kernel("brighten.kernels:brighten")`."""
from libc.stdint cimport uint8_t

from runtime.kernel cimport kernel_t


cdef api int brighten(const void *src, size_t src_len, void *dst, size_t dst_len,
                      const void *params) noexcept nogil:
    """params: one byte that is added to each; what is over 255 is 255."""
    cdef const uint8_t *old = <const uint8_t *>src
    cdef uint8_t *new = <uint8_t *>dst
    cdef int by = (<const uint8_t *>params)[0]
    cdef size_t i
    if dst_len != src_len:
        return 1
    for i in range(src_len):
        new[i] = <uint8_t>min(255, old[i] + by)
    return 0


cdef kernel_t _checked = brighten       # does not compile if it is no kernel
