# cython: language_level=3
"""Reports of progress in a lease entry. One writer, the worker; the host reads. Protocol: _layout.pxd.

Neither makes a system call, waits, or sends anything: a report in a tight loop costs a few stores.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.float cimport PyFloat_AS_DOUBLE
from libc.math cimport isfinite
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from runtime._atomics cimport *
from runtime._layout cimport *

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef int TRIES = 100            # times that a reader begins again, while the worker reports on and on


cdef unsigned char bits_of(value, str name, uint64_t *bits) except 255:
    """The bits of a number; what kind it is. Raises: TypeError, ValueError, OverflowError."""
    cdef int64_t whole
    cdef double real
    if not isinstance(value, (int, float)):         # numpy's numbers have one of these, a text has not
        if hasattr(value, "__index__"):
            value = value.__index__()
        elif hasattr(value, "__float__"):
            value = value.__float__()
        else:
            raise TypeError(f"{name} must be an int or a float, not {type(value).__name__}")
    if isinstance(value, float):
        real = PyFloat_AS_DOUBLE(value)
        if not isfinite(real):
            raise ValueError(f"{name} must be a finite number, not {value}")
        if real < 0:
            raise ValueError(f"{name} must not be negative: {value}")
        memcpy(bits, &real, sizeof(real))
        return V_FLOAT
    if value < 0:
        raise ValueError(f"{name} must not be negative: {value}")
    if value > 0x7FFFFFFFFFFFFFFF:
        raise OverflowError(f"{name} must be less than 2**63, not {value}: report a float")
    whole = value
    memcpy(bits, &whole, sizeof(whole))
    return V_INT


cdef Py_ssize_t fitting(const char *text, Py_ssize_t size) noexcept nogil:
    """Bytes of a UTF-8 text that fit, cut between two characters."""
    if size <= NOTE_BYTES:
        return size
    size = NOTE_BYTES
    while size > 0 and (<unsigned char>text[size] & 0xC0) == 0x80:
        size -= 1
    return size


cdef int fill_report(report_t *report, done, total, note) except -1:
    """A report of these values. They may run code of the user's. Raises: as `bits_of`."""
    cdef Py_ssize_t size = 0
    cdef const char *text = NULL
    report.done_kind = bits_of(done, "done", &report.done)
    report.total = 0
    report.total_kind = V_NONE if total is None else bits_of(total, "total", &report.total)
    if not isinstance(note, str):
        raise TypeError(f"note must be a str, not {type(note).__name__}")
    if note:
        try:
            text = PyUnicode_AsUTF8AndSize(note, &size)
        except UnicodeEncodeError:                  # half of a surrogate pair
            note = note.encode("utf-8", "replace").decode("utf-8")
            text = PyUnicode_AsUTF8AndSize(note, &size)
        size = fitting(text, size)
        memcpy(report.note, text, <size_t>size)
    report.note_bytes = <unsigned char>size
    return 0


cdef void write_report(lease_t *lease, const report_t *report) noexcept nogil:
    """Worker: the newest report of the lease that runs, beside the one before it; then the count."""
    cdef uint64_t count = a64_load_relaxed(&lease.reported) + 1     # ours alone while it runs
    cdef size_t used = <size_t>(report.note - <const char *>report) + report.note_bytes
    # Q1 pairs with Q4: what is written below is not seen before the count that this place was left with.
    fence_seq_cst()
    words_store(&lease.reports[count & 1], report, (used + 7) & ~<size_t>7)
    a64_store_release(&lease.reported, count)       # Q2 pairs with Q3


cdef object value_of(unsigned char kind, uint64_t bits):
    cdef int64_t whole
    cdef double real
    if kind == V_INT:
        memcpy(&whole, &bits, sizeof(whole))
        return whole
    if kind == V_FLOAT:
        memcpy(&real, &bits, sizeof(real))
        return real
    return None


cdef object read_report(lease_t *lease):
    """Host: the newest report of a lease as (done, total, note); None: there is none, or it makes no sense.

    Also None, as if it had come too early, when the worker reported a hundred times during the look.
    """
    cdef report_t copy
    if not copy_report(lease, &copy):
        return None
    if copy.done_kind not in (V_INT, V_FLOAT) or copy.total_kind > V_FLOAT or copy.note_bytes > NOTE_BYTES:
        return None                                             # the worker has run wild
    note = PyBytes_FromStringAndSize(copy.note, copy.note_bytes).decode("utf-8", "replace")
    return value_of(copy.done_kind, copy.done), value_of(copy.total_kind, copy.total), note


cdef bint copy_report(lease_t *lease, report_t *copy) noexcept nogil:
    """The newest one, whole. False: there is none, or a hundred more came during the look."""
    cdef uint64_t count = a64_load_acquire(&lease.reported)     # Q3
    cdef uint64_t now
    cdef int _k
    for _k in range(TRIES):
        if count == 0:
            return False
        words_load(copy, &lease.reports[count & 1], sizeof(report_t))
        fence_seq_cst()                                         # Q4
        now = a64_load_acquire(&lease.reported)
        if now == count:
            return True
        count = now
    return False
