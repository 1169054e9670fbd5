# cython: language_level=3
"""Native threads that never touch a Python object. Python makes them; they live in `with nogil`."""
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport EINTR, errno
from libc.signal cimport SIGKILL
from libc.stdio cimport snprintf
from posix.fcntl cimport O_RDONLY, open
from posix.signal cimport kill
from posix.unistd cimport _exit, close, getppid, read, rmdir, unlink, write

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN

cdef extern from "<sys/wait.h>" nogil:
    int waitpid(int pid, int *status, int options)
    int WNOHANG

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long arg2, unsigned long arg3, unsigned long arg4, unsigned long arg5)
    int PR_SET_CHILD_SUBREAPER

cdef int PARENT_PATIENCE = 300              # ms that a zygote has to end us when the host is gone
cdef int64_t KEEPER_PERIOD = 10_000_000     # ns between two looks while a lease with a timeout is out
# While a payload crosses, a worker may show no sign of life for its timeout, so many ns more, and these per
# byte that it may be copying: that it is slow is not the task's fault.
cdef int64_t STANDING = 250_000_000
cdef int64_t COPYING = 10                   # ns per byte: 100 MB/s


# ---- the host's deadline keeper ----------------------------------------------------------------------

cdef bint kill_lease(guard_t *guard, lease_t *lease, uint64_t word) noexcept nogil:
    """RUNNING(i) -> KILLED(i), then SIGKILL through the pidfd of the process that holds the lease.

    Under the guard. False: the word has moved on (the item is finished), so nobody is killed: a worker
    that has moved on may be running somebody else's task already.
    """
    if not guard.armed or l_state(word) != L_RUNNING:
        return False
    if not a64_cas_acq_rel(&lease.word, word, lease_word(L_KILLED, l_item(word), l_tag(word))):
        return False
    guard.killing = True
    sys_pidfd_send_signal(guard.pidfd, SIGKILL)     # fails only if the process is gone already
    return True


cdef class DeadlineKeeper:
    """Ends tasks that run longer than their timeout, also while user code holds the GIL.

    Thread-safety: `run` belongs to one thread; the rest may be called from any.
    Blocking: `run` returns after `stop`.
    """

    def __init__(self, Arena arena, int eventfd):
        cdef uint32_t i
        self.arena = arena
        self.eventfd = eventfd
        self.guards = <guard_t *>PyMem_Calloc(arena.room, sizeof(guard_t))
        self.timeouts = <int64_t *>PyMem_Calloc(arena.room * arena.leases, sizeof(int64_t))
        self.standing = <standing_t *>PyMem_Calloc(arena.room, sizeof(standing_t))
        if self.guards == NULL or self.timeouts == NULL or self.standing == NULL:
            raise MemoryError("no memory for the table of guards")
        for i in range(arena.room):
            self.guards[i].pidfd = -1

    def __dealloc__(self):
        PyMem_Free(self.guards)
        PyMem_Free(self.timeouts)
        PyMem_Free(self.standing)

    cdef void arm(self) noexcept nogil:
        """A lease with a timeout goes out."""
        a32_fetch_add_acq_rel(&self.timed, 1)
        a32_fetch_add_acq_rel(&self.bell, 1)
        futex_wake(&self.bell, 1)

    cdef void disarm(self) noexcept nogil:
        a32_fetch_sub_acq_rel(&self.timed, 1)

    def run(self):
        """The thread: sleeps while no lease has a timeout, else looks a hundred times a second."""
        cdef uint32_t bell
        with nogil:
            while not a32_load_acquire(&self.stopped):
                bell = a32_load_acquire(&self.bell)
                if a32_load_acquire(&self.timed) == 0:
                    # A bell that rang after it was read makes the wait return at once.
                    futex_wait(&self.bell, bell, -1)
                    continue
                self.look(now_ns())
                futex_wait(&self.bell, bell, KEEPER_PERIOD)

    def stop(self):
        """Ask the thread to end."""
        a32_store_release(&self.stopped, 1)
        a32_fetch_add_acq_rel(&self.bell, 1)
        futex_wake(&self.bell, 1)

    cdef void look(self, int64_t now) noexcept nogil:
        cdef uint32_t i
        cdef int64_t entry
        cdef bint killed = False
        cdef uint64_t one = 1
        # Time in which this thread did not run either, because the machine stood still, is not counted.
        cdef int64_t step = min(now - self.looked, 2 * KEEPER_PERIOD)
        self.looked = now
        for i in range(self.arena.slots):
            if not guard_of(self, i).armed:
                continue
            entry = self.claimed(i)
            if entry >= 0 and self.overdue(i, <uint32_t>entry, now, step):
                killed = True
        if killed:
            write(self.eventfd, &one, sizeof(one))

    cdef int64_t claimed(self, uint32_t i) noexcept nogil:
        """The entry that a worker runs, or may have claimed last; -1: none. The lease word decides."""
        cdef slot_t *slot = self.arena.slot(i)
        cdef uint32_t running = a32_load_acquire(&slot.running)
        cdef uint32_t mask = self.arena.leases - 1
        cdef uint64_t head
        if running:
            return running - 1 if running <= self.arena.leases else -1
        # Idle, or stopped between its claim and saying so: then it is the place that it took last.
        head = a64_load_acquire(&slot.ring_head)
        if head == 0:
            return -1
        return a32_load_relaxed(&self.arena.ring(i)[(head - 1) & mask]) & mask

    cdef bint stuck(self, uint32_t i, lease_t *lease, uint64_t word, int64_t allowed,
                    int64_t step) noexcept nogil:
        """Whether a worker whose clock stands has shown no sign of life for so long, though it is its turn.

        Signs are a new word, and a new record in its outbox. While there is one that the host has not taken,
        the worker waits for the host, and nothing is counted.
        """
        cdef slot_t *slot = self.arena.slot(i)
        cdef standing_t *seen = &self.standing[i]
        cdef uint64_t records = a64_load_acquire(&slot.outbox_tail)
        cdef uint64_t nbytes = min(max(lease.body_bytes, lease.out_bytes), self.arena.heap.count * EXTENT)
        if seen.word != word or seen.records != records or a64_load_acquire(&slot.outbox_head) != records:
            seen.word = word
            seen.records = records
            seen.ns = 0
            return False
        seen.ns += step
        return seen.ns >= allowed + STANDING + COPYING * <int64_t>nbytes

    cdef bint overdue(self, uint32_t i, uint32_t entry, int64_t now, int64_t step) noexcept nogil:
        """End a lease whose time is up. step: nanoseconds since the last look, for a clock that stands;
        -1 from another thread than the keeper's: that it stands is for the keeper to judge.
        """
        cdef lease_t *lease = self.arena.lease(i, entry)
        cdef int64_t timeout = self.timeouts[i * self.arena.leases + entry]
        cdef guard_t *guard = guard_of(self, i)
        # The word is read before the clock: a worker stops the clock of item n before it moves the word
        # to n + 1, so whoever sees n + 1 cannot see n's start, and the CAS in kill_lease fails if the
        # word has moved since.
        cdef uint64_t word = a64_load_acquire(&lease.word)
        cdef int64_t started = <int64_t>a64_load_acquire(&lease.started)
        cdef bint killed
        if l_state(word) != L_RUNNING or timeout == 0:
            return False
        if started == 0:
            if step < 0 or not self.stuck(i, lease, word, timeout, step):
                return False
        else:
            if step >= 0:
                self.standing[i].ns = 0
            if now - started < timeout:
                return False
        guard_acquire(guard)
        killed = kill_lease(guard, lease, word)
        guard_release(guard)
        return killed


# ---- the worker's host watch -------------------------------------------------------------------------

def become_subreaper():
    """Orphans among our descendants become our children, so that they can be found and ended."""
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(errno, "prctl(PR_SET_CHILD_SUBREAPER) failed")


cdef int number_in(char **text) noexcept nogil:
    """The next number of a text, which moves behind it, or -1. (strtol binds too new a symbol.)"""
    cdef char *p = text[0]
    cdef int number = 0
    while p[0] == c' ':
        p += 1
    if not c'0' <= p[0] <= c'9':
        return -1
    while c'0' <= p[0] <= c'9':
        number = 10 * number + (p[0] - c'0')
        p += 1
    text[0] = p
    return number


cdef int children(int task, int *found, int room) noexcept nogil:
    """Pids of the direct children that thread `task` of this process made or adopted."""
    cdef char path[64]
    cdef char text[8192]
    cdef ssize_t got = 0
    cdef ssize_t n
    cdef int count = 0
    cdef int fd
    cdef char *p
    snprintf(path, sizeof(path), b"/proc/self/task/%d/children", task)
    fd = open(path, O_RDONLY)
    if fd < 0:
        return 0
    while got < <ssize_t>sizeof(text) - 1:
        n = read(fd, text + got, sizeof(text) - 1 - got)
        if n <= 0:
            break
        got += n
    close(fd)
    text[got] = 0
    p = text
    while count < room:
        found[count] = number_in(&p)
        if found[count] < 0:
            break
        count += 1
    return count


cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        char d_name[256]
    DIR *opendir(const char *name)
    dirent *readdir(DIR *d)
    int closedir(DIR *d)


cdef int end_children() noexcept nogil:
    """SIGKILL every direct child once; how many there were."""
    cdef int found[512]
    cdef int n, i, total = 0
    cdef DIR *threads = opendir(b"/proc/self/task")
    cdef dirent *entry
    cdef char *name
    if threads == NULL:
        return 0
    while True:
        entry = readdir(threads)
        if entry == NULL:
            break
        if entry.d_name[0] == c'.':
            continue
        name = entry.d_name
        n = children(number_in(&name), found, 512)
        for i in range(n):
            kill(found[i], SIGKILL)     # a child that nobody has waited for: its pid cannot be reused
        total += n
    closedir(threads)
    return total


cdef void end_descendants() noexcept nogil:
    """Kill the children; theirs become ours (we are their subreaper); until none is left."""
    cdef int status
    cdef int _lap
    cdef pollfd none
    for _lap in range(1000):
        if end_children() == 0:
            return
        while waitpid(-1, &status, WNOHANG) > 0:
            pass
        poll(&none, 0, 1)


def kill_descendants():
    """End every descendant of this process; for the zygote and for a worker that leaves."""
    with nogil:
        end_descendants()


cdef void remove_folder(const char *path) noexcept nogil:
    """Remove a folder of sockets and what is in it."""
    cdef DIR *folder = opendir(path)
    cdef dirent *entry
    cdef char name[4352]
    if folder == NULL:
        return
    while True:
        entry = readdir(folder)
        if entry == NULL:
            break
        if entry.d_name[0] != c'.':
            snprintf(name, sizeof(name), b"%s/%s", path, entry.d_name)
            unlink(name)
    closedir(folder)
    rmdir(path)


def watch_host(int pidfd, int stop, int exit_code, bytes folder, int parent):
    """A watch thread: when the host is gone, end our descendants, remove the socket folder, end ourselves.

    It needs no GIL, so it works while a task, or an import, holds it in C. It returns when `stop` (a
    descriptor, or -1) is readable, or when a task has closed the descriptors under it; the worker's loop
    sees that too and retires. `parent`: the zygote, which should end this process within a moment of the
    host's death; if it has not, it is stuck or stopped, and is ended from here. 0: there is none.
    """
    cdef pollfd fds[2]
    cdef const char *path = folder
    fds[0].fd = pidfd
    fds[1].fd = stop            # a negative one is ignored
    fds[0].events = fds[1].events = POLLIN
    with nogil:
        while True:
            fds[0].revents = fds[1].revents = 0
            if poll(fds, 2, -1) < 0 and errno == EINTR:
                continue
            if fds[0].revents & POLLIN:
                end_descendants()
                remove_folder(path)
                if parent:
                    poll(fds, 0, PARENT_PATIENCE)
                    if getppid() == parent:     # still ours, so the number is still its own
                        kill(parent, SIGKILL)
                _exit(exit_code)
            if fds[0].revents or fds[1].revents:
                break
