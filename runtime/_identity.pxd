# cython: language_level=3
"""Which process is which, and whether it is still alive.

An identity is one word, {pid 22 | start time 42}: never 0 and never used twice, because a pid comes back but
a pid with its start time (clock ticks since boot, from /proc) does not. All processes that compare
identities must live in one PID namespace.
"""
from libc.stdint cimport uint64_t

from runtime._atomics cimport a64_t


# The word that holds this process's identity, in a page that fork() leaves zeroed in the child: so "is it
# still me?" costs one load, however the fork was made. 0: not known yet, call my_identity().
cdef a64_t *identity_word() noexcept nogil

cdef uint64_t my_identity() noexcept nogil

# True only when that process has surely ended (a zombie has). Not knowing is False.
cdef bint is_dead(uint64_t identity) noexcept nogil


cdef inline int identity_pid(uint64_t identity) noexcept nogil:
    return <int>(identity >> 42)

cdef inline uint64_t identity_start(uint64_t identity) noexcept nogil:
    return identity & 0x3FFFFFFFFFFULL
