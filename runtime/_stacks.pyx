# cython: language_level=3
"""How a worker hears that its stacks are wanted, without the GIL: somebody may hold that in C for ever."""
from libc.errno cimport EINTR, errno
from libc.stdio cimport snprintf
from libc.stdlib cimport strtoll
from posix.unistd cimport write

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *buffer, size_t size, int flags)


def next_question(int channel, int fd):
    """Wait for a question; its number, or -1 when none can come any more.

    It is noted in the file before this thread asks for the GIL: by then the thread that holds it, if it runs
    Python code, is told to let it go within 5 ms.
    """
    cdef char text[32]
    cdef char note[32]
    cdef long long number = -1
    cdef ssize_t size
    with nogil:
        while True:
            size = recv(channel, text, sizeof(text) - 1, 0)
            if size >= 0 or errno != EINTR:
                break
        if size > 0:
            text[size] = 0
            number = strtoll(text, NULL, 10)
            size = snprintf(note, sizeof(note), b"\x1e%lld\n", number)
            if write(fd, note, <size_t>size) < 0:
                number = -1
    return number
