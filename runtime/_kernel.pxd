# cython: language_level=3
"""A job: one kernel over all grains of one src, as it lies in a block of the region. See _kernel.pyx.

    job_t
    lines       line_t per participant
    words       a64_t per grain
    scratch     per participant, of an inout job: room for one grain of dst
    partials    per grain, of a job with partials

A participant is a task of the host's; its number is in the words of the grains that it has claimed. There is
never more than one process with a number: the host starts the next one when the death of the last is certain.
"""
from libc.stdint cimport uint32_t, uint64_t

from runtime._atomics cimport a64_t
from runtime._arena cimport HostBlock
from runtime.kernel cimport kernel_t


# ---- grain words: {state 3 | participant 61} -----------------------------------------------------------
#   FREE -> CLAIM(p)                 participant p, by CAS
#   CLAIM(p) -> SAVED(p)             p, inout only: what dst's grain held is whole in p's scratch
#   CLAIM(p), SAVED(p) -> DONE(p)    p: the kernel has returned 0
#   CLAIM(p), SAVED(p) -> FAILED(p)  p: it has returned something else, which is in job_t.failure
#   CLAIM(p) -> FREE                 host, when p's process is dead for certain
#   SAVED(p) -> FREE                 host, the same, after it has copied the scratch back into dst
#
# Only FREE is contended; a claimed word is its participant's alone, until that is dead. Killed at any
# instruction it leaves CLAIM, with dst as it was if the job is inout; or SAVED, with all of that in the
# scratch; or the grain is over. The host alone recovers, so whatever it does ends with it.
cdef enum:
    G_FREE = 0
    G_CLAIM = 1
    G_SAVED = 2
    G_DONE = 3
    G_FAILED = 4

ctypedef struct job_t:
    # written by the host before the first participant is submitted
    uint64_t magic
    uint64_t grains
    uint64_t grain              # bytes of src of each but the last; whole pages
    uint64_t src_bytes
    uint64_t dst_bytes          # 0: there is none
    uint64_t times              # dst's grain is times / over of src's; one of them is 1
    uint64_t over
    uint64_t partial            # bytes of a partial, 0: none
    uint64_t per_page           # 1: that is for each page of the grain
    uint64_t inout              # 1: dst's grain is saved first
    uint64_t participants
    uint64_t step               # grains that a participant takes from a cursor at a time
    uint64_t words_at           # offsets in the block
    uint64_t scratch_at
    uint64_t scratch_stride
    uint64_t partials_at
    uint64_t partial_stride
    char pad0[56]
    # any participant
    a64_t stop                  # 1: claim nothing more. Participant after a failure; host
    a64_t failure               # of the first grain that failed: {grain + 1, 32 | code, 32}. CAS from 0
    char pad1[48]

# Two cache lines
ctypedef struct line_t:
    # nobody else writes these
    a64_t done                  # grains that this participant has finished: for looking at, not for truth
    a64_t ns                    # that it was at work
    char pad0[48]
    # any participant
    a64_t cursor                # how many grains of its part were taken: a hint, it only rises
    char pad1[56]


cdef class JobBlock:
    """The host's end of a job."""
    cdef readonly HostBlock block
    cdef job_t about            # as it was made
    cdef char *base
    cdef job_t *job             # in the block, for what participants change
    cdef readonly uint64_t grains, grain

    cdef line_t *line(self, uint64_t p) noexcept
    cdef a64_t *word(self, uint64_t i) noexcept


cdef void work(job_t *job, const char *src, char *dst, kernel_t kernel, const void *params,
               uint64_t p) noexcept nogil
cdef bint recover_grain(job_t *job, char *base, uint64_t i, char *dst, uint64_t p) noexcept nogil
