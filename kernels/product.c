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
#else
enum { LANES = 4, ROWS = 4, FLIP = 128 };
#endif
enum { PARTS = PANEL / LANES };
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES), aligned(1)));
#define LANES_AT(place) (*(floats *)(place))  /* LANES floats in memory */

typedef struct {
    int32_t n_out, n_in, bits;  /* n_out is a multiple of PANEL, n_in of GROUP */
    const uint8_t *q;
    const int16_t *scale, *min;  /* fp16: panel, group, output; min may be NULL */
} Matrix;

typedef struct {  /* of a row of x: the integers, their scale and their sum */
    int8_t q[GROUP];
    float scale;
    int32_t sum;
} Group;

/* sum[i] + q[4i .. 4i+3] . x[0 .. 3] for each lane i. This and from_half know the processor. */
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
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)q, (int8x16_t)vdupq_n_s32(four));
#else
    for (int i = 0; i < 4 * LANES; i++)
        sum[i / 4] += (int8_t)q[i] * x[i % 4];
    return sum;
#endif
}

/* LANES numbers of 16 bits */
static inline floats from_half(const int16_t *h)
{
#if defined(__AVX512VNNI__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const void *)h));
#else  /* as bits of a float its exponent is 112 too small */
    ints bits;
    for (int i = 0; i < LANES; i++)
        bits[i] = h[i] * 8192 & ~0x70000000;
    return (floats)bits * 0x1p112f;
#endif
}

/* Some rows of y, at panel p; with `add`, added to what is there. The compiler knows `rows` and
 * `bits`, and keeps all sums in registers. */
static inline __attribute__((always_inline)) int
tile(float *y, const Group *x, const Matrix *m, int64_t p, int add, int rows, int bits)
{
    int64_t groups = m->n_in / GROUP, zero = bits == 8 ? 128 - FLIP : m->min ? 0 : 8;
    const uint8_t *q = m->q + p * m->n_in * PANEL * bits / 8;
    const int16_t *scale = m->scale + p * groups * PANEL, *min = m->min + p * groups * PANEL;
    floats out[ROWS * PARTS] = {0};
    for (int64_t g = 0; g < groups; g++, x++, scale += PANEL, min += PANEL) {
        ints sum[ROWS * PARTS];
        for (int i = 0; i < rows * PARTS; i++)
            sum[i] = (ints){0} - (int)zero * x[i / PARTS * groups].sum;
#pragma GCC unroll LANES == 16 ? 8 : 1  /* measured: AVX2 reads memory faster in a short loop */
        for (int k = 0; k < bits; k++)
            for (int part = 0; part < PARTS; part++, q += sizeof(bytes)) {
                bytes v = *(const bytes *)q;
                if (rows > 1 || bits == 4)  /* measured: one row of 8 bits is faster without */
                    __builtin_prefetch(q + 4096);
                for (int half = 0; half < 8 / bits; half++) {
                    bytes block = bits == 8 ? v ^ FLIP : half ? v >> 4 : v & 15;
                    for (int r = 0; r < rows; r++)
                        sum[r * PARTS + part] = dot(sum[r * PARTS + part], block,
                                                    x[r * groups].q + 4 * k + 16 * half);
                }
            }
        for (int i = 0; i < rows * PARTS; i++) {
            const Group *of = x + i / PARTS * groups;
            out[i] += __builtin_convertvector(sum[i], floats)
                      * (from_half(scale + i % PARTS * LANES) * of->scale);
            if (bits == 4 && m->min)
                out[i] += from_half(min + i % PARTS * LANES) * (of->scale * of->sum);
        }
    }
    for (int i = 0; i < rows * PARTS; i++) {
        float *to = y + (int64_t)m->n_out * (i / PARTS) + i % PARTS * LANES;
        LANES_AT(to) = out[i] + (add ? LANES_AT(to) : (floats){0});
    }
    return rows;
}

/* All rows, as many at once as the registers take */
static inline __attribute__((always_inline)) void
panel(float *y, const Group *x, const Matrix *m, int64_t p, int add, int64_t rows, int bits)
{
    for (int64_t n; rows > 0; rows -= n, x += n * (m->n_in / GROUP), y += n * m->n_out)
        n = rows >= ROWS ? tile(y, x, m, p, add, ROWS, bits)
            : rows >= 4 ? tile(y, x, m, p, add, 4, bits)
            : rows >= 2 ? tile(y, x, m, p, add, 2, bits)
            : tile(y, x, m, p, add, 1, bits);
}

/* n numbers as groups of int8. The scale is NaN if one of its numbers is no number or infinite, so
 * that nothing is hidden. */
static void round_row(Group *to, const float *x, int n)
{
    for (const float *end = x + n; x < end; x += GROUP, to++) {
        float top = 0, nothing = 0;
#pragma omp simd reduction(max : top) reduction(+ : nothing)
        for (int i = 0; i < GROUP; i++) {
            top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
            nothing += 0 * x[i];
        }
        float per = 127 / top;
        per = per < 1e38f ? per : 0;  /* numbers so small are 0 */
        int sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; i++) {
            float v = nothing == 0 ? x[i] * per : 0;
            to->q[i] = (int)(v + (v < 0 ? -0.5f : 0.5f));
            sum += to->q[i];
        }
        to->scale = top / 127 + nothing;
        to->sum = sum;
    }
}

/* y (rows, n_out) = x W^T, or with `add` y += that. From a row of x to the next are `stride`
 * numbers. Every number of y is the same, whatever rows are beside its own. 0: there is no memory
 * for it. */
int multiply(float *y, const float *x, int stride, const Matrix *m, int rows, int add)
{
    int64_t groups = m->n_in / GROUP;
    Group *all = malloc(rows * groups * sizeof(Group));
    if (!all)
        return 0;
#pragma omp parallel for if (rows > 8)
    for (int64_t r = 0; r < rows; r++)
        round_row(all + r * groups, x + r * stride, m->n_in);
#pragma omp parallel for
    for (int64_t p = 0; p < m->n_out / PANEL; p++)
        m->bits == 8 ? panel(y + p * PANEL, all, m, p, add, rows, 8)
                     : panel(y + p * PANEL, all, m, p, add, rows, 4);
    free(all);
    return 1;
}
