# cython: language_level=3
"""Reports of progress in a lease entry. See _report.pyx."""
from runtime._layout cimport lease_t, report_t


cdef int fill_report(report_t *report, done, total, note) except -1
cdef void write_report(lease_t *lease, report_t *report) noexcept nogil
cdef object read_report(lease_t *lease)
