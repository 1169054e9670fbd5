# cython: language_level=3
"""Kernels: C functions that run over the grains of one buffer, in all workers at once.

    host                     region                              workers
    JobBlock.create ───────► job_t · words · scratch · partials
    one task per participant ─────────────────────────────────► run_grains: work()
                             word: FREE → CLAIM(p) → … → DONE ◄── for each grain, no message, no GIL
    p's worker has died:
    recover ───────────────► CLAIM(p), SAVED(p) → FREE
    one task more for p ──────────────────────────────────────► claims what is FREE

The protocol of the words stands in _kernel.pxd. Each participant begins with a part of its own, which lies
in one piece: it reads ahead, and finds in its caches and page tables what it had the last time. Then it helps
with the other parts. The cursors only spare looking: whoever finds them all at the end looks at every word
once more before it ends. So a grain is left over only if it was freed after that, and then the host submits
another participant.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from runtime._atomics cimport *
from runtime._arena cimport Arena, round_up
from runtime._frame cimport B_FROZEN, B_SHARED, BlockSlice
from runtime._layout cimport EXTENT, PAGE

cdef uint64_t MAGIC = 0x52544D4B45524E4CULL     # "RTMKERNL"
cdef uint64_t MOST_GRAINS = 0xFFFFFFFEULL       # so that grain + 1 fits into the failure word
cdef uint64_t STEP = 8                          # words of one cache line
cdef uint64_t LINE = 64
PAGE_BYTES = PAGE


cdef inline uint64_t grain_word(uint64_t state, uint64_t p) noexcept nogil:
    return state | (p << 3)

# `job` says where what is, `base` is where the block lies: for a participant that is one thing. The host has
# a copy of job_t of its own, since a kernel that writes where it should not may hit the one in the region.
cdef inline line_t *line_at(char *base, uint64_t p) noexcept nogil:
    return <line_t *>(base + sizeof(job_t)) + p

cdef inline a64_t *word_at(job_t *job, char *base, uint64_t i) noexcept nogil:
    return <a64_t *>(base + job.words_at) + i

cdef inline uint64_t first_of(job_t *job, uint64_t part) noexcept nogil:
    """Where the part of a participant begins: they differ by one grain at most."""
    return job.grains // job.participants * part + min(part, job.grains % job.participants)

cdef inline uint64_t bytes_of(job_t *job, uint64_t i) noexcept nogil:
    """Bytes of src in a grain."""
    return min(job.grain, job.src_bytes - i * job.grain)

cdef inline uint64_t partial_bytes(job_t *job, uint64_t i) noexcept nogil:
    return job.partial * ((bytes_of(job, i) + PAGE - 1) // PAGE if job.per_page else 1)


# ---- a participant -------------------------------------------------------------------------------------

cdef bint run_grain(job_t *job, uint64_t i, const char *src, char *dst, kernel_t kernel,
                    const void *params, uint64_t p) noexcept nogil:
    """Claim a grain and run it. False: the kernel has failed."""
    cdef a64_t *word = word_at(job, <char *>job, i)
    cdef uint64_t nbytes = bytes_of(job, i)
    cdef uint64_t out_bytes = 0
    cdef char *out = NULL
    cdef int code
    # K1 pairs with K2: who claims what the host has freed sees dst as it was restored.
    if (a64_load_relaxed(word) != grain_word(G_FREE, 0)
            or not a64_cas_acq_rel(word, grain_word(G_FREE, 0), grain_word(G_CLAIM, p))):
        return True
    if job.partial:
        out = <char *>job + job.partials_at + i * job.partial_stride
        out_bytes = partial_bytes(job, i)
        memset(out, 0, out_bytes)
    elif dst != NULL:
        out = dst + i * job.grain * job.times // job.over
        out_bytes = nbytes * job.times // job.over
    if job.inout and out_bytes:
        memcpy(<char *>job + job.scratch_at + p * job.scratch_stride, out, out_bytes)
        # Release: the scratch is whole before the word says so. What the kernel does comes after it in the
        # order of this thread, which is all that its own death can cut.
        a64_store_release(word, grain_word(G_SAVED, p))
    code = kernel(src + i * job.grain, nbytes, out, out_bytes, params)
    if code == 0:
        a64_store_release(word, grain_word(G_DONE, p))      # K3 pairs with K4 in left: the grain is written
        a64_store_relaxed(&line_at(<char *>job, p).done, a64_load_relaxed(&line_at(<char *>job, p).done) + 1)
        return True
    # In this order: killed in between, it has either failed or not.
    a64_cas_acq_rel(&job.failure, 0, ((i + 1) << 32) | <uint32_t>code)
    a64_store_release(&job.stop, 1)
    a64_store_release(word, grain_word(G_FAILED, p))
    return False


cdef void work(job_t *job, const char *src, char *dst, kernel_t kernel, const void *params,
               uint64_t p) noexcept nogil:
    """Claim grains and run them, until none is free or the job is stopped."""
    cdef uint64_t i, k, end, part, first, last
    for k in range(job.participants):
        part = (p + k) % job.participants
        first = first_of(job, part)
        last = first_of(job, part + 1)
        while True:
            # Relaxed: it says nothing about the words.
            i = first + a64_fetch_add_relaxed(&line_at(<char *>job, part).cursor, job.step)
            if i >= last:
                break
            end = min(i + job.step, last)
            while i < end:
                if a64_load_relaxed(&job.stop) or not run_grain(job, i, src, dst, kernel, params, p):
                    return
                i += 1
    for i in range(job.grains):                 # what others have taken from a cursor, and not begun
        if a64_load_relaxed(&job.stop) or not run_grain(job, i, src, dst, kernel, params, p):
            return


cdef char *placed(Arena arena, tuple place, uint64_t least) except? NULL:
    """Where {offset, bytes} of the region lies. Raises: ValueError for what is not among its blocks."""
    cdef uint64_t at = place[0], nbytes = place[1]
    cdef uint64_t end = arena.extents_at + arena.counted() * EXTENT
    if at < arena.extents_at or at > end or nbytes < least or nbytes > end - at:
        raise ValueError(f"there are no blocks with {nbytes} bytes from {at} on")
    return arena.base + at


def run_grains(Arena arena not None, tuple job_place not None, tuple src_place not None, tuple dst_place,
               uintptr_t kernel, bytes params not None, uint64_t p):
    """In a worker: participant p of a job. Without the GIL until there is nothing left to do.

    job_place, src_place, dst_place: (offset in the region, bytes); dst_place: None without a dst. Whoever has
    asked for it keeps the blocks. Raises: ValueError for a job that does not fit its buffers; what a kernel
    has raised that should not.
    """
    cdef job_t *job = <job_t *>placed(arena, job_place, sizeof(job_t))
    cdef char *src = placed(arena, src_place, 1)
    cdef char *dst = placed(arena, dst_place, 1) if dst_place is not None else NULL
    cdef const char *arguments = PyBytes_AS_STRING(params)
    cdef int64_t since
    if job.magic != MAGIC or p >= job.participants or job.src_bytes != <uint64_t>src_place[1]:
        raise ValueError("this is no job, or not with this src")
    if dst != NULL and job.dst_bytes != <uint64_t>dst_place[1]:
        raise ValueError("this job has another dst")
    with nogil:
        since = now_ns()
        work(job, src, dst, <kernel_t>kernel, arguments, p)
        a64_fetch_add_relaxed(&line_at(<char *>job, p).ns, <uint64_t>(now_ns() - since))
    raise_pending()


cdef int raise_pending() except? -1:
    """A kernel of Cython that is not noexcept may leave an exception behind."""
    return -1 if PyErr_Occurred() != NULL else 0


# ---- the host ------------------------------------------------------------------------------------------

cdef bint recover_grain(job_t *job, char *base, uint64_t i, char *dst, uint64_t p) noexcept nogil:
    """Free a grain that p, which is dead for certain, has claimed and not finished. Whether it had."""
    cdef a64_t *word = word_at(job, base, i)
    cdef uint64_t w = a64_load_acquire(word)
    if w == grain_word(G_SAVED, p):
        memcpy(dst + i * job.grain * job.times // job.over,
               base + job.scratch_at + p * job.scratch_stride,
               bytes_of(job, i) * job.times // job.over)
    elif w != grain_word(G_CLAIM, p):
        return False
    a64_store_release(word, grain_word(G_FREE, 0))          # K2
    return True


cdef class JobBlock:
    """The host's end of a job: makes it, looks at it, recovers what the dead have claimed.

    Thread-safety: for one thread at a time; `done`, `stop` from any.
    """

    @staticmethod
    def create(Arena arena not None, uint64_t src_bytes, uint64_t dst_bytes, uint64_t grain,
               uint64_t participants, uint64_t partial=0, bint per_page=False, bint inout=False):
        """A job in a new block. grain: whole pages, and such that dst can be cut like src.

        Raises: RegionFull; ValueError for more grains than can be counted.
        """
        cdef JobBlock self = JobBlock.__new__(JobBlock)
        cdef job_t job
        cdef uint64_t grains = (src_bytes + grain - 1) // grain
        cdef uint64_t at
        if grains > MOST_GRAINS:
            raise ValueError(f"{grains} grains are too many: make them larger than {grain} bytes")
        memset(&job, 0, sizeof(job_t))
        job.magic = MAGIC
        job.grains, job.grain = grains, grain
        job.src_bytes, job.dst_bytes = src_bytes, dst_bytes
        job.times = max(<uint64_t>1, dst_bytes // src_bytes)
        job.over = max(<uint64_t>1, src_bytes // dst_bytes) if dst_bytes else 1
        job.partial, job.per_page, job.inout = partial, per_page, inout and dst_bytes > 0
        job.participants = participants
        job.step = STEP if grains >= 8 * STEP * participants else 1
        job.words_at = sizeof(job_t) + participants * sizeof(line_t)
        job.scratch_at = round_up(job.words_at + grains * sizeof(a64_t), LINE)
        if job.inout:
            job.scratch_stride = round_up(min(grain, src_bytes) * job.times // job.over, LINE)
        job.partials_at = job.scratch_at + participants * job.scratch_stride
        job.partial_stride = round_up(partial * (grain // PAGE if per_page else 1), LINE)
        at = job.partials_at + grains * job.partial_stride
        self.block = arena.take(at)
        self.block.share()
        self.about = job
        self.base = self.block.data
        self.job = <job_t *>self.base
        self.grains, self.grain = grains, grain
        memset(self.base, 0, job.scratch_at)
        memcpy(self.base, &job, sizeof(job_t))
        return self

    cdef line_t *line(self, uint64_t p) noexcept:
        return line_at(self.base, p)

    cdef a64_t *word(self, uint64_t i) noexcept:
        return word_at(&self.about, self.base, i)

    def stop(self):
        """No participant claims a grain from now on."""
        a64_store_release(&self.job.stop, 1)

    @property
    def failure(self):
        """(code, grain) of the first one that failed, or None."""
        cdef uint64_t found = a64_load_acquire(&self.job.failure)
        return (<int><uint32_t>found, (found >> 32) - 1) if found else None

    @property
    def done(self):
        """Grains that are finished: for looking at; a death may have kept one from being counted."""
        cdef uint64_t p, total = 0
        for p in range(self.about.participants):
            total += a64_load_relaxed(&self.line(p).done)
        return min(total, self.grains)

    @property
    def ns(self):
        """ns that all participants were at work, but for those that died."""
        cdef uint64_t p, total = 0
        for p in range(self.about.participants):
            total += a64_load_relaxed(&self.line(p).ns)
        return total

    @property
    def left(self):
        """Grains that are not finished."""
        cdef uint64_t i, n = 0
        with nogil:
            for i in range(self.grains):
                # K4: who sees that it is finished sees what it has written.
                n += a64_load_acquire(word_at(&self.about, self.base, i)) & 7 != G_DONE
        return n

    def recover(self, uint64_t p, dst):
        """The process of participant p is dead: free the grains that it had claimed; which they are."""
        cdef Py_buffer target
        cdef char *out = NULL
        cdef uint64_t i
        cdef list found = []
        if self.about.inout:
            PyObject_GetBuffer(dst, &target, PyBUF_WRITABLE)
            out = <char *>target.buf
        for i in range(self.grains):
            if recover_grain(&self.about, self.base, i, out, p):
                found.append(i)
        if self.about.inout:
            PyBuffer_Release(&target)
        return found

    def lengths(self):
        """Bytes of src in each grain."""
        return [bytes_of(&self.about, i) for i in range(self.grains)]

    def parts(self):
        """The partial of each grain."""
        cdef uint64_t i
        return [PyBytes_FromStringAndSize(
            self.base + self.about.partials_at + i * self.about.partial_stride,
            <Py_ssize_t>partial_bytes(&self.about, i)) for i in range(self.grains)]

    def word_states(self):
        """For tests: (state, participant) of each grain."""
        return [(a64_load_acquire(self.word(i)) & 7, a64_load_acquire(self.word(i)) >> 3)
                for i in range(self.grains)]


def locate_shared(Arena arena not None, view):
    """As Arena.locate, for what a kernel works on: not in a private copy, whoever else may see it."""
    cdef BlockSlice found = arena.locate(view)
    if found is not None and not found.about.flags & B_FROZEN:
        found.about.flags |= B_SHARED
    return found


def place_of(BlockSlice part not None):
    """(offset in the region, bytes) of a part of a block."""
    return part.about.block + part.about.start, part.about.nbytes


def copy_bytes(dst, src):
    """Copy a flat buffer into another one of that length, without the GIL."""
    cdef Py_buffer to, source
    PyObject_GetBuffer(dst, &to, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(src, &source, PyBUF_SIMPLE)
        try:
            if to.len != source.len:
                raise ValueError(f"{source.len} bytes do not fit exactly into {to.len}")
            with nogil:
                memcpy(to.buf, source.buf, <size_t>source.len)
        finally:
            PyBuffer_Release(&source)
    finally:
        PyBuffer_Release(&to)


def address_of(view):
    """Where a flat buffer lies."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    PyBuffer_Release(&buffer)
    return <uintptr_t>buffer.buf


def read_capsule(capsule):
    """(name, pointer) of a capsule; in a Cython module's __pyx_capi__ the name is the signature.

    Raises: TypeError for what is none.
    """
    cdef const char *name
    if not PyCapsule_CheckExact(capsule):
        raise TypeError(f"a capsule is needed, not {type(capsule).__name__}")
    name = PyCapsule_GetName(capsule)
    return ("" if name == NULL else name.decode("ascii", "replace"),
            <uintptr_t>PyCapsule_GetPointer(capsule, name))
