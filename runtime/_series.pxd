# cython: language_level=3
"""A series: several plain values in one piece of bytes, from which a part can be read. See _series.pyx."""
from libc.stdint cimport uint32_t

from runtime._frame cimport S_FLOATS, S_LIST


cdef inline bint is_series(uint32_t status) noexcept nogil:
    """Whether a frame's item with this status holds a series of values (not of tuples of arguments)."""
    return S_LIST <= status <= S_FLOATS

# (status, bytes) of fixed plain values.
cdef tuple pack_series(list values)
# `count` values from `start` on, out of any buffer. ValueError, or what unpickling raises: it holds no such.
cdef list unpack_series(uint32_t status, data, uint32_t start, uint32_t count)
# The bytes of a part, and where it begins in them.
cdef tuple series_part(uint32_t status, bytes data, uint32_t start, uint32_t count)
# How many values from `start` on, at most `most`, are ints of 64 bits, or floats, as the first one is.
cdef Py_ssize_t number_run(list values, Py_ssize_t start, Py_ssize_t most)
