# cython: language_level=3
"""The kernels that come with the package, and how their partials are combined.

Written so that a compiler vectorises them for whatever the baseline of the platform is: fixed numbers of
lanes side by side, no dependence between them. Sums of doubles are added in an order that the data's place
alone decides, never the grains or who ran them: each page by itself, then the pages from first to last.

    kernel         partial                            result
    crc32          CRC of the grain                   that of all
    count_byte     how often                          the sum
    histogram_u8   256 counts                         their sums
    sum_f64        a sum for each page of the grain   the sum
    minmax_f64     least and greatest                 of all
"""
from libc.math cimport INFINITY, NAN, isfinite
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from runtime._layout cimport PAGE

cdef enum:
    DOUBLES = PAGE // 8
    LANES = 16


# ---- crc32, as zlib's ------------------------------------------------------------------------------------
# Sixteen bytes at a time by tables: table[k][b] is the CRC of byte b with k zero bytes behind it.

cdef enum:
    POLYNOMIAL = 0xEDB88320         # reflected

cdef uint32_t[16][256] table


cdef void fill_table() noexcept:
    cdef uint32_t i, k, c, _bit
    for i in range(256):
        c = i
        for _bit in range(8):
            c = (c >> 1) ^ (<uint32_t>POLYNOMIAL if c & 1 else 0)
        table[0][i] = c
    for k in range(1, 16):
        for i in range(256):
            c = table[k - 1][i]
            table[k][i] = (c >> 8) ^ table[0][c & 0xFF]


fill_table()


cdef int crc32(const void *src, size_t src_len, void *dst, size_t dst_len, const void *params) noexcept nogil:
    cdef const uint8_t *at = <const uint8_t *>src
    cdef const uint8_t *end = at + src_len
    cdef uint32_t c = 0xFFFFFFFFU
    while end - at >= 16:
        c = (table[15][at[0] ^ (c & 0xFF)] ^ table[14][at[1] ^ (c >> 8 & 0xFF)]
             ^ table[13][at[2] ^ (c >> 16 & 0xFF)] ^ table[12][at[3] ^ (c >> 24)]
             ^ table[11][at[4]] ^ table[10][at[5]] ^ table[9][at[6]] ^ table[8][at[7]]
             ^ table[7][at[8]] ^ table[6][at[9]] ^ table[5][at[10]] ^ table[4][at[11]]
             ^ table[3][at[12]] ^ table[2][at[13]] ^ table[1][at[14]] ^ table[0][at[15]])
        at += 16
    while at < end:
        c = (c >> 8) ^ table[0][(c ^ at[0]) & 0xFF]
        at += 1
    (<uint32_t *>dst)[0] = ~c
    return 0


cdef uint32_t multiply(uint32_t a, uint32_t b) noexcept nogil:
    """The product of two polynomials over GF(2), modulo that of the CRC; the highest bit is x^0."""
    cdef uint32_t m = 1U << 31
    cdef uint32_t product = 0
    while m:
        if a & m:
            product ^= b
        m >>= 1
        b = (b >> 1) ^ (<uint32_t>POLYNOMIAL if b & 1 else 0)
    return product


cdef uint32_t shifted(uint32_t crc, uint64_t nbytes) noexcept nogil:
    """What is left of a CRC when so many zero bytes follow: it times x^(8 nbytes)."""
    cdef uint32_t power = 1U << 23              # x^8
    while nbytes:
        if nbytes & 1:
            crc = multiply(power, crc)
        power = multiply(power, power)
        nbytes >>= 1
    return crc


def combine_crc32(list parts, list lengths):
    """The CRC of all grains, one behind the other."""
    cdef uint32_t total = 0, crc
    for part, length in zip(parts, lengths):
        memcpy(&crc, <const char *><bytes>part, sizeof(crc))
        total = shifted(total, length) ^ crc
    return total


# ---- bytes -----------------------------------------------------------------------------------------------

cdef int count_byte(const void *src, size_t src_len, void *dst, size_t dst_len,
                    const void *params) noexcept nogil:
    cdef const uint8_t *at = <const uint8_t *>src
    cdef uint8_t wanted = (<const uint8_t *>params)[0]
    cdef uint64_t total = 0
    cdef size_t i = 0
    cdef uint8_t[64] lanes
    cdef int k, _round
    while src_len - i >= 64:
        for k in range(64):
            lanes[k] = 0
        for _round in range(255):               # so that no lane overflows
            if src_len - i < 64:
                break
            for k in range(64):
                lanes[k] += at[i + k] == wanted
            i += 64
        for k in range(64):
            total += lanes[k]
    while i < src_len:
        total += at[i] == wanted
        i += 1
    (<uint64_t *>dst)[0] = total
    return 0


def combine_count(list parts, list lengths):
    """The sum of the counts."""
    cdef uint64_t total = 0, one
    for part in parts:
        memcpy(&one, <const char *><bytes>part, sizeof(one))
        total += one
    return total


cdef int histogram_u8(const void *src, size_t src_len, void *dst, size_t dst_len,
                      const void *params) noexcept nogil:
    cdef const uint8_t *at = <const uint8_t *>src
    cdef uint64_t *out = <uint64_t *>dst
    cdef uint64_t[4][256] counts                # four, as equal bytes in a row would wait for each other
    cdef size_t i = 0
    cdef int k
    for k in range(256):
        counts[0][k] = counts[1][k] = counts[2][k] = counts[3][k] = 0
    while src_len - i >= 4:
        counts[0][at[i]] += 1
        counts[1][at[i + 1]] += 1
        counts[2][at[i + 2]] += 1
        counts[3][at[i + 3]] += 1
        i += 4
    while i < src_len:
        counts[0][at[i]] += 1
        i += 1
    for k in range(256):
        out[k] = counts[0][k] + counts[1][k] + counts[2][k] + counts[3][k]
    return 0


def combine_histogram(list parts, list lengths):
    """The sums of the counts, 256 of them."""
    cdef uint64_t[256] total
    cdef const uint64_t *one
    cdef int k
    for k in range(256):
        total[k] = 0
    for part in parts:
        one = <const uint64_t *><const char *><bytes>part
        for k in range(256):
            total[k] += one[k]
    return [total[k] for k in range(256)]


cdef int copy(const void *src, size_t src_len, void *dst, size_t dst_len, const void *params) noexcept nogil:
    memcpy(dst, src, src_len)
    return 0


# ---- doubles ---------------------------------------------------------------------------------------------

cdef double sum_page(const double *at, size_t count) noexcept nogil:
    """In lanes, which are then added pairwise."""
    cdef double[LANES] lanes
    cdef size_t i = 0
    cdef int k, half = LANES // 2
    for k in range(LANES):
        lanes[k] = 0.0
    while count - i >= LANES:
        for k in range(LANES):
            lanes[k] += at[i + k]
        i += LANES
    k = 0
    while i < count:
        lanes[k] += at[i]
        i += 1
        k += 1
    while half:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    return lanes[0]


cdef int sum_f64(const void *src, size_t src_len, void *dst, size_t dst_len,
                 const void *params) noexcept nogil:
    cdef const double *at = <const double *>src
    cdef double *out = <double *>dst
    cdef size_t count = src_len // 8
    while count:
        out[0] = sum_page(at, min(count, <size_t>DOUBLES))
        at += DOUBLES
        out += 1
        count -= min(count, <size_t>DOUBLES)
    return 0


def combine_sum(list parts, list lengths):
    """The sum of the sums of pages, from first to last; what each addition loses is added at the end."""
    cdef double total = 0.0, lost = 0.0, x, t
    cdef const double *at
    cdef Py_ssize_t i
    for part in parts:
        at = <const double *><const char *><bytes>part
        for i in range(len(<bytes>part) // 8):
            x = at[i]
            t = total + x
            lost += (total - t) + x if abs(total) >= abs(x) else (x - t) + total
            total = t
    return total + lost if isfinite(total) else total   # of infinities nothing is lost


cdef int minmax_f64(const void *src, size_t src_len, void *dst, size_t dst_len,
                    const void *params) noexcept nogil:
    cdef const double *at = <const double *>src
    cdef double *out = <double *>dst
    cdef size_t count = src_len // 8
    cdef size_t i = 0
    cdef double[8] least
    cdef double[8] most
    cdef double[8] strange                      # stays 0 until a NaN comes: x - x of an infinity is one, too,
    cdef int k                                  # so it is x != x that is asked
    for k in range(8):
        least[k], most[k], strange[k] = INFINITY, -INFINITY, 0.0
    while count - i >= 8:
        for k in range(8):
            least[k] = at[i + k] if at[i + k] < least[k] else least[k]
            most[k] = at[i + k] if at[i + k] > most[k] else most[k]
            strange[k] = 1.0 if at[i + k] != at[i + k] else strange[k]
        i += 8
    while i < count:
        least[0] = at[i] if at[i] < least[0] else least[0]
        most[0] = at[i] if at[i] > most[0] else most[0]
        strange[0] = 1.0 if at[i] != at[i] else strange[0]
        i += 1
    for k in range(1, 8):
        least[0] = min(least[0], least[k])
        most[0] = max(most[0], most[k])
        strange[0] += strange[k]
    out[0] = NAN if strange[0] else least[0]
    out[1] = NAN if strange[0] else most[0]
    return 0


def combine_minmax(list parts, list lengths):
    """(least, greatest); NaN twice if any is NaN; (inf, -inf) of nothing."""
    cdef double least = INFINITY, most = -INFINITY
    cdef const double *one
    for part in parts:
        one = <const double *><const char *><bytes>part
        if one[0] != one[0]:
            return NAN, NAN
        least, most = min(least, one[0]), max(most, one[1])
    return least, most


cdef int axpy_f64(const void *src, size_t src_len, void *dst, size_t dst_len,
                  const void *params) noexcept nogil:
    cdef const double *x = <const double *>src
    cdef double *y = <double *>dst
    cdef double a
    cdef size_t i
    memcpy(&a, params, sizeof(a))               # params may lie anywhere
    for i in range(src_len // 8):
        y[i] += a * x[i]
    return 0
