/* The kernel of logscan.py: counts the whole lines of a piece of a web server's log.
 *
 * A piece is cut at any byte, so it begins and ends within lines: what lies before its first newline and behind
 * its last one is handed back, and whoever combines the pieces joins them. Built by logscan.py with cc.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { STATUSES = 600, BUCKETS = 48, FRAGMENT = 2040 };
enum { TOO_LONG = 1, NO_ROOM = 2 }; /* error codes */

/* What a piece comes to; logscan.py unpacks it. All zero at the start. */
struct counts {
    uint64_t lines, malformed, bytes;
    uint64_t status[STATUSES];
    uint64_t latency[BUCKETS]; /* by the number of bits of the microseconds */
    uint32_t newlines;         /* 1: there is one, so head and tail are not the same */
    uint32_t head, tail;       /* bytes of the fragments */
    uint32_t spare;
    char heads[FRAGMENT], tails[FRAGMENT];
};

/* Digits from `at` up to something else; NULL: none, or more than an uint64_t surely holds. */
static const char *number(const char *at, const char *end, uint64_t *value) {
    const char *from = at;
    uint64_t n = 0;
    while (at < end && (unsigned char)(*at - '0') < 10)
        n = n * 10 + (uint64_t)(*at++ - '0');
    *value = n;
    return at > from && at - from < 19 ? at : NULL;
}

/* How many bits a number has; what has more than there are buckets for goes into the last one. */
static int bits(uint64_t n) {
    int count = n ? 64 - __builtin_clzll(n) : 0;
    return count < BUCKETS ? count : BUCKETS - 1;
}

/* A line without its newline: ADDRESS - USER [TIME] "REQUEST" STATUS BYTES "AGENT" MICROSECONDS */
static int line(const char *at, const char *end, struct counts *out) {
    uint64_t status, bytes, latency;
    int quote;
    for (quote = 0; quote < 2; quote++) {
        at = memchr(at, '"', (size_t)(end - at));
        if (at == NULL)
            return 0;
        at++;
    }
    if (at == end || *at != ' ' || (at = number(at + 1, end, &status)) == NULL || status >= STATUSES)
        return 0;
    if (at == end || *at != ' ' || (at = number(at + 1, end, &bytes)) == NULL)
        return 0;
    if (end - at < 2 || at[0] != ' ' || at[1] != '"')
        return 0;
    at = memchr(at + 2, '"', (size_t)(end - at - 2));
    if (at == NULL || ++at == end || *at != ' ' || number(at + 1, end, &latency) != end)
        return 0;
    out->bytes += bytes;
    out->status[status]++;
    out->latency[bits(latency)]++;
    return 1;
}

int scan(const void *src, size_t src_len, void *dst, size_t dst_len, const void *params) {
    const char *at = src, *end = at + src_len, *newline;
    struct counts *out = dst;
    (void)params;
    if (dst_len < sizeof *out)
        return NO_ROOM;
    newline = memchr(at, '\n', src_len);
    out->head = (uint32_t)((newline ? newline : end) - at);
    if (out->head > FRAGMENT)
        return TOO_LONG;
    memcpy(out->heads, at, out->head);
    if (newline == NULL)
        return 0;
    out->newlines = 1;
    for (at = newline + 1; (newline = memchr(at, '\n', (size_t)(end - at))) != NULL; at = newline + 1) {
        out->lines++;
        out->malformed += !line(at, newline, out);
    }
    if (end - at > FRAGMENT)
        return TOO_LONG;
    out->tail = (uint32_t)(end - at);
    memcpy(out->tails, at, out->tail);
    return 0;
}
