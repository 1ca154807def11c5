// Structs with a model's weights, filled by compiled.py, and the operations between them: products with
// weights of 16, 8 and 4 bits, RMS norm, rotary embedding, activation.

#pragma once

#include "vectors.h"

// ---------------------------------------------------------------- structs filled by compiled.py

extern "C" {

struct Linear {             // y = weight x + bias
    const void* weight;     // [out, in] bfloat16, or [out / ROWS, in / QUANTUM] Int8Block or Int4Block
    const BFloat16* bias;   // [out], or null
    int64_t out, in, bits;  // bits per weight
};

struct Layer {
    const BFloat16 *input_norm, *post_norm;
    const BFloat16 *query_norm, *key_norm;  // null but for Qwen3
    Linear query, key, value, output, gate, up, down;
    int64_t window;  // sliding window: keys that a query attends to, its own included
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, dim, intermediate;
    float epsilon, scaling;
    const BFloat16* embedding;  // [vocab, hidden]
    const BFloat16* norm;
    Linear head;
    const Layer* layer;
};

}  // extern "C"

namespace {

// ---------------------------------------------------------------- linear layers

// Activations of n tokens as input of a linear layer: factors, or for quantized weights 16-bit
// integers, which are more precise than bfloat16.
struct Input {
    Factor* factors;      // [n, in]
    int16_t* whole;       // [in / QUANTUM, n, QUANTUM], in the same memory
    float *step, *total;  // [in / QUANTUM, n]: their scale, and the sum of the scaled numbers
    int64_t n, in;

    static int64_t size(int64_t n, int64_t in) { return n * in; }
    Input(float* memory, int64_t n, int64_t in)
        : factors(reinterpret_cast<Factor*>(memory)),
          whole(reinterpret_cast<int16_t*>(memory)),
          step(memory + n * in / 2),
          total(step + n * in / QUANTUM),
          n(n),
          in(in) {}

    // Stores `count` activations of token r from index `first` on; both are multiples of QUANTUM.
    void put(int64_t r, int64_t first, const float* x, int64_t count, bool as_whole) const {
        for (int64_t i = 0; i < count; i += QUANTUM)
            if (as_whole)
                put_whole((first + i) / QUANTUM * n + r, x + i);
            else
                for (int64_t g = i; g < i + QUANTUM; g += GROUP)
                    put_factors(factors + r * in + first + g, load<Vec>(x + g),
                                load<Vec>(x + g + LANES));
    }

   private:
    void put_whole(int64_t quantum, const float* x) const {
        Vec most = Vec{} + 1e-30f, wrong{};
        for (int i = 0; i < QUANTUM; i += LANES) {
            const Vec next = load<Vec>(x + i), size = next < 0.0f ? -next : next;
            most = size > most ? size : most;
            wrong += next * 0.0f;  // NaN or infinity makes the scale NaN
        }
        float maximum = most[0];
        for (int lane = 1; lane < LANES; ++lane) maximum = std::max(maximum, most[lane]);
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        Vec sums{};
        for (int i = 0; i < QUANTUM; i += GROUP) {
            const Vec a = load<Vec>(x + i) * (32767 / maximum) + magic - magic;
            const Vec b = load<Vec>(x + i + LANES) * (32767 / maximum) + magic - magic;
            sums += a + b;
            store(whole + quantum * QUANTUM + i,
                  wide(__builtin_convertvector(a, Ints), __builtin_convertvector(b, Ints)));
        }
        step[quantum] = maximum / 32767 + sum(wrong);
        total[quantum] = step[quantum] * sum(sums);
    }
};

// Prefetches the weights after w, when A rows are read at a time: the processor itself prefetches along
// one row, but not along many.
template <int A>
void fetch(const BFloat16* w, int64_t in) {
    __builtin_prefetch(w + (A == 1 ? int64_t(AHEAD / sizeof(BFloat16)) : A * in));
}

// out[r][j] = w[j] . x[r] for J rows of a matrix, A at a time, and R tokens from `first` on.
template <int A, int J, int R>
void products(const BFloat16* w, const Input& x, int64_t first, Vec (&out)[R][J]) {
    const Factor* tokens = x.factors + first * x.in;
#pragma GCC unroll 4
    for (int i = 0; i < J; i += A)
        for (int64_t k = 0; k < x.in; k += GROUP) {
            Pairs row[A];
            for (int j = 0; j < A; ++j) {
                row[j] = pairs(load<Bits>(w + (i + j) * x.in + k));
                fetch<A>(w + (i + j) * x.in + k, x.in);
            }
            for (int r = 0; r < R; ++r) {
                const Pairs token = pairs(tokens + r * x.in + k);
                for (int j = 0; j < A; ++j) out[r][i + j] = dot(out[r][i + j], row[j], token);
            }
        }
}

// Writes output j of a token to its row of outputs: the product, plus bias, plus the old value if `add`.
void put(const Linear& m, int64_t j, float product, float* row, bool add) {
    if (m.bias) product += value(m.bias[j]);
    row[j] = add ? row[j] + product : product;
}

// Computes outputs j to j + J of n tokens, at most MOST tokens at a time.
template <int A, int J, int MOST>
void outputs(const Linear& m, int64_t j, const Input& x, int64_t n, float* y, int64_t stride,
             bool add) {
    in_blocks<MOST>(n, [&](auto block, int64_t first) {
        constexpr int R = block;
        Vec product[R][J] = {};
        products<A>(static_cast<const BFloat16*>(m.weight) + j * m.in, x, first, product);
        for (int r = 0; r < R; ++r) {
            const Vec totals = folded<J>(product[r]);
            for (int i = 0; i < J; ++i)
                put(m, j + i, totals[i * LANES / J], y + (first + r) * stride, add);
        }
    });
}

template <int A, int J, int MOST>
void linear(const Linear& m, const Input& x, int64_t n, float* y, int64_t stride, bool add) {
    const Share mine(m.out, J);
    int64_t j = mine.first;
    for (; j + J <= mine.last; j += J) outputs<A, J, MOST>(m, j, x, n, y, stride, add);
    for (; j < mine.last; ++j) outputs<1, 1, MOST>(m, j, x, n, y, stride, add);
}

// out[r] = ROWS outputs of R tokens from `first` on, from quantized weights; a lane is an output.
template <int R, int J, typename Block>
void products(const Block* w, const Input& x, int64_t first, Vec (&out)[R][J]) {
    for (int64_t quantum = 0; quantum < x.in / QUANTUM; ++quantum, ++w) {
        const int64_t at = quantum * x.n + first;
        const int16_t* tokens = x.whole + at * QUANTUM;
        Ints acc[R][J] = {};  // products of 15 and 7 bits: no overflow
#pragma GCC unroll 16
        for (int p = 0; p < QUANTUM / 2; ++p) {
            Wide weights[J];
            for (int j = 0; j < J; ++j) weights[j] = w->pair(p, j * LANES);
            for (int r = 0; r < R; ++r) {
                const Wide token = both(tokens + r * QUANTUM + 2 * p);
                for (int j = 0; j < J; ++j) acc[r][j] = dot(acc[r][j], weights[j], token);
            }
        }
        for (size_t line = 0; line < sizeof(Block); line += LINE * sizeof(float))
            __builtin_prefetch(reinterpret_cast<const char*>(w) + line + AHEAD);
        for (int j = 0; j < J; ++j) {
            const Vec step = values(w->step + j * LANES);
            for (int r = 0; r < R; ++r)
                out[r][j] += __builtin_convertvector(acc[r][j], Vec) * (step * x.step[at + r]);
            if constexpr (std::is_same_v<Block, Int4Block>)
                for (int r = 0; r < R; ++r)
                    out[r][j] += values(w->smallest + j * LANES) * x.total[at + r];
        }
    }
}

template <typename Block>
void linear(const Linear& m, const Input& x, int64_t n, float* y, int64_t stride, bool add) {
    const Share mine(m.out, ROWS);
    for (int64_t j = mine.first; j < mine.last; j += ROWS) {
        const Block* w = static_cast<const Block*>(m.weight) + j / ROWS * (m.in / QUANTUM);
        in_blocks<TOKENS>(n, [&](auto block, int64_t first) {
            constexpr int R = block, J = ROWS / LANES;
            Vec product[R][J] = {};
            products(w, x, first, product);
            for (int r = 0; r < R; ++r)
                for (int64_t i = 0; i < std::min<int64_t>(ROWS, m.out - j); ++i)
                    put(m, j + i, product[r][i / LANES][i % LANES], y + (first + r) * stride, add);
        });
    }
}

// Computes this thread's share of y = m(x), or y += m(x) with `add`, for n tokens with rows of y
// `stride` apart.
void linear(const Linear& m, const Input& x, int64_t n, float* y, int64_t stride,
            bool add = false) {
    if (m.bits == 4)
        linear<Int4Block>(m, x, n, y, stride, add);
    else if (m.bits == 8)
        linear<Int8Block>(m, x, n, y, stride, add);
    else if (n <= FEW)
        linear<FEW_OUTPUTS, FOLDED, FEW>(m, x, n, y, stride, add);
    else
        linear<OUTPUTS, OUTPUTS, TOKENS>(m, x, n, y, stride, add);
}

// ---------------------------------------------------------------- between the products

// RMS norm; x may be y. The size is a multiple of LANES.
void rms_norm(const float* x, const BFloat16* weight, int64_t size, float epsilon, float* y) {
    Vec square{};
    for (int64_t i = 0; i < size; i += LANES) square += load<Vec>(x + i) * load<Vec>(x + i);
    const float factor = 1.0f / std::sqrt(sum(square) / size + epsilon);
    for (int64_t i = 0; i < size; i += LANES)
        store(y + i, load<Vec>(x + i) * factor * values(weight + i));
}

// Rotary embedding: x cos + (-x2, x1) sin, with x = (x1, x2).
void rotate(float* x, const float* cosine, const float* sine, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

// silu(gate) * up
Vec gated(const float* gate, const float* up) {
    const Vec g = load<Vec>(gate);
    return g / (1.0f + exponential(-g)) * load<Vec>(up);
}

}  // namespace
