# cython: language_level=3
"""Reports of progress in a lease entry. See _report.pyx."""
from runtime._layout cimport lease_t, report_t


cdef int fill_report(report_t *report, done, total, note) except -1
cdef object read_report(lease_t *lease)

# The two halves of the protocol, for nogil code.
cdef void write_report(lease_t *lease, const report_t *report) noexcept nogil
# False: there is none, or a hundred new ones came during the look.
cdef bint copy_report(lease_t *lease, report_t *copy) noexcept nogil
