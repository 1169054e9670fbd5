# cython: language_level=3
"""The iterator that `map` returns: results come in lists, and go out one by one."""
from cpython.list cimport PyList_GET_SIZE


cdef class Stream:
    """Gives out the items of one list after another, each list from its end, and keeps none of them.

    more: called for the next list; its exceptions, StopIteration among them, end the iteration. end: called
    when the iteration has ended, is closed, or is dropped after it has begun; more than once, maybe. left:
    called for the number of items that are not in a list yet; None: unknown.
    Thread-safety: for one thread at a time.
    """
    cdef list items
    cdef object more
    cdef object end
    cdef object left
    cdef bint begun

    def __init__(self, more, end, left=None):
        self.items = []
        self.more = more
        self.end = end
        self.left = left

    def __iter__(self):
        return self

    def __next__(self):
        while PyList_GET_SIZE(self.items) == 0:
            self.begun = True
            try:
                self.items = self.more()
            except BaseException:
                self.end()
                raise
        return self.items.pop()

    def __length_hint__(self):
        left = self.left() if self.left is not None else None
        return NotImplemented if left is None else left + PyList_GET_SIZE(self.items)

    def close(self):
        """Cancel what has not started; the iteration is over."""
        self.items = []
        self.begun = True
        self.end()

    def __del__(self):
        if self.begun and self.end is not None:
            self.end()
