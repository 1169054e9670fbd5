# cython: language_level=3
"""The kernels that come with the package: `Kernel("runtime:NAME")`. See _builtin.pyx.

What a .pxd declares, Cython puts into __pyx_capi__: they are found there as those of any other module.
"""

cdef int crc32(const void *src, size_t src_len, void *dst, size_t dst_len, const void *params) noexcept nogil
cdef int count_byte(const void *src, size_t src_len, void *dst, size_t dst_len,
                    const void *params) noexcept nogil
cdef int histogram_u8(const void *src, size_t src_len, void *dst, size_t dst_len,
                      const void *params) noexcept nogil
cdef int sum_f64(const void *src, size_t src_len, void *dst, size_t dst_len,
                 const void *params) noexcept nogil
cdef int minmax_f64(const void *src, size_t src_len, void *dst, size_t dst_len,
                    const void *params) noexcept nogil
cdef int copy(const void *src, size_t src_len, void *dst, size_t dst_len, const void *params) noexcept nogil
cdef int axpy_f64(const void *src, size_t src_len, void *dst, size_t dst_len,
                  const void *params) noexcept nogil
