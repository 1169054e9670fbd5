# cython: language_level=3
"""The life of a slot. See _slots.pyx."""
from runtime._harvest cimport Harvest


cdef class Slots(Harvest):
    pass
