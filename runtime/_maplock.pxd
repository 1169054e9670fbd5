# cython: language_level=3
"""Locks by name: each is a block of the map (U_LOCK) whose value is one word. See _maplock.pyx.

{row 32 | tag 27 | DEAD | INHERITED | HANDOFF | WAITED | HELD}, 0 in a new block. A futex sleeps on its low
half.

    free            -> HELD(row, tag + 1)   who wants it, CAS; WAITED if he has slept: others may sleep still
    HELD            -> HELD + WAITED        who is going to sleep
    HELD            -> HELD + HANDOFF       who has waited for 1 ms: when it is free, only such as he may
                                            take it
    HELD(row, tag)  -> free                 the holder; it keeps HANDOFF if somebody waits, and wakes
    HELD(r, tag)    -> free + INHERITED     a sweeper, when the process in row r is dead; or
                    -> HELD + INHERITED     a waiter, likewise. The tag makes each holding unique
    free            -> DEAD                 who reclaims a lock that is idle; then its cell is emptied, by
                                            anybody

HANDOFF is a promise to nobody in particular: if all who waited are gone, the next one takes it after 1 ms.
A holder needs no pin: only a free lock is reclaimed.
"""
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport a64_t
from runtime._maplayout cimport map_key, map_place, map_row, map_status, map_t


cdef enum:
    L_HELD = 1
    L_WAITED = 2
    L_HANDOFF = 4
    L_INHERITED = 8
    L_DEAD = 16
    LOCK_SLICE_NS = 4000000     # ns between two looks whether the holder lives
    FAIR_NS = 1000000           # ns of waiting after which a lock is handed over

ctypedef struct lock_hold:
    a64_t *word                 # in the lock's block
    uint64_t held               # what it was when we took it, without WAITED and HANDOFF
    bint inherited              # the holder before us died

# Take it, or wait for at most one slice: MAP_OK, MAP_AGAIN, MAP_NO_ROOM, MAP_MANY_CELLS. `since`: when
# waiting began (ns); 0: it has not; -1: it will not, so that others who wait do not matter. `patience`: for
# how long to go on sleeping in this call, 0: not at all.
cdef map_status lock_take(map_t *m, map_key *k, int64_t since, int64_t patience,
                          lock_hold *hold) noexcept nogil
# False: it was not held so any more.
cdef bint lock_give(lock_hold *hold) noexcept nogil
# The word of a lock whose holder in `row` is dead: free, and inherited.
cdef void lock_pass_on(a64_t *word, uint64_t row, map_row *rows, uint64_t dead) noexcept nogil
# Nobody holds it or waits: it is DEAD now.
cdef bint lock_retire(a64_t *word) noexcept nogil
