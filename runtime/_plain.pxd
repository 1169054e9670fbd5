# cython: language_level=3
"""Plain values: of built-in types alone, so that neither pickling nor unpickling them runs anybody's code.

For them many detours of the serializer fall away: nothing can be out of band, by value, refuse, or fail in
the other process. A plain value that is also *fixed* can never change, so it may share its pickle, and
what it is made of, with others.
"""
from libc.stdint cimport int64_t

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object o, int *overflow) except? -1

# A plain value as bytes and back: by marshal, which is several times faster than pickle for small ones, and
# reads nothing but such values. Both processes run the same interpreter.
cdef bytes plain_dumps(object value)
cdef object plain_loads(const char *data, Py_ssize_t nbytes)


cdef enum:
    PLAIN_MAX = 64 << 10    # bytes: larger values are pickled, which copies large strings of bytes once less

# Bytes that the pickle of a value takes, about; -1: it is not plain, or too much to look at.
cdef int64_t plain_bytes(object value)
# The same of a value that is plain and fixed.
cdef int64_t fixed_bytes(object value)
# How many values of a list, from `start` on, are plain and fixed, and stay below `limit` bytes in all; a
# first one that is larger by itself counts up to PLAIN_MAX.
cdef Py_ssize_t fixed_run(list values, Py_ssize_t start, int64_t limit)


cdef inline int64_t weigh_int(object value):
    cdef int overflow = 0
    PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow:
        return 10 + <int64_t>value.bit_length() // 8
    return 5
