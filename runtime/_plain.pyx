# cython: language_level=3
"""Which values are plain. See _plain.pxd."""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from cpython.ref cimport Py_TYPE
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.string cimport memcpy

cdef extern from "marshal.h":
    object PyMarshal_WriteObjectToString(object value, int version)
    object PyMarshal_ReadObjectFromString(const char *data, Py_ssize_t nbytes)

cdef extern from "Python.h":
    Py_ssize_t PyUnicode_GET_LENGTH(object o)
    Py_ssize_t PyBytes_GET_SIZE(object o)
    PyObject *PyList_GET_ITEM(object o, Py_ssize_t i)
    Py_ssize_t PySequence_Fast_GET_SIZE(object o)
    PyObject *PySequence_Fast_GET_ITEM(object o, Py_ssize_t i)

cdef int DEPTH = 6              # of containers in containers
cdef int64_t ELEMENTS = 256     # looking at more takes as long as it saves


cdef int VERSION = 2            # of marshal's format: the last one that shares nothing between values


cdef bytes plain_dumps(object value):
    return PyMarshal_WriteObjectToString(value, VERSION)


cdef object plain_loads(const char *data, Py_ssize_t nbytes):
    if scan(data, nbytes, 2 * DEPTH) != nbytes:
        raise ValueError("the bytes are no plain value")
    return PyMarshal_ReadObjectFromString(data, nbytes)


cdef Py_ssize_t scan(const char *data, Py_ssize_t room, int depth) noexcept nogil:
    """How many bytes the value takes that begins here; -1: it is none, or does not fit into the room.

    marshal believes the lengths that it reads: three bytes of nonsense make a tuple of 16 GiB.
    """
    cdef char kind
    cdef uint32_t n
    cdef int _n
    cdef int32_t digits
    cdef Py_ssize_t at, each
    if room < 1 or depth < 0:
        return -1
    kind = data[0]
    if kind == c'N' or kind == c'T' or kind == c'F':
        return 1
    if kind == c'g':
        return 9 if room >= 9 else -1
    if room < 5 and kind != c'{':
        return -1
    if kind == c'i':
        return 5
    if kind == c'{':
        at = 1
        while at < room and data[at] != c'0':
            for _n in range(2):
                each = scan(data + at, room - at, depth - 1)
                if each < 0:
                    return -1
                at += each
        return at + 1 if at < room else -1
    memcpy(&n, data + 1, 4)                     # marshal is little-endian, as all that we run on
    if kind == c'l':
        memcpy(&digits, data + 1, 4)
        each = 2 * <Py_ssize_t>(digits if digits >= 0 else -<int64_t>digits)
        return 5 + each if each <= room - 5 else -1
    if kind == c'u' or kind == c's':
        return 5 + <Py_ssize_t>n if <Py_ssize_t>n <= room - 5 else -1
    if kind != c'(' and kind != c'[' or <Py_ssize_t>n > room - 5:
        return -1
    at = 5
    while n:
        each = scan(data + at, room - at, depth - 1)
        if each < 0:
            return -1
        at += each
        n -= 1
    return at


def unpack_plain(data):
    """A plain value again, from any buffer. Raises: ValueError, EOFError, TypeError for other bytes."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return plain_loads(<const char *>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


cdef int64_t weigh(object value, bint fixed, int depth, int64_t *left):
    cdef object kind = <object>Py_TYPE(value)
    cdef int64_t total = 4, each
    cdef Py_ssize_t i, n
    cdef Py_ssize_t at = 0
    cdef PyObject *key
    cdef PyObject *item
    if value is None or kind is bool:
        return 5
    if kind is int:
        return weigh_int(value)
    if kind is str:
        return 10 + PyUnicode_GET_LENGTH(value)
    if kind is float:
        return 9
    if kind is bytes:
        return 10 + PyBytes_GET_SIZE(value)
    if depth == 0:
        return -1
    if kind is tuple or (kind is list and not fixed):
        n = PySequence_Fast_GET_SIZE(value)
        left[0] -= n
        if left[0] < 0:
            return -1
        for i in range(n):
            each = weigh(<object>PySequence_Fast_GET_ITEM(value, i), fixed, depth - 1, left)
            if each < 0:
                return -1
            total += each
        return total
    if kind is dict and not fixed:
        left[0] -= 2 * len(<dict>value)
        if left[0] < 0:
            return -1
        while PyDict_Next(value, &at, &key, &item):
            each = weigh(<object>key, fixed, depth - 1, left)
            if each < 0:
                return -1
            total += each
            each = weigh(<object>item, fixed, depth - 1, left)
            if each < 0:
                return -1
            total += each
        return total
    return -1


cdef int64_t plain_bytes(object value):
    cdef int64_t left = ELEMENTS
    return weigh(value, False, DEPTH, &left)


cdef int64_t fixed_bytes(object value):
    cdef int64_t left = ELEMENTS
    return weigh(value, True, DEPTH, &left)


cdef Py_ssize_t fixed_run(list values, Py_ssize_t start, int64_t limit):
    cdef Py_ssize_t i = start
    cdef Py_ssize_t n = len(values)
    cdef int64_t each, total = 0
    cdef PyObject *item
    while i < n:
        item = PyList_GET_ITEM(values, i)
        if <object>Py_TYPE(<object>item) is int:
            each = weigh_int(<object>item)
        else:
            each = fixed_bytes(<object>item)
        if each < 0:
            break
        total += each
        if total > limit and (i > start or total > PLAIN_MAX):
            break
        i += 1
    return i - start
