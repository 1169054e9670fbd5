# cython: language_level=3
"""What a kernel is, for who writes one: `from runtime.kernel cimport kernel_t`. See docs/kernels.md."""

# Reads src_len bytes, writes dst_len bytes. 0, or an error code. It runs without the GIL, in any worker, and
# again from the start if its process dies in the middle of it.
ctypedef int (*kernel_t)(const void *src, size_t src_len, void *dst, size_t dst_len,
                         const void *params) noexcept nogil
