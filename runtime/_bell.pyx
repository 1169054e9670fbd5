# cython: language_level=3
"""What any thread may do at any moment, also in a signal handler or a destructor: ring a bell, send a hint,
keep an account.

A lock would not do. Python runs signal handlers in the main thread, between two bytecodes and inside of some
C functions (zmq's send is one), also while that thread holds a lock; a handler that then waits for the
runtime waits for threads that want the lock. So nothing is locked here: what may not be cut in two runs under
the GIL without bytecode in between, and what another thread is busy with is left to it.
"""
from collections import OrderedDict, deque

from cpython.exc cimport PyErr_SetFromErrno
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint64_t
from posix.unistd cimport close, read, write

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int count, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK


cdef class Bell:
    """How a thread that sleeps in poll() is woken by another one: an eventfd that any may ring, also after it
    was closed.
    """
    cdef readonly int fd        # -1: closed
    cdef public bint inert      # in a fork of the host

    def __cinit__(self):
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            PyErr_SetFromErrno(OSError)

    def ring(self):
        """Make a poll on the descriptor return."""
        cdef uint64_t one = 1
        if self.fd >= 0 and not self.inert:
            write(self.fd, &one, sizeof(one))       # fails only if it rings already

    def silence(self):
        """Take back what was rung."""
        cdef uint64_t count
        if self.fd >= 0:
            read(self.fd, &count, sizeof(count))    # fails only if nobody has rung

    def close(self):
        """No ring reaches the descriptor any more, which may be somebody else's soon. Idempotent."""
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            close(fd)

    def __dealloc__(self):
        if self.fd >= 0 and not self.inert:
            close(self.fd)


cdef class Outlet:
    """A socket that any thread may send through, one at a time, though none waits for another.

    Who comes while another thread is inside leaves the message to that one. A handler, or a destructor, that
    interrupts a send of its own thread does so where that send is complete: it may send, too.
    """
    cdef object push            # push(socket, message, flags); it may run signal handlers
    cdef object socket
    cdef int flags
    cdef unsigned long holder   # the thread that is inside; 0: none
    cdef object left            # deque of messages: what others left to it
    cdef readonly bint closed

    def __init__(self, push, socket, int flags):
        self.push = push
        self.socket = socket
        self.flags = flags
        self.left = deque()

    def send(self, message):
        """Send it, or leave it to the thread that is inside. False: it is closed. Raises: as the socket, but
        for this message alone; and what a signal handler raises. One that was left and fails is lost.
        """
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef unsigned long outer = self.holder
        cdef bint mine = True
        cdef object failure = None
        if self.closed:
            return False
        if outer != 0 and outer != me:
            self.left.append(message)
            return True
        self.holder = me
        try:
            while True:
                try:
                    self.push(self.socket, message, self.flags)
                except BaseException as error:      # it keeps nobody's message from being sent
                    if failure is None and (mine or not isinstance(error, Exception)):
                        failure = error
                if not self.left or self.closed:
                    break
                mine = False
                message = self.left.popleft()
        finally:
            self.holder = outer
            if outer == 0 and self.closed:
                self.socket.close(0)
        if failure is not None:
            raise failure
        return True

    @property
    def held(self):
        """Whether a thread is inside: a handler may have interrupted it, for as long as that takes."""
        return self.holder != 0

    def close(self):
        """Close the socket; if a thread is inside, that one does. Idempotent."""
        if not self.closed:
            self.closed = True
            if self.holder == 0:
                self.socket.close(0)


def replaced(dict table, key, old, new):
    """table[key] = new, if it is `old` now; None: if there is nothing. Whether it was."""
    if table.get(key) is not old:
        return False
    table[key] = new
    return True


cdef class Recent:
    """What was put here last, by key: so many things, of so many bytes altogether, but the
    last one in any case.

    Thread-safety: any thread, also in a signal handler. No bytecode runs between a thing's coming or going
    and its entry in the account, so whatever strikes, Ctrl-C included, the account is right.
    """
    cdef readonly object things     # OrderedDict: key -> (thing, bytes), the least recently used first
    cdef readonly Py_ssize_t nbytes  # of all things
    cdef Py_ssize_t most
    cdef Py_ssize_t limit           # bytes

    def __init__(self, Py_ssize_t most, Py_ssize_t limit):
        self.things = OrderedDict()
        self.most = most
        self.limit = limit

    def find(self, key):
        """The thing, which is now the one that was used last; None: it is not there."""
        entry = self.things.get(key)
        if entry is None:
            return None
        self.things.move_to_end(key)
        return (<tuple>entry)[0]

    def keep(self, key, thing, Py_ssize_t nbytes):
        """Put it here, unless there is one of this key. The one that is there."""
        cdef tuple entry = (thing, nbytes)
        cdef tuple kept = self.things.setdefault(key, entry)
        if kept is entry:
            self.nbytes += nbytes
            while len(self.things) > 1 and (len(self.things) > self.most or self.nbytes > self.limit):
                self.nbytes -= (<tuple>(<tuple>self.things.popitem(False))[1])[1]
        return kept[0]
