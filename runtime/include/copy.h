/* Large copies into shared memory, past the caches.
 *
 * A plain copy reads each line of the destination before it is overwritten, and pushes out of the caches what is
 * used there, for the sake of lines that another process will read, if anybody. On x86-64 non-temporal stores do
 * without both. They are ordered against nothing, so a fence comes last: what is stored afterwards is seen after
 * the copy, as with memcpy.
 */
#ifndef RUNTIME_COPY_H
#define RUNTIME_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>

#define COPY_LINE 64
#define COPY_PAGE 4096

/* One line; `to` is aligned to it. */
static inline void copy_line(char *to, const char *from) {
    _mm_prefetch(from + 8 * COPY_LINE, _MM_HINT_T0); /* beyond the source's end it does nothing */
    __m128i a = _mm_loadu_si128((const __m128i *)from);
    __m128i b = _mm_loadu_si128((const __m128i *)from + 1);
    __m128i c = _mm_loadu_si128((const __m128i *)from + 2);
    __m128i d = _mm_loadu_si128((const __m128i *)from + 3);
    _mm_stream_si128((__m128i *)to, a);
    _mm_stream_si128((__m128i *)to + 1, b);
    _mm_stream_si128((__m128i *)to + 2, c);
    _mm_stream_si128((__m128i *)to + 3, d);
}

/* As memcpy. Two pages in turn: the processor's own prefetching stops at the end of each. */
static inline void copy_past_caches(char *to, const char *from, size_t n) {
    size_t head = (size_t)(-(uintptr_t)to & (COPY_LINE - 1));
    if (head > n)
        head = n;
    memcpy(to, from, head);
    to += head, from += head, n -= head;
    for (; n >= 2 * COPY_PAGE; to += 2 * COPY_PAGE, from += 2 * COPY_PAGE, n -= 2 * COPY_PAGE)
        for (size_t i = 0; i < COPY_PAGE; i += COPY_LINE) {
            copy_line(to + i, from + i);
            copy_line(to + COPY_PAGE + i, from + COPY_PAGE + i);
        }
    memcpy(to, from, n);
    _mm_sfence();
}
#else
static inline void copy_past_caches(char *to, const char *from, size_t n) { memcpy(to, from, n); }
#endif

#endif
