# cython: language_level=3
"""The backstop of hints. See _rescue.pyx."""
from libc.stdint cimport uint32_t

from runtime._waiting cimport Waiting


cdef class Rescue(Waiting):
    cdef int collect_now(self, uint32_t index) except -1
    cdef bint wild(self, uint32_t index) except -1
    cdef bint occupied(self, uint32_t index) except -1
    cdef bint others(self, uint32_t index) except -1
