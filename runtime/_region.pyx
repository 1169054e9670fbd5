# cython: language_level=3, boundscheck=False, wraparound=False
"""SharedRegion: a file that several processes map. segment.py makes the file, this module maps it.

Life of the mapping: made whole by create(), open() or from_fd(), or not at all; ended by close() or the
last reference. `exports` counts what must outlive a close(): views, blocks. `calls` counts what runs
without the GIL. Everything else happens under the GIL, so a check and the access it guards are one step.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.errno cimport ENOMEM, ENOSYS, errno
from libc.string cimport memcpy, memmove
from posix.mman cimport (
    MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MS_SYNC, PROT_READ, PROT_WRITE,
    mmap, msync, munmap,
)
from posix.types cimport off_t
from posix.unistd cimport close as c_close
from posix.unistd cimport getpid

from runtime._atomics cimport (
    MFD_ALLOW_SEALING, MFD_CLOEXEC, a64_cas_seq_cst, a64_fetch_add_seq_cst, a64_load_seq_cst,
    a64_store_seq_cst, sys_memfd_create,
)
from runtime._identity cimport identity_pid, identity_start, my_identity

import fcntl
import os

from runtime import segment
from runtime.errors import RegionFull
from runtime.memory import extend, reserve


cdef extern from *:
    void _Static_assert(bint holds) nogil           # C11: checked by the compiler, no code
    Py_ssize_t PyNumber_AsSsize_t(object value, PyObject *error) except? -1


cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
    int fallocate(int fd, int mode, off_t offset, off_t length)


cdef enum:
    LARGE_COPY = 65536          # bytes from which a copy lets other threads run


cdef void layout_holds() noexcept nogil:
    _Static_assert(sizeof(region_about) == 64)
    _Static_assert(sizeof(region_pool) == 64)
    _Static_assert(sizeof(region_state) == 64)
    _Static_assert(sizeof(region_header) == HEADER_BYTES)


# ---- arguments -------------------------------------------------------------------------------------

cdef int to_size(object value, str what, size_t *out) except -1:
    cdef Py_ssize_t n = PyNumber_AsSsize_t(value, NULL)     # NULL: too large is cut to 2^63 - 1
    if n < 0:
        raise ValueError(f"{what} must not be negative, it is {value}")
    out[0] = <size_t>n
    return 0


cdef uint64_t to_u64(object value) except? 0xFFFF:
    if not isinstance(value, int):
        value = value.__index__() if hasattr(value, "__index__") else _not_an_int(value, "the value")
    if not 0 <= value <= 0xFFFFFFFFFFFFFFFF:
        raise ValueError(f"the value must be in 0 .. 2**64 - 1, it is {value}")
    return <uint64_t>value


def _not_an_int(value, what):
    raise TypeError(f"{what} must be an int, not {type(value).__name__}")


cdef object checked_bytes(object value, str what):
    """A number of bytes that a region can have."""
    if not isinstance(value, int) or isinstance(value, bool):
        _not_an_int(value, what)
    if value <= 0:
        raise ValueError(f"{what} must be greater than 0 bytes, it is {value}")
    if value > segment.LARGEST:
        raise ValueError(f"{what} is {value} bytes; a process can address {segment.LARGEST}")
    return value


cdef int get_bytes(object data, Py_buffer *out) except -1:
    try:
        return PyObject_GetBuffer(data, out, PyBUF_SIMPLE)
    except BufferError as error:
        raise BufferError(
            "the data is not one contiguous run of bytes; pass bytes(data), or numpy.ascontiguousarray(data)"
        ) from error


# ---- views -----------------------------------------------------------------------------------------

@cython.final
@cython.no_gc
cdef class _Window:
    """A part of a region that a memoryview shows. The region stays mapped while one is alive."""
    cdef SharedRegion region
    cdef size_t offset, length
    cdef bint held

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.region.base + self.offset, <Py_ssize_t>self.length, 0, flags)

    def __dealloc__(self):
        # Not when an export ends: numpy keeps what it finds behind a memoryview, not the memoryview.
        if self.held:
            self.region.drop()


# ---- the region ------------------------------------------------------------------------------------

@cython.final
@cython.no_gc                   # holds nothing that could refer back to it
cdef class SharedRegion:
    """Shared memory that several processes read and write: bytes at offsets, and atomic 64-bit words.

    Made by `SharedRegion.create(size)`; reached from other processes by fork, by `open(name)`, or by
    `from_fd(fd)` with a descriptor that was sent. Its memory is reserved at creation: later use cannot run
    out of memory. Offsets and lengths are in bytes, from 0 to `size`; beyond that is ValueError and
    touches nothing.

    Thread-safety: every method may be called from any thread. The u64 operations are atomic and
    sequentially consistent between all threads and processes; bytes are copied without a lock, so
    concurrent writers of the same bytes must agree among themselves.
    Fork-safety: a forked child shares the memory, and may close() its own mapping without disturbing the
    parent.
    Blocking: nothing waits; copies of 64 KiB and more, and flush(), let other threads run meanwhile.
    Raises: ValueError for offsets, lengths and values out of range and after close(); RegionFull (a
    MemoryError) when there is no memory; BufferError from close() while a view or a block is in use.
    """

    def __cinit__(self):
        self._fd = -1

    def __init__(self, *args, **kwargs):
        raise TypeError("use SharedRegion.create(size), SharedRegion.open(name) or SharedRegion.from_fd(fd)")

    @classmethod
    def create(cls, size, *, name=None, max_size=None, _later=()):
        """A new region of `size` bytes, all zero.

        Without a name it is a memory file that vanishes with its last user. With one it is
        /dev/shm/<name>, for this user only (mode 0600), seen by others when it is complete, there until
        unlink(). `max_size` (bytes, at least `size`) reserves address space for growing; no memory.
        `_later` (for the runtime itself): (from, to) of parts, in order, that are holes until `_supply`.

        Raises: FileExistsError when the name is taken; RegionFull when the memory is not there;
        ValueError, TypeError for wrong sizes and names.
        """
        cdef SharedRegion self = cls.__new__(cls)
        data = checked_bytes(size, "size")
        largest = data if max_size is None else checked_bytes(max_size, "max_size")
        if largest < data:
            raise ValueError(f"max_size ({largest}) is less than size ({data})")
        path = temporary = None
        if name is not None:
            path = segment.path_of(name)
            if os.path.lexists(path):       # known early; the link at the end decides
                raise segment.name_taken(path)
        try:
            if path is None:
                self._fd = open_memfd()
            else:
                self._fd, temporary = segment.open_unnamed()
            extend(self._fd, segment.file_bytes(data))
            begin = 0
            for hole, end in _later:
                reserve(self._fd, HEADER_BYTES + hole, begin)
                begin = HEADER_BYTES + end
            reserve(self._fd, segment.file_bytes(data), begin)
            self.map_file(data, largest)
            write_header(self, data, largest)
            self._file = segment.examine(self._fd, "the new file").file
            if path is None:
                # Nobody can cut the file under another's mapping, which would be its SIGBUS.
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            else:
                segment.link(self._fd, temporary, path)
                self._name = name
        except BaseException:
            self.unmap()
            raise
        finally:
            if temporary is not None:
                os.unlink(temporary)
        return self

    def _restate(self):
        """Write the header anew: another process may have written over it. For who made the region, with no
        room to grow.
        """
        self.check_open()
        write_header(self, self.length, self.length)

    def _supply(self, begin, end):
        """Give memory to a part that was left for later. Raises: RegionFull; nobody may touch it then."""
        reserve(self._fd, HEADER_BYTES + end, HEADER_BYTES + begin)

    def _discard(self, size_t begin, size_t end):
        """Take the memory of a part away; what is read there from now on is 0. False: it cannot be done."""
        cdef int fd = self._fd
        cdef int rc
        with nogil:
            rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <off_t>(HEADER_BYTES + begin),
                           <off_t>(end - begin))
        return rc == 0

    @classmethod
    def open(cls, name):
        """The existing region `name`.

        Raises: FileNotFoundError; ValueError when the file is not a region, was truncated, or has another
        layout version; PermissionError when another user owns it.
        """
        cdef SharedRegion self = cls.__new__(cls)
        path = segment.path_of(name)
        self._fd = segment.open_named(path)
        self.adopt(path)
        self._name = name
        return self

    @classmethod
    def from_fd(cls, fd):
        """The region in the file `fd` (opened for reading and writing); the descriptor is duplicated.

        Raises: OSError for a bad descriptor; ValueError as open().
        """
        cdef SharedRegion self = cls.__new__(cls)
        if not isinstance(fd, int) or isinstance(fd, bool):
            _not_an_int(fd, "fd")
        if not 0 <= fd <= 0x7FFFFFFF:
            raise ValueError(f"fd must be a file descriptor, it is {fd}")
        self._fd = os.dup(fd)
        self.adopt(f"file descriptor {fd}")
        return self

    cdef int adopt(self, str what) except -1:
        """Check and map the file that `_fd` is; on failure nothing stays open."""
        try:
            data, largest, self._file = segment.examine(self._fd, what)
            self.map_file(data, largest)
        except BaseException:
            self.unmap()
            raise
        return 0

    cdef int map_file(self, size_t data_bytes, size_t max_bytes) except -1:
        """Map the header, the data and the room to grow. Past the end of the file the mapping is address
        space only: the bounds checks keep everyone from touching it."""
        cdef size_t reserved = HEADER_BYTES + ((max_bytes + 4095) & ~<size_t>4095)
        cdef void *at
        at = mmap(NULL, reserved, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, self._fd, 0)
        if at == MAP_FAILED:
            if errno == ENOMEM:
                raise RegionFull(f"this process has no address space for {reserved} bytes (see ulimit -v)")
            raise OSError(errno, f"cannot map the region: {os.strerror(errno)}")
        self.base = <char *>at + HEADER_BYTES
        self.length = data_bytes
        self.reserved = reserved
        self.owner_pid = getpid()
        return 0

    cdef void unmap(self) noexcept:
        """End the mapping and the descriptor, for this process alone."""
        if self.base != NULL:
            munmap(self.base - HEADER_BYTES, self.reserved)
            self.base = NULL
        if self._fd >= 0:
            c_close(self._fd)
            self._fd = -1

    def __dealloc__(self):
        # A forked child may have closed the inherited number and opened its own file under it: leave it.
        if self.base != NULL and self.owner_pid != getpid():
            self._fd = -1
        self.unmap()

    cdef int remap_private(self) noexcept nogil:
        cdef char *at
        if self.base == NULL:
            return 0
        at = self.base - HEADER_BYTES
        self.private = True
        if mmap(at, self.reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                self._fd, 0) != MAP_FAILED:
            return 0
        # The kernel promises no memory for private pages (vm.overcommit_memory=2), and some versions have
        # taken the old mapping away by now.
        mmap(at, self.reserved, PROT_READ, MAP_SHARED | MAP_FIXED, self._fd, 0)
        return -1

    # ---- guards ----

    cdef int check_open(self) except -1:
        if self.base == NULL:
            raise ValueError("the region is closed")
        return 0

    cdef int check_range(self, size_t offset, size_t length) except -1:
        self.check_open()
        if not inside(offset, length, self.length):
            raise ValueError(
                f"offset {offset} and length {length} reach outside the region of {self.length} bytes"
            )
        return 0

    cdef a64_t *word(self, object offset) except NULL:
        cdef size_t at = 0
        to_size(offset, "offset", &at)
        if at & 7:
            raise ValueError(f"an atomic word needs an offset that 8 divides, not {offset}")
        self.check_range(at, 8)
        return <a64_t *>(self.base + at)

    cdef int hold(self) except -1:
        self.check_open()
        self.exports += 1
        return 0

    cdef void drop(self) noexcept:
        self.exports -= 1

    cdef int enter(self) except -1:
        self.check_open()
        if self.calls_pid != getpid():      # forked: the calls that were under way have no thread here
            self.calls_pid = getpid()
            self.calls = 0
        self.calls += 1
        return 0

    cdef void leave(self) noexcept:
        self.calls -= 1

    # ---- bytes ----

    def read_at(self, offset, length):
        """`length` bytes from `offset` on, as a copy."""
        cdef size_t at = 0, n = 0
        cdef char *to
        to_size(offset, "offset", &at)
        to_size(length, "length", &n)
        self.check_range(at, n)
        copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        to = PyBytes_AS_STRING(copy)
        copy_bytes(self, to, self.base + at, n)
        return copy

    def write_at(self, offset, data):
        """Copy a bytes-like object to `offset`."""
        cdef size_t at = 0
        cdef Py_buffer source
        to_size(offset, "offset", &at)
        get_bytes(data, &source)
        try:
            # Checked after the buffer was asked for: that may run code of others, which may close the region.
            self.check_range(at, <size_t>source.len)
            copy_bytes(self, self.base + at, <char *>source.buf, <size_t>source.len)
        finally:
            PyBuffer_Release(&source)

    def view(self, offset, length):
        """A writable memoryview of the memory itself; it keeps the region mapped."""
        cdef size_t at = 0, n = 0
        cdef _Window window
        to_size(offset, "offset", &at)
        to_size(length, "length", &n)
        self.check_range(at, n)
        window = _Window.__new__(_Window)
        window.region = self
        window.offset = at
        window.length = n
        self.hold()
        window.held = True
        return memoryview(window)

    # ---- atomic words ----

    def load_u64(self, offset):
        """The word at `offset` (a multiple of 8)."""
        return a64_load_seq_cst(self.word(offset))

    def store_u64(self, offset, value):
        """Set the word at `offset` to `value`, 0 .. 2**64 - 1."""
        cdef uint64_t v = to_u64(value)
        a64_store_seq_cst(self.word(offset), v)

    def fetch_add_u64(self, offset, n):
        """Add `n` (-2**63 .. 2**64 - 1) to the word at `offset`, modulo 2**64; what it was before."""
        cdef uint64_t v
        if isinstance(n, int) and n < 0:
            if n < -0x8000000000000000:
                raise ValueError(f"the value must be in -2**63 .. 2**64 - 1, it is {n}")
            v = <uint64_t><long long>n
        else:
            v = to_u64(n)
        return a64_fetch_add_seq_cst(self.word(offset), v)

    def compare_exchange_u64(self, offset, expected, desired):
        """Set the word at `offset` to `desired` if it is `expected`; whether it was."""
        cdef uint64_t old = to_u64(expected), new = to_u64(desired)
        return <bint>a64_cas_seq_cst(self.word(offset), old, new)

    # ---- life ----

    def flush(self):
        """Write changes back to the file; blocks until done. For memory files that is a formality."""
        cdef size_t n
        cdef void *at
        cdef int rc, code = 0
        self.enter()
        at = self.base - HEADER_BYTES
        n = HEADER_BYTES + ((self.length + 4095) & ~<size_t>4095)
        with nogil:
            rc = msync(at, n, MS_SYNC)
            if rc < 0:
                code = errno
        self.leave()
        if rc < 0:
            raise OSError(code, f"flush failed: {os.strerror(code)}")

    def close(self):
        """End this process's mapping. Idempotent. A named region stays, for open(), until unlink().

        Raises: BufferError while views or blocks of the region are alive, or another thread copies.
        """
        if self.base == NULL or os is None:     # the interpreter has ended, and soon the mapping has, too
            return
        try:
            status = os.fstat(self._fd)
            ours = (status.st_dev, status.st_ino) == self._file
        except OSError:
            ours = False
        # From here on no other thread runs, and none has begun to use what we are about to unmap.
        if self.exports:
            raise BufferError(f"{self.exports} views or blocks of the region are alive: release them first")
        if self.calls and self.calls_pid == getpid():
            raise BufferError("another thread is using the region at this moment")
        if not ours:
            self._fd = -1       # somebody closed our descriptor, and the number may be another file's
        self.unmap()

    def unlink(self):
        """Remove the name; mappings live on. Idempotent, allowed after close(), from any process; nothing
        to do for a region without a name. A file that took over the name is left alone."""
        if self._name is None:
            return
        path = segment.path_of(self._name)
        try:
            status = os.stat(path, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._file:
                os.unlink(path)
        except FileNotFoundError:
            pass

    def __enter__(self):
        self.check_open()
        return self

    def __exit__(self, kind, value, trace):
        self.close()

    @property
    def name(self):
        """The name given to create() or open(); None for a memory file."""
        return self._name

    @property
    def size(self):
        """Bytes of data."""
        return self.length

    @property
    def fd(self):
        """The file's descriptor, to be sent or inherited; it belongs to the region."""
        self.check_open()
        return self._fd

    def __repr__(self):
        state = "closed" if self.base == NULL else f"fd={self._fd}"
        return f"<{type(self).__name__} name={self._name!r} size={self.length} {state}>"

    def __reduce__(self):
        raise TypeError(
            "a SharedRegion cannot be pickled: pass its name and open(name) there, "
            "send its fd and from_fd(fd) there, or let a forked child inherit it"
        )


cdef int copy_bytes(SharedRegion region, char *to, const char *source, size_t n) except -1:
    if n < LARGE_COPY:
        memmove(to, source, n)
        return 0
    region.enter()
    with nogil:
        memmove(to, source, n)
    region.leave()
    return 0


cdef int open_memfd() except -1:
    cdef int fd = sys_memfd_create(b"runtime-region", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        if errno == ENOSYS:
            raise OSError(ENOSYS, "this kernel has no memory files: create the region with a name")
        raise OSError(errno, f"cannot make a memory file: {os.strerror(errno)}")
    return fd


cdef int write_header(SharedRegion region, object data, object largest) except -1:
    cdef uint64_t me = my_identity()
    cdef bytes packed = segment.pack_header(data, largest, identity_pid(me), identity_start(me))
    memcpy(region.base - HEADER_BYTES, PyBytes_AS_STRING(packed), <size_t>len(packed))
    return 0
