# cython: language_level=3
"""What a worker's objects show of the region: arguments, what they refer to, and blocks of its own.

Whatever sees a block holds its BlockView: by an export, or as its base, as numpy does with what it finds in a
memoryview. What the views of a lease show is the host's, which frees it when the lease has ended. So a worker
tells the host before that of each block whose view something holds (R_KEEP), and when it is gone (R_UNKEEP).

A result that lies in a block goes back by reference (`locate`). Of arguments that were copied in for this
lease only if nothing else in this worker sees them: what it writes later would show in the host.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_REFCNT
from libc.stdint cimport uintptr_t
from posix.mman cimport MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport getpid

from runtime._atomics cimport *
from runtime._frame cimport B_FROZEN, B_READONLY, B_REF, B_SHARED, BlockSlice, frame_buffer_t
from runtime._layout cimport *


cdef class Viewer:
    """The blocks that a worker looks into, and its own.

    Thread-safety: for the thread that claims leases here; its views may be dropped in any thread.
    Fork-safety: in a fork of the worker views stay readable, and nothing is reported or freed.
    """

    def __cinit__(self):
        self.opened = []
        self.shown = {}

    cdef unkeep(self, uint64_t body, uint64_t tag):
        """The last view of a block that was kept is gone. Called from destructors: it must not wait."""

    cdef BlockView show(self, uint64_t body, uint64_t tag, uint64_t nbytes, uint32_t access, bint private):
        """A block of the host's, for the lease that runs. private: what is written to it stays here."""
        cdef BlockView view = BlockView.__new__(BlockView)
        view.port = self
        view.nbytes = nbytes
        view.body = body
        view.tag = tag
        view.access = access
        view.data = self.arena.base + body
        if private:
            view.map_private()
        self.opened.append(view)
        self.note(view)
        return view

    cdef BlockView create(self, uint64_t at, uint64_t tag, uint64_t nbytes):
        """The view of a private block of this slot, which is freed with it."""
        cdef BlockView view = BlockView.__new__(BlockView)
        view.port = self
        view.nbytes = nbytes
        view.body = self.arena.extents_at + at * EXTENT
        view.tag = tag
        view.data = self.arena.base + view.body
        view.own = True
        self.note(view)
        return view

    cdef int note(self, BlockView view) except -1:
        """There is a view of a block: the youngest, by which results are found; and one that a fork shows."""
        self.shown[view.body] = <uintptr_t><PyObject *>view
        self.arena.watched[<uintptr_t><PyObject *>view] = self.arena.index_of(view.body)
        return 0

    def resolve(self, uint64_t block, uint64_t tag, uint64_t nbytes, uint32_t flags):
        """For `read_frame`: a block that arguments refer to. Raises: ValueError when it is not there."""
        cdef BlockView view
        cdef uint64_t at = self.arena.index_of(block)
        cdef uint64_t word
        if block < self.arena.extents_at or at >= self.arena.counted():
            raise ValueError(f"malformed frame: there is no block at offset {block}")
        word = a64_load_acquire(&self.arena.heap.words[at])
        if x_state(word) != X_HOST or x_tag(word) != tag:
            raise ValueError(f"the block at offset {block} is gone: it was released while a task needed it")
        for view in self.opened:
            if view.body == block:
                return view                     # two arrays of one block see each other's changes
        return self.show(block, tag, nbytes, flags & (B_FROZEN | B_SHARED), not flags & (B_FROZEN | B_SHARED))

    def locate(self, view):
        """The slice of a block that a flat buffer of a result lies in; None: it is copied."""
        cdef Py_buffer buffer
        cdef BlockView block
        cdef int64_t at
        cdef uint64_t start
        PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
        try:
            at = self.arena.head_of(<const char *>buffer.buf, <uint64_t>buffer.len)
            pointer = self.shown.get(self.arena.extents_at + at * EXTENT) if at >= 0 else None
            if pointer is None:
                return None
            block = <BlockView><PyObject *><uintptr_t>pointer
            start = <uint64_t>(<char *>buffer.buf - block.data)
            if <char *>buffer.buf < block.data or start + <uint64_t>buffer.len > block.nbytes:
                return None
            return BlockSlice.of(block, <char *>buffer.buf, frame_buffer_t(
                <uint64_t>buffer.len, B_REF | block.access | (B_READONLY if buffer.readonly else 0), 0,
                block.body, block.nbytes, block.tag, start))
        finally:
            PyBuffer_Release(&buffer)


@cython.final
@cython.no_gc
cdef class BlockView:
    """The exporter of a block's memory in a worker; see the head of this file."""

    cdef int map_private(self) except -1:
        """Copy on write, page by page: what this lease writes, nobody else sees."""
        cdef void *at = mmap(NULL, self.nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE,
                             self.port.arena.region.fd, <int64_t>(PAGE + self.body))
        if at == MAP_FAILED:            # a page size that our offsets are no multiple of: a plain copy
            self.copy = PyBytes_FromStringAndSize(self.data, <Py_ssize_t>self.nbytes)
            self.data = PyBytes_AS_STRING(self.copy)
        else:
            self.mapping = self.data = <char *>at
        return 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.nbytes, self.access == B_FROZEN, flags)

    def __dealloc__(self):
        if self.port is None:
            return
        self.port.arena.watched.pop(<uintptr_t><PyObject *>self, None)
        if self.port.shown.get(self.body) == <uintptr_t><PyObject *>self:
            del self.port.shown[self.body]
        if self.kept and self.port.arena.pid == getpid():
            self.port.unkeep(self.body, self.tag)
        if self.own and self.port.arena.pid == getpid():
            self.port.arena.drop(self.port.arena.index_of(self.body), self.tag, X_PRIVATE, self.port.index)
        if self.mapping != NULL:
            munmap(self.mapping, self.nbytes)


cdef bint is_seen(BlockView view, list parts, list opened) except -1:
    """Whether anything holds a view but the slices of it among `parts`, the list `opened`, and the caller,
    by one reference.
    """
    cdef Py_ssize_t i, known = 1
    for i in range(len(parts)):
        known += (<BlockSlice>parts[i]).holder is view
    for i in range(len(opened) if opened is not None else 0):
        known += opened[i] is view
    return Py_REFCNT(view) > known
