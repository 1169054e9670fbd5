/* Kernels for kernels.py, and who runs them without us: plain threads, and OpenMP where the compiler has it. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef int (*kernel_t)(const void *, size_t, void *, size_t, const void *);

int nothing(const void *src, size_t n, void *dst, size_t m, const void *params) {
    (void)src, (void)n, (void)dst, (void)m, (void)params;
    return 0;
}

/* dst = 2 * src + 1 of floats */
int scale(const void *src, size_t n, void *dst, size_t m, const void *params) {
    const float *x = src;
    float *y = dst;
    (void)m, (void)params;
    for (size_t i = 0; i < n / sizeof *x; i++) y[i] = 2.0f * x[i] + 1.0f;
    return 0;
}

struct share {
    kernel_t kernel;
    const char *src;
    char *dst;
    size_t n, m;
    const void *params;
};

static void *run(void *of) {
    struct share *s = of;
    s->kernel(s->src, s->n, s->dst, s->m, s->params);
    return NULL;
}

/* Each of two threads has one half of src, and of dst or one of two partials of m bytes. */
void two_threads(kernel_t kernel, const char *src, size_t n, char *dst, size_t m, size_t apart,
                 const void *params) {
    size_t half = n / 2 / 4096 * 4096;
    struct share first = {kernel, src, dst, half, m, params};
    struct share second = {kernel, src + half, dst + apart, n - half, m, params};
    pthread_t other;
    pthread_create(&other, NULL, run, &second);
    run(&first);
    pthread_join(other, NULL);
}

#ifdef _OPENMP
void scale_openmp(const float *x, size_t n, float *y) {
#pragma omp parallel for num_threads(2)
    for (size_t i = 0; i < n / sizeof *x; i++) y[i] = 2.0f * x[i] + 1.0f;
}
#endif

/* When it began, as time.monotonic_ns tells it. */
int stamp(const void *src, size_t n, void *dst, size_t m, const void *params) {
    struct timespec now;
    (void)src, (void)n, (void)m, (void)params;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(int64_t *)dst = now.tv_sec * 1000000000LL + now.tv_nsec;
    return 0;
}
