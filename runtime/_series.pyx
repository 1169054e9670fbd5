# cython: language_level=3
"""A series: several plain values in one piece of bytes, from which a part can be read.

    S_INTS      64-bit signed integers in the order of the machine, 8 bytes each
    S_FLOATS    the same of doubles
    S_LIST      a pickled list of anything plain and fixed
    S_CALLS     a pickled list of tuples of arguments

A pickle costs 20 to 35 ns for each number, each way; the first two cost what making the number costs.
"""
from _pickle import dumps, loads

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_FromDouble
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE, PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF, Py_TYPE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from runtime._frame cimport S_CALLS, S_FLOATS, S_INTS, S_LIST

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object o, int *overflow) except? -1
    object PyLong_FromLongLong(long long value)


cdef Py_ssize_t number_run(list values, Py_ssize_t start, Py_ssize_t most):
    cdef Py_ssize_t i = start
    cdef Py_ssize_t end = min(PyList_GET_SIZE(values), start + most)
    cdef int overflow = 0
    if i < end and <object>Py_TYPE(<object>PyList_GET_ITEM(values, i)) is float:
        while i < end and <object>Py_TYPE(<object>PyList_GET_ITEM(values, i)) is float:
            i += 1
        return i - start
    while i < end and <object>Py_TYPE(<object>PyList_GET_ITEM(values, i)) is int:
        PyLong_AsLongLongAndOverflow(<object>PyList_GET_ITEM(values, i), &overflow)
        if overflow:
            break
        i += 1
    return i - start


cdef tuple pack_series(list values):
    cdef Py_ssize_t n = PyList_GET_SIZE(values)
    cdef Py_ssize_t i
    cdef int overflow = 0
    cdef int64_t *ints
    cdef double *floats
    cdef bytes data
    if n == 0 or number_run(values, 0, n) < n:
        return (S_LIST, dumps(values, 5))
    data = PyBytes_FromStringAndSize(NULL, 8 * n)
    if <object>Py_TYPE(<object>PyList_GET_ITEM(values, 0)) is float:
        floats = <double *>PyBytes_AS_STRING(data)
        for i in range(n):
            floats[i] = PyFloat_AS_DOUBLE(<object>PyList_GET_ITEM(values, i))
        return (S_FLOATS, data)
    ints = <int64_t *>PyBytes_AS_STRING(data)
    for i in range(n):
        ints[i] = PyLong_AsLongLongAndOverflow(<object>PyList_GET_ITEM(values, i), &overflow)
    return (S_INTS, data)


cdef list unpack_series(uint32_t status, data, uint32_t start, uint32_t count):
    cdef Py_buffer view
    cdef list values
    if status == S_LIST or status == S_CALLS:
        found = loads(data)
        if type(found) is not list or <uint64_t>start + count > <uint64_t>len(<list>found):
            raise ValueError(f"not a list with values {start} .. {start + count - 1}")
        return <list>found if count == len(<list>found) else (<list>found)[start:start + count]
    if status != S_INTS and status != S_FLOATS:
        raise ValueError(f"status {status} is no series")
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if 8 * (<uint64_t>start + count) > <uint64_t>view.len:
            raise ValueError(f"{view.len} bytes hold no numbers {start} .. {start + count - 1}")
        values = numbers(<char *>view.buf + 8 * <uint64_t>start, count, status == S_FLOATS)
    finally:
        PyBuffer_Release(&view)
    return values


cdef list numbers(const char *data, uint32_t count, bint floats):
    """Numbers that lie one behind the other, at any address."""
    cdef list values = PyList_New(count)
    cdef object value
    cdef int64_t integer
    cdef double real
    cdef uint32_t i
    for i in range(count):
        if floats:
            memcpy(&real, data + 8 * <uint64_t>i, 8)
            value = PyFloat_FromDouble(real)
        else:
            memcpy(&integer, data + 8 * <uint64_t>i, 8)
            value = PyLong_FromLongLong(integer)
        Py_INCREF(value)                            # the list steals one
        PyList_SET_ITEM(values, i, value)
    return values


cdef tuple series_part(uint32_t status, bytes data, uint32_t start, uint32_t count):
    if (status == S_INTS or status == S_FLOATS) and 8 * <uint64_t>count < <uint64_t>len(data):
        part = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + 8 * <uint64_t>start, 8 * <Py_ssize_t>count)
        return (part, 0)
    return (data, start)


def read_series(uint32_t status, data, uint32_t start, uint32_t count):
    """`count` values from `start` on. Raises: ValueError, or what unpickling raises, for other bytes."""
    return unpack_series(status, data, start, count)
