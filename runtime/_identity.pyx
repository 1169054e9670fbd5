# cython: language_level=3
"""Identities of processes. The meaning stands in the .pxd."""
from libc.errno cimport ESRCH, errno
from libc.stdio cimport snprintf
from libc.string cimport memrchr
from posix.fcntl cimport O_CLOEXEC, O_RDONLY
from posix.fcntl cimport open as c_open
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap
from posix.signal cimport kill
from posix.unistd cimport close as c_close
from posix.unistd cimport getpid
from posix.unistd cimport read as c_read

from runtime._atomics cimport (
    MFD_ALLOW_SEALING, MFD_CLOEXEC, a64_load_relaxed, a64_store_relaxed, sys_memfd_create, sys_pidfd_open,
    sys_pidfd_send_signal,
)

import os


cdef enum:
    PAGE_BYTES = 4096
    WIPE_ON_FORK = 18           # MADV_WIPEONFORK, Linux 4.14

cdef a64_t *own = NULL
cdef a64_t unwiped              # in use only where the kernel cannot wipe a page at fork


def _forget():
    """What the wiped page does, for kernels without MADV_WIPEONFORK."""
    a64_store_relaxed(own, 0)


cdef int make_own_word() except -1:
    global own
    cdef void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == MAP_FAILED:
        raise MemoryError("no memory for one page")
    if madvise(page, PAGE_BYTES, WIPE_ON_FORK) == 0:
        own = <a64_t *>page
    else:
        munmap(page, PAGE_BYTES)
        own = &unwiped
        os.register_at_fork(after_in_child=_forget)
    return 0

make_own_word()


cdef a64_t *identity_word() noexcept nogil:
    return own


cdef uint64_t my_identity() noexcept nogil:
    cdef uint64_t identity = a64_load_relaxed(own)
    cdef uint64_t start = 0
    cdef bint ended = False
    cdef int pid
    if identity == 0:
        # Two threads may both come here: they write the same word.
        pid = getpid()
        if read_stat(pid, &start, &ended) < 0:
            start = 0
        identity = (<uint64_t>pid << 42) | start
        a64_store_relaxed(own, identity)
    return identity


cdef bint is_dead(uint64_t identity) noexcept nogil:
    cdef uint64_t start = 0, recorded = identity_start(identity)
    cdef bint ended = False
    cdef int pid = identity_pid(identity)
    if pid == 0:
        return True                 # nobody's: no identity has that
    if read_stat(pid, &start, &ended) < 0:
        # No such process, or no /proc, no descriptor left, hidden: only the first one counts as dead.
        return kill(pid, 0) == -1 and errno == ESRCH
    return ended or (recorded != 0 and start != recorded)


cdef uint64_t number_at(const char **at, const char *end) noexcept nogil:
    """Skip to the next blank, and read the digits behind it."""
    cdef uint64_t number = 0
    cdef const char *p = at[0]
    while p < end and p[0] != c" ":
        p += 1
    p += 1
    while p < end and c"0" <= p[0] <= c"9":
        number = number * 10 + <uint64_t>(p[0] - c"0")
        p += 1
    at[0] = p
    return number


cdef int read_stat(int pid, uint64_t *start, bint *ended) noexcept nogil:
    """Start time, and whether only a zombie is left, from /proc/<pid>/stat. -1: cannot be read."""
    cdef char path[32]
    cdef char text[1024]
    cdef const char *at
    cdef const char *end
    cdef uint64_t threads = 0
    cdef ssize_t n
    cdef int fd, field
    cdef char state
    snprintf(path, sizeof(path), b"/proc/%d/stat", pid)
    fd = c_open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    n = c_read(fd, text, sizeof(text))
    c_close(fd)
    if n <= 0:
        return -1
    end = text + n
    at = <const char *>memrchr(text, c")", <size_t>n)   # field 2, the name, may hold anything, ") Z 1" too
    if at == NULL or end - at < 3:
        return -1
    state = at[2]
    at += 2
    for field in range(4, 23):
        start[0] = number_at(&at, end)
        if field == 20:
            threads = start[0]
    if at > end:
        return -1
    start[0] = identity_start(start[0])
    # The main thread may have left a process that lives on: then it is a zombie with threads.
    ended[0] = (state == c"Z" or state == c"X") and threads <= 1
    return 0


# ---- system calls that not every Python has: its os module is built against the headers of its builder ----

def pidfd_open(int pid):
    """A descriptor of a process. Raises: OSError."""
    cdef int fd = sys_pidfd_open(pid)
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


def pidfd_send_signal(int fd, int number):
    """A signal to the process behind a descriptor. Raises: OSError, ProcessLookupError when it is gone."""
    if sys_pidfd_send_signal(fd, number) != 0:
        raise OSError(errno, os.strerror(errno))


def memfd_create(bytes name not None):
    """A file in memory that can be sealed, closed on exec. Raises: OSError."""
    cdef int fd = sys_memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd
