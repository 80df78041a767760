/* The product of a few rows x with a matrix W whose numbers have 8 or 4 bits.
 *
 * 32 neighbouring inputs are a group. Of each group, an output o keeps 32 small integers q, a scale
 * and perhaps a minimum. The inputs are rounded to integers too, with a scale for each group:
 *
 *     y[o] = sum over groups of   scale[o] x_scale (sum of q[o,i] x[i] - zero sum of x[i])
 *
 * where zero, 128 or 8, is the q that stands for 0. With a minimum, q = 0 stands for that:
 *
 *     y[o] = sum over groups of   x_scale (scale[o] sum of q[o,i] x[i] + min[o] sum of x[i])
 *
 * The inner sums are of integers, and exact. Processors do 16 to 64 of their products at once, for
 * which W lies in panels of 16 outputs. Of a group, a panel holds 8 blocks; block k has the inputs
 * 4k to 4k + 3 of each output. At 4 bits it holds 4 blocks: the low halves of the bytes are the
 * blocks 0 to 3, the high halves are the blocks 4 to 7. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

enum { GROUP = 32, PANEL = 16 };
/* LANES: sums in a vector. ROWS: rows of x whose sums fit into the registers. FLIP: what makes a
 * stored byte the operand that the processor wants, unsigned or (128) signed. */
#if defined(__AVX512VNNI__)
enum { LANES = 16, ROWS = 8, FLIP = 0 };
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 4, FLIP = 128 };
#elif defined(__ARM_FEATURE_DOTPROD)
enum { LANES = 4, ROWS = 4, FLIP = 128 };
#else
enum { LANES = 4, ROWS = 4, FLIP = 0 };
#endif
enum { PARTS = PANEL / LANES };
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));

typedef struct {
    int32_t n_out, n_in, bits;  /* n_out is a multiple of PANEL, n_in of GROUP */
    const uint8_t *q;
    const uint16_t *scale, *min;  /* fp16: panel, group, output; min may be NULL */
} Matrix;

typedef struct {  /* rows of x as integers */
    int8_t *q;
    float *scale;  /* row, group */
    int32_t *sum;  /* row, group: of the 32 integers */
} Rounded;

/* sum[i] + q[4i .. 4i+3] . x[0 .. 3] for each lane i. This and the next two know the processor. */
static inline ints dot(ints sum, bytes q, const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)q, _mm512_set1_epi32(four));
#elif defined(__AVX2__)  /* |q| and x with the sign of q: sums of two products fit in 16 bits */
    __m256i v = (__m256i)q, signed_x = _mm256_sign_epi8(_mm256_set1_epi32(four), v);
    __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(v), signed_x);
    return sum + (ints)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)q, all);
#else
    for (int i = 0; i < 4 * LANES; i++)
        sum[i / 4] += q[i] * x[i % 4];
    return sum;
#endif
}

/* LANES numbers of 16 bits */
static inline floats from_half(const uint16_t *h)
{
#if defined(__AVX512VNNI__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const void *)h));
#else  /* as bits of a float its exponent is 112 too small */
    ints bits;
    for (int i = 0; i < LANES; i++)
        bits[i] = h[i];
    floats size = (floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (floats)((ints)size | (bits & 0x8000) << 16);
#endif
}

static inline float sum_of(floats v)
{
#if defined(__AVX512VNNI__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
    __m128 low = _mm256_castps256_ps128((__m256)v), high = _mm256_extractf128_ps((__m256)v, 1);
    __m128 four = _mm_add_ps(low, high), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return vaddvq_f32((float32x4_t)v);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
#endif
}

/* y (rows, n_out), or added to y: the outputs of panel p. The compiler knows `rows` and `bits`, and
 * keeps all sums in registers. */
static inline __attribute__((always_inline)) void
tile(float *y, Rounded x, const Matrix *m, int64_t p, int add, int rows, int bits)
{
    int groups = m->n_in / GROUP, zero = bits == 8 ? 128 - FLIP : m->min ? 0 : 8;
    const uint8_t *q = m->q + p * m->n_in * PANEL * bits / 8;
    const uint16_t *scale = m->scale + p * groups * PANEL, *min = m->min + p * groups * PANEL;
    floats out[ROWS][PARTS] = {0};
    for (int g = 0; g < groups; g++, scale += PANEL, min += PANEL) {
        ints sum[ROWS][PARTS];
        for (int r = 0; r < rows; r++)
            for (int part = 0; part < PARTS; part++)
                sum[r][part] = (ints){0} - zero * x.sum[r * groups + g];
        for (int k = 0; k < bits; k++)
            for (int part = 0; part < PARTS; part++, q += sizeof(bytes)) {
                bytes v;
                memcpy(&v, q, sizeof v);
                if (rows > 1 || bits == 4)  /* measured: one row of 8 bits is faster without */
                    __builtin_prefetch(q + 4096);
                for (int half = 0; half < 8 / bits; half++) {
                    bytes block = bits == 8 ? v ^ FLIP : half ? v >> 4 : v & 15;
                    const int8_t *at = x.q + g * GROUP + 4 * k + 16 * half;
                    for (int r = 0; r < rows; r++)
                        sum[r][part] = dot(sum[r][part], block, at + (int64_t)r * m->n_in);
                }
            }
        for (int part = 0; part < PARTS; part++) {
            floats s = from_half(scale + part * LANES);
            for (int r = 0; r < rows; r++)
                out[r][part] += __builtin_convertvector(sum[r][part], floats)
                                * (s * x.scale[r * groups + g]);
            if (bits == 4 && m->min) {
                s = from_half(min + part * LANES);
                for (int r = 0; r < rows; r++)
                    out[r][part] += s * (x.scale[r * groups + g] * x.sum[r * groups + g]);
            }
        }
    }
    for (int r = 0; r < rows; r++, y += m->n_out)
        for (int part = 0; part < PARTS; part++) {
            floats before = {0};
            if (add)
                memcpy(&before, y + part * LANES, sizeof before);
            before += out[r][part];
            memcpy(y + part * LANES, &before, sizeof before);
        }
}

/* Some rows of a panel, as many at once as the registers take. */
static inline __attribute__((always_inline)) void
panel(float *y, Rounded x, const Matrix *m, int64_t p, int add, int rows, int bits)
{
    int groups = m->n_in / GROUP;
    for (int r = 0, n; r < rows; r += n) {
        Rounded at = {x.q + (int64_t)r * m->n_in, x.scale + r * groups, x.sum + r * groups};
        float *to = y + (int64_t)r * m->n_out + p * PANEL;
        n = rows - r;
        if (n >= ROWS)
            tile(to, at, m, p, add, n = ROWS, bits);
        else if (n >= 4)
            tile(to, at, m, p, add, n = ROWS < 4 ? ROWS : 4, bits);
        else if (n >= 2)
            tile(to, at, m, p, add, n = 2, bits);
        else
            tile(to, at, m, p, add, 1, bits);
    }
}

/* A row of n numbers as int8, with a scale for each group: NaN if one of its numbers is no number
 * or infinite, so that nothing is hidden. */
static void round_row(Rounded to, const float *x, int n)
{
    for (int g = 0; g < n / GROUP; g++, x += GROUP, to.q += GROUP) {
        float top = 0, nothing = 0;
        int sum = 0;
#pragma omp simd reduction(max : top) reduction(+ : nothing)
        for (int i = 0; i < GROUP; i++) {
            top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
            nothing += 0 * x[i];
        }
        float per = top > 0 && nothing == 0 ? 127 / top : 0;
        per = per < 1e38f ? per : 0;  /* numbers so small are 0 */
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; i++) {
            float v = nothing == 0 ? x[i] * per : 0;
            to.q[i] = (int)(v + (v < 0 ? -0.5f : 0.5f));
            sum += to.q[i];
        }
        to.scale[g] = top / 127 + nothing;
        to.sum[g] = sum;
    }
}

/* Bytes that `multiply` needs beside. */
static size_t room(int64_t rows, int n_in) { return rows * (n_in + n_in / GROUP * 8); }

/* y (rows, n_out) = x (rows, n_in) W^T, or with `add` y += that. Every number of y is the same,
 * whatever rows are beside its own. */
static void multiply(float *y, const float *x, const Matrix *m, int rows, int add, void *space)
{
    int groups = m->n_in / GROUP;
    float *scale = space;
    int32_t *sum = (int32_t *)(scale + (int64_t)rows * groups);
    Rounded all = {(int8_t *)(sum + (int64_t)rows * groups), scale, sum};
#pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++)
        round_row((Rounded){all.q + (int64_t)r * m->n_in, scale + r * groups, sum + r * groups},
                  x + (int64_t)r * m->n_in, m->n_in);
#pragma omp parallel for
    for (int p = 0; p < m->n_out / PANEL; p++)
        m->bits == 8 ? panel(y, all, m, p, add, rows, 8) : panel(y, all, m, p, add, rows, 4);
}

/* At least n bytes for the thread that calls, which keeps them: what is new must first be cleared
 * by the system, at each token. NULL: there is no memory. */
static void *scratch(size_t n)
{
    static _Thread_local void *kept;
    static _Thread_local size_t size;
    if (n > size) {
        free(kept);
        kept = malloc(n);
        size = kept ? n : 0;
    }
    return kept;
}

/* The same for Python. 0: there is no memory for it. */
int product(float *y, const float *x, const Matrix *m, int rows)
{
    void *space = scratch(room(rows, m->n_in));
    if (space)
        multiply(y, x, m, rows, 0, space);
    return space != NULL;
}
