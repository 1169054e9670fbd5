# cython: language_level=3
"""What came back, and what the dead leave. See _harvest.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._arena cimport HostBlock
from runtime._layout cimport lease_t, record_t
from runtime._leasing cimport Leasing
from runtime._records cimport SlotTable, Task


cdef class Harvest(Leasing):
    cdef int drain_now(self, uint32_t index) except -1
    cdef int process(self, uint32_t index, SlotTable table, record_t *record) except -1
    cdef int kept(self, uint32_t index, SlotTable table, uint64_t body, uint64_t tag) except -1
    cdef HostBlock known(self, uint32_t index, uint64_t body, uint64_t tag)
    cdef dict referred(self, uint32_t index, exporter)
    cdef int unkept(self, SlotTable table, tuple key) except -1
    cdef int strange(self) noexcept
    cdef object adopted(self, uint32_t index, uint64_t body, uint64_t tag, uint64_t nbytes)
    cdef int partial(self, uint32_t index, Task task, record_t *record) except -1
    cdef int harvest(self, uint32_t index, Task task) except -1
    cdef int serve(self, uint32_t index, Task task, record_t *record) except -1
    cdef int accept(self, uint32_t index, Task task, record_t *record) except -1
    cdef int settle_now(self, uint32_t index, information) except -1
    cdef int take_last(self, uint32_t index) except -1
    cdef int sweep(self, uint32_t index) except -1
    cdef int settle_task(self, Task task, information, uint32_t ran, Task culprit) except -1
    cdef int blame(self, Task task, uint64_t word, information, uint32_t ran, Task culprit) except -1
    cdef int keep_report(self, Task task) except -1
    cdef int unload_now(self, uint32_t index) except -1
    cdef bint plain_result(self, Task task, lease_t *copy, list found) except -1
    cdef bint send_signal(self, uint32_t index, int number) noexcept
