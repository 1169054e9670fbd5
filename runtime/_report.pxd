# cython: language_level=3
"""Reports of progress in a lease entry. See _report.pyx."""
from runtime._layout cimport lease_t


cdef int write_report(lease_t *lease, done, total, note) except -1
cdef object read_report(lease_t *lease)
