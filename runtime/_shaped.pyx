# cython: language_level=3
"""A flat buffer with a format and a shape: memoryview.cast knows native single characters, and no zero."""
cimport cython
from cpython.buffer cimport PyBUF_FULL_RO, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

cdef enum:
    NDIM = 64                   # dimensions of a memoryview, at most


@cython.no_gc
cdef class Shaped:
    """Memory of another object, exported in C order, with the given format, bytes per item and shape.

    Thread-safety: immutable. Raises: ValueError if the shape does not fill the memory. Only memoryview can
    look at it.
    """
    cdef Py_buffer source
    cdef bint held
    cdef bytes form
    cdef int ndim
    cdef Py_ssize_t itemsize
    cdef Py_ssize_t shape[NDIM]
    cdef Py_ssize_t strides[NDIM]

    def __cinit__(self, source, str form not None, Py_ssize_t itemsize, tuple shape not None):
        cdef Py_ssize_t i, n
        cdef Py_ssize_t nbytes = itemsize
        if itemsize < 1 or len(shape) > NDIM:
            raise ValueError(f"no view has {itemsize} bytes per item and {len(shape)} dimensions")
        self.form = form.encode()
        self.itemsize = itemsize
        self.ndim = <int>len(shape)
        PyObject_GetBuffer(source, &self.source, PyBUF_SIMPLE)
        self.held = True
        for i in range(self.ndim):
            self.shape[i] = shape[i]
        for i in range(self.ndim - 1, -1, -1):
            n = self.shape[i]
            self.strides[i] = nbytes
            if n < 0 or (n and self.source.len and nbytes > self.source.len // n):
                nbytes = -1
                break
            nbytes = nbytes * n if self.source.len else min(nbytes, n)
        if nbytes != self.source.len:
            raise ValueError(f"{self.source.len} bytes are not items of {itemsize} in the shape {shape}")

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_FULL_RO != PyBUF_FULL_RO:
            raise BufferError("only a memoryview can look at this")
        view.buf = self.source.buf
        view.len = self.source.len
        view.readonly = self.source.readonly
        view.itemsize = self.itemsize
        view.format = <char *>self.form
        view.ndim = self.ndim
        view.shape = self.shape
        view.strides = self.strides
        view.suboffsets = NULL
        view.internal = NULL
        view.obj = self

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.source)
