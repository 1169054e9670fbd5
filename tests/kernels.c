/* Kernels for tests/test_kernels.py and the storm, which compile them. */
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* What a gate is: two words in a file, whose path are the params up to a NUL. */
struct gate { atomic_long open, entered; };

static struct gate *gate_of(const void *params) {
    int fd = open((const char *)params, O_RDWR);
    struct gate *gate = mmap(NULL, sizeof *gate, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return gate;
}

/* Each grain says that it is there, then waits until the gate is open. */
static void pass(const void *params) {
    struct gate *gate = gate_of(params);
    atomic_fetch_add(&gate->entered, 1);
    while (!atomic_load(&gate->open)) sched_yield();
    munmap(gate, sizeof *gate);
}

int upper(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)params;
    if (m != n) return 1000;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = ((const unsigned char *)src)[i];
        ((unsigned char *)dst)[i] = c >= 'a' && c <= 'z' ? c - 32 : c;
    }
    return 0;
}

/* The lengths that each grain was called with, into its partial; a second call finds it zeroed. */
int lengths(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)src, (void)params;
    uint64_t *out = dst;
    if (m != 24 || out[0] || out[1] || out[2]) return 1;
    out[0] = n, out[1] = m, out[2] = out[2] + 1;
    return 0;
}

/* dst is filled with the first byte of src, times m / n or n / m. */
int stretch(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)n, (void)params;
    memset(dst, *(const unsigned char *)src, m);
    return 0;
}

/* Fails with the code in params where the first byte of a grain is 255. */
int picky(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)n, (void)dst, (void)m;
    return *(const unsigned char *)src == 255 ? *(const int *)params : 0;
}

int forever(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)src, (void)n, (void)dst, (void)m;
    pass(params);
    return 0;
}

int crash(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)src, (void)n, (void)dst, (void)m, (void)params;
    abort();
}

/* Half of dst is increased before the gate, half behind it: run twice without restoring, it is wrong. */
int half_and_half(const void *src, size_t n, void *dst, size_t m, const void *params) {
    const double *x = src;
    double *y = dst;
    (void)n;
    for (size_t i = 0; i < m / 16; i++) y[i] += x[i];
    pass(params);
    for (size_t i = m / 16; i < m / 8; i++) y[i] += x[i];
    return 0;
}

/* Sums bytes into a partial, in two halves likewise. */
int add_up(const void *src, size_t n, void *dst, size_t m, const void *params) {
    uint64_t *out = dst;
    (void)m;
    for (size_t i = 0; i < n / 2; i++) *out += ((const unsigned char *)src)[i];
    pass(params);
    for (size_t i = n / 2; i < n; i++) *out += ((const unsigned char *)src)[i];
    return 0;
}

/* Adds src to dst; half-way it takes as many ns as params say. */
int add_slowly(const void *src, size_t n, void *dst, size_t m, const void *params) {
    const double *x = src;
    double *y = dst;
    struct timespec since, now;
    int64_t ns = *(const int64_t *)params;
    (void)n;
    for (size_t i = 0; i < m / 16; i++) y[i] += x[i];
    clock_gettime(CLOCK_MONOTONIC, &since);
    do clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - since.tv_sec) * 1000000000LL + now.tv_nsec - since.tv_nsec < ns);
    for (size_t i = m / 16; i < m / 8; i++) y[i] += x[i];
    return 0;
}

/* With eight grains, the first of which begins with 255: the word of the last one, before the partials. */
int scribble(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)n, (void)m, (void)params;
    if (*(const unsigned char *)src == 255) ((uint64_t *)dst)[-1] = 6;
    return 0;
}
