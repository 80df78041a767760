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

static void rms_norm(float *y, const float *x, const float *weight, int n, float eps)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += x[i] * x[i];
    float by = 1 / sqrtf(sum / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++)
        y[i] = x[i] * by * weight[i];
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

static inline floats vector(const float *x)
{
    floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* y (D,): the n values v (n, D), each in its share softmax(q . k / sqrt(D)). It takes 64 at a time,
 * and shrinks what it has when it meets a larger score (Milakov & Gimelshein 2018). D is a multiple
 * of LANES, and 256 at most. */
static inline __attribute__((always_inline)) void
attend(float *y, const float *q, const float *k, const float *v, int n, int D)
{
    enum { AT_ONCE = 64 };
    float share[AT_ONCE], top = -INFINITY, total = 0, scale = 1 / sqrtf(D);
    floats out[256 / LANES];
    for (int i = 0; i < D / LANES; i++)
        out[i] = (floats){0};
    for (int m; n > 0; n -= m, k += m * D, v += m * D) {
        m = n < AT_ONCE ? n : AT_ONCE;
        float before = top, sum = 0;
        for (int t = 0; t < m; t++) {
            floats score = {0};
            for (int i = 0; i < D; i += LANES)
                score += vector(q + i) * vector(k + t * D + i);
            share[t] = sum_of(score) * scale;
        }
        for (int t = m; t < AT_ONCE; t++)
            share[t] = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int t = 0; t < AT_ONCE; t++)
            top = share[t] > top ? share[t] : top;
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < AT_ONCE; t++) {
            share[t] = exponential(share[t] - top);
            sum += share[t];
        }
        float shrink = exponential(before - top);  /* of -infinity next to nothing, as it should */
        total = total * shrink + sum;
        for (int i = 0; i < D / LANES; i++)
            out[i] *= shrink;
        for (int t = 0; t < m; t++)
            for (int i = 0; i < D / LANES; i++)
                out[i] += share[t] * vector(v + t * D + i * LANES);
    }
    for (int i = 0; i < D / LANES; i++) {
        out[i] /= total;
        memcpy(y + i * LANES, &out[i], sizeof out[i]);
    }
}

/* One head of queries or keys of the token at `place`: from -> to */
static void norm_and_rotate(float *to, float *from, const Model *m, const float *norm, int place)
{
    int D = m->head_dim;
    const float *cos = m->cos + (int64_t)place * D, *sin = m->sin + (int64_t)place * D;
    if (norm)
        rms_norm(from, from, norm, D, m->eps);
    for (int i = 0; i < D / 2; i++) {
        float a = from[i], b = from[i + D / 2];
        to[i] = a * cos[i] + b * sin[i];
        to[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

/* x (B, T, C), embeddings of T new tokens for B rows, becomes their last states. kv is the cache of
 * model.py, (layer, 2, B or more, n_kv_head, max_len, head_dim), with `to_values` numbers from the
 * keys of a layer to its values. It holds `length` tokens, of which the first pad[b] are padding.
 * 0: there is no memory for it. */
int decode(const Model *m, float *x, int B, int T, float *kv, int64_t to_values, int max_len,
           int length, const int64_t *pad)
{
    int C = m->n_embd, D = m->head_dim, H = m->n_hidden, Q = m->n_head, K = m->n_kv_head;
    int rows = B * T, wide = (Q + 2 * K) * D, most = C > H ? C : H;
    int64_t head = (int64_t)max_len * D;  /* numbers of a head in the cache */
    most = most > Q * D ? most : Q * D;
    size_t numbers = (size_t)rows * (C + wide + Q * D + 3 * H);
    float *h = scratch(numbers * sizeof(float) + room(rows, most));
    if (!h)
        return 0;
    float *qkv = h + rows * C, *y = qkv + rows * wide, *gate_up = y + rows * Q * D;
    float *act = gate_up + rows * 2 * H;
    void *space = act + rows * H;
    for (int l = 0; l < m->n_layer; l++) {
        const Block *w = m->block + l;
        float *keys = kv + 2 * l * to_values, *values = keys + to_values;
#pragma omp parallel for if (rows > 8)
        for (int r = 0; r < rows; r++)
            rms_norm(h + r * C, x + r * C, w->input_norm, C, m->eps);
        multiply(qkv, h, &w->qkv, rows, 0, space);
#pragma omp parallel for if (rows > 8)
        for (int r = 0; r < rows; r++) {
            int b = r / T, at = length + r % T, place = at < pad[b] ? 0 : at - pad[b];
            float *from = qkv + r * wide;
            for (int i = 0; w->bias && i < wide; i++)
                from[i] += w->bias[i];
            for (int i = 0; i < Q; i++, from += D)
                norm_and_rotate(from, from, m, w->q_norm, place);
            float *key = keys + b * K * head + (int64_t)at * D, *value = key + to_values;
            for (int i = 0; i < K; i++, from += D)
                norm_and_rotate(key + i * head, from, m, w->k_norm, place);
            for (int i = 0; i < K; i++, from += D)
                memcpy(value + i * head, from, D * sizeof(float));
        }
#pragma omp parallel for schedule(static, 1)
        for (int i = 0; i < rows * Q; i++) {
            int r = i / Q, b = r / T, at = length + r % T;
            int first = at < pad[b] ? at : pad[b];  /* padding sees itself */
            int64_t from = (b * K + i % Q / (Q / K)) * head + (int64_t)first * D;
            const float *q = qkv + r * wide + i % Q * D;
            if (D == 64)  /* known to the compiler, which keeps all in registers */
                attend(y + i * D, q, keys + from, values + from, at + 1 - first, 64);
            else if (D == 128)
                attend(y + i * D, q, keys + from, values + from, at + 1 - first, 128);
            else
                attend(y + i * D, q, keys + from, values + from, at + 1 - first, D);
        }
        multiply(x, y, &w->o, rows, 1, space);
#pragma omp parallel for if (rows > 8)
        for (int r = 0; r < rows; r++)
            rms_norm(h + r * C, x + r * C, w->post_norm, C, m->eps);
        multiply(gate_up, h, &w->gate_up, rows, 0, space);
#pragma omp parallel for if (rows > 1)
        for (int r = 0; r < rows; r++) {
            float *gate = gate_up + r * 2 * H, *up = gate + H, *to = act + r * H;
#pragma omp simd
            for (int i = 0; i < H; i++)
                to[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
        }
        multiply(x, act, &w->down, rows, 1, space);
    }
    for (int r = 0; r < rows; r++)
        rms_norm(x + r * C, x + r * C, m->norm, C, m->eps);
    return 1;
}
