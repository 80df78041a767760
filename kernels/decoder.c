/* The blocks of model.py, with the products of product.c and fp32 for all else. Nothing is
 * dispatched between two operations, which in PyTorch takes longer than a small product. */
#include "product.c"

typedef struct {
    const float *input_norm, *q_norm, *k_norm, *bias, *post_norm;  /* those between may be NULL */
    Matrix qkv, o, gate_up, down;
} Block;

typedef struct {
    int32_t n_layer, n_head, n_kv_head, n_embd, head_dim, n_hidden;
    float eps;
    const Block *block;
    const float *norm, *cos, *sin;  /* model.rope_table: (positions, head_dim) */
} Model;

/* Each row of x (rows, n) over the root of its mean square, times the weight */
static void rms_norm(float *y, const float *x, const float *weight, int rows, int n, float eps)
{
#pragma omp parallel for if (rows * (int64_t)n > 1 << 14)
    for (int64_t at = 0; at < (int64_t)rows * n; at += n) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; i++)
            sum += x[at + i] * x[at + i];
        float by = 1 / sqrtf(sum / n + eps);
#pragma omp simd
        for (int i = 0; i < n; i++)
            y[at + i] = x[at + i] * by * weight[i];
    }
}

/* e^x to 3e-7, written so that a compiler does many at once */
static inline float exponential(float x)
{
    x = x < -87 ? -87 : x > 87 ? 87 : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693147181f;
    union { int32_t bits; float value; } two = {((int32_t)n + 127) << 23};  /* 2^n */
    return two.value * (1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (
           1 / 120.f + r / 720))))));
}

/* q (D,) becomes the n values v (n, D), each in its share softmax(q . k / sqrt(D)). It takes 64 at
 * a time, and shrinks what it has when it meets a larger score (Milakov & Gimelshein 2018). D is a
 * multiple of LANES, and 256 at most. */
static inline __attribute__((always_inline)) void
attend(float *q, const float *k, const float *v, int64_t n, int D)
{
    enum { AT_ONCE = 64 };
    float share[AT_ONCE], top = -INFINITY, total = 0;
    floats out[256 / LANES] = {0};
    for (int m; n > 0; n -= m, k += m * D, v += m * D) {
        m = n < AT_ONCE ? n : AT_ONCE;
        float before = top, sum = 0;
        for (int t = 0; t < m; t++) {
            floats sum = {0};
            for (int i = 0; i < D; i += LANES)
                sum += LANES_AT(q + i) * LANES_AT(k + t * D + i);
            for (int half = LANES / 2; half > 0; half /= 2)
#pragma omp simd
                for (int i = 0; i < half; i++)
                    sum[i] += sum[i + half];
            share[t] = sum[0] / sqrtf(D);
            top = share[t] > top ? share[t] : top;
        }
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < m; t++)
            sum += share[t] = exponential(share[t] - top);
        float shrink = exponential(before - top);  /* of -infinity next to nothing, as it should */
        total = total * shrink + sum;
        for (int i = 0; i < D / LANES; i++)
            out[i] *= shrink;
        for (int t = 0; t < m; t++)
            for (int i = 0; i < D / LANES; i++)
                out[i] += share[t] * LANES_AT(v + t * D + i * LANES);
    }
    for (int i = 0; i < D / LANES; i++)
        LANES_AT(q + i * LANES) = out[i] / total;
}

/* A head of D numbers, turned by the angles of its place */
static void rotate(float *x, const float *cos, const float *sin, int D)
{
    for (int i = 0, j = D / 2; j < D; i++, j++) {
        float a = x[i], b = x[j];
        x[i] = a * cos[i] + b * sin[i];
        x[j] = b * cos[j] + a * sin[j];
    }
}

/* x (B, T, C), embeddings of T new tokens for B rows, becomes their last states. kv is the cache of
 * model.py, (layer, 2, B or more, n_kv_head, max_len, head_dim), with `to_values` numbers from the
 * keys of a layer to its values. It holds `length` tokens, of which the first pad[b] are padding.
 * 0: there is no memory for it. */
int decode(const Model *m, float *x, int B, int T, float *kv, int64_t to_values, int max_len,
           int length, const int64_t *pad)
{
    int64_t C = m->n_embd, D = m->head_dim, H = m->n_hidden, Q = m->n_head, K = m->n_kv_head;
    int64_t rows = B * T, wide = (Q + 2 * K) * D, head = max_len * D;  /* in the cache */
    float *h = malloc(rows * (C + wide + 2 * H) * sizeof(float));
    float *qkv = h + rows * C, *gate_up = qkv + rows * wide;
    int done = h != NULL;
    for (int l = 0; l < m->n_layer && done; l++, kv += 2 * to_values) {
        const Block *w = m->block + l;
        rms_norm(h, x, w->input_norm, rows, C, m->eps);
        done &= multiply(qkv, h, C, &w->qkv, rows, 0);
#pragma omp parallel for if (rows > 8)
        for (int r = 0; r < rows; r++) {
            int64_t b = r / T, at = length + r % T, place = at < pad[b] ? 0 : at - pad[b];
            float *q = qkv + r * wide, *k = q + Q * D, *key = kv + b * K * head + at * D;
            for (int i = 0; w->bias && i < wide; i++)
                q[i] += w->bias[i];
            if (w->q_norm) {
                rms_norm(q, q, w->q_norm, Q, D, m->eps);
                rms_norm(k, k, w->k_norm, K, D, m->eps);
            }
            for (int i = 0; i < Q + K; i++)
                rotate(q + i * D, m->cos + place * D, m->sin + place * D, D);
            for (int i = 0; i < K; i++, k += D, key += head) {
                memcpy(key, k, D * sizeof(float));
                memcpy(key + to_values, k + K * D, D * sizeof(float));
            }
        }
#pragma omp parallel for schedule(static, 1)
        for (int i = 0; i < rows * Q; i++) {
            int64_t r = i / Q, b = r / T, at = length + r % T;
            int64_t first = at < pad[b] ? at : pad[b];  /* padding sees itself */
            float *q = qkv + r * wide + i % Q * D;
            float *k = kv + (b * K + i % Q / (Q / K)) * head + first * D, *v = k + to_values;
            int64_t n = at + 1 - first;
            D == 64 ? attend(q, k, v, n, 64)  /* known to the compiler: all stays in registers */
            : D == 128 ? attend(q, k, v, n, 128) : attend(q, k, v, n, D);
        }
        done &= multiply(x, qkv, wide, &w->o, rows, 1);
        rms_norm(h, x, w->post_norm, rows, C, m->eps);
        done &= multiply(gate_up, h, C, &w->gate_up, rows, 0);
#pragma omp parallel for if (rows > 1)
        for (int r = 0; r < rows; r++) {
            float *gate = gate_up + 2 * H * r, *up = gate + H;
#pragma omp simd
            for (int i = 0; i < H; i++)
                gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
        }
        done &= multiply(x, gate_up, 2 * H, &w->down, rows, 1);
    }
    rms_norm(x, x, m->norm, rows, C, m->eps);
    free(h);
    return done;
}
