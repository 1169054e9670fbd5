# cython: language_level=3
"""C's own buffers of stdout and stderr, in a worker."""
from libc.stdio cimport FILE, fflush, stdout

cdef extern from "<stdio.h>" nogil:
    int _IOLBF
    int setvbuf(FILE *stream, char *buffer, int mode, size_t size)


def line_buffer_stdio():
    """Lines that C code prints leave at once; into a pipe it would keep 4 KiB back, and lose them at a crash.

    In a process that has just been forked: whatever an earlier printf has left goes out first.
    """
    fflush(stdout)
    setvbuf(stdout, NULL, _IOLBF, 0)


def flush_stdio():
    """What C code has printed and C still keeps."""
    with nogil:
        fflush(stdout)
