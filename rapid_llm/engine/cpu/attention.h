// Attention of a few queries to a part of the keys: scores, running softmax, weighted sum of values.

#pragma once

#include "vectors.h"

namespace {

template <int S = LANES / 2>
void transpose(Bits (&matrix)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        if (!(i & S)) exchange<S>(matrix[i], matrix[i + S]);
    if constexpr (S > 1) transpose<S / 2>(matrix);
}

// Transposes a GROUP of keys to pairs of neighbouring dimensions, [dim / 2, 2] Pairs. Missing keys are
// copies of the last one.
void transpose_keys(const BFloat16* keys, int64_t count, int64_t dim, float* out) {
    for (int half = 0; half < GROUP; half += LANES)
        for (int64_t d = 0; d < dim; d += 2 * LANES) {
            Bits matrix[LANES];
            for (int i = 0; i < LANES; ++i)
                matrix[i] = load<Bits>(keys + std::min<int64_t>(half + i, count - 1) * dim + d);
            transpose(matrix);
            for (int i = 0; i < LANES; ++i)
                keep(out + (d + 2 * i + half / LANES) * PAIRS, pairs(matrix[i]));
        }
}

// Prefetches numbers that will be read soon, one cache line per step, spread evenly over `work`: this
// object covers the share of `piece` after `done`. Too many prefetches at once would stall.
class Prefetch {
    const BFloat16 *next, *end;

   public:
    Prefetch(const BFloat16* from, int64_t count, int64_t done, int64_t piece, int64_t work)
        : next(from + count * done / work), end(from + count * (done + piece) / work) {}
    void step() {
        if (next >= end) return;
        __builtin_prefetch(next);
        next += LINE * sizeof(float) / sizeof(BFloat16);
    }
};

// Products of n queries, [n, dim], with a GROUP of transposed keys; a row of out is KEYS long.
// Prefetches the values of these keys.
void score(const Factor* queries, int64_t n, int64_t dim, const float* keys,
           const BFloat16* values, float* out) {
    in_blocks<QUERIES>(n, [&](auto block, int64_t first) {
        constexpr int R = block;
        const Factor* query = queries + first * dim;
        Prefetch prefetch(values, GROUP * dim, first, R, n);
        Vec acc[R][2] = {};
        for (int64_t d = 0; d < dim; d += 2) {
            prefetch.step();
            const Pairs a = kept(keys + d * PAIRS), b = kept(keys + (d + 1) * PAIRS);
            for (int r = 0; r < R; ++r) {
                const Pairs two = both(query + r * dim + d);
                acc[r][0] = dot(acc[r][0], two, a);
                acc[r][1] = dot(acc[r][1], two, b);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 2; ++c) store(out + (first + r) * KEYS + c * LANES, acc[r][c]);
    });
}

// out += weights @ values, with weights [n, KEYS]; in each GROUP of dimensions of out, the even ones
// come first. Prefetches the next keys.
void mix(const Factor* weights, int64_t n, const BFloat16* values, int64_t count, int64_t dim,
         const BFloat16* next_keys, float* out) {
    in_blocks<QUERIES>(n, [&](auto block, int64_t first) {
        constexpr int R = block;
        const Factor* weight = weights + first * KEYS;
        for (int64_t d = 0; d < dim; d += GROUP) {
            float* to = out + first * dim + d;
            Prefetch prefetch(next_keys, KEYS * dim, first * dim + d * R, GROUP * R, n * dim);
            Vec acc[R][2];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < 2; ++c) acc[r][c] = load<Vec>(to + r * dim + c * LANES);
            for (int64_t key = 0; key < count; key += 2) {
                prefetch.step();
                const BFloat16* at = values + key * dim + d;
                const Bits a = load<Bits>(at), b = load<Bits>(key + 1 < count ? at + dim : at);
                const Pairs even = evens(a, b), odd = odds(a, b);
                for (int r = 0; r < R; ++r) {
                    const Pairs two = both(weight + r * KEYS + key);
                    acc[r][0] = dot(acc[r][0], two, even);
                    acc[r][1] = dot(acc[r][1], two, odd);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < 2; ++c) store(to + r * dim + c * LANES, acc[r][c]);
        }
    });
}

// Index of dimension d in a row of out.
int64_t mixed_at(int64_t d) { return d / GROUP * GROUP + d % 2 * LANES + d % GROUP / 2; }

// State of a running softmax: the maximum score so far, and the sum of exp(score - maximum).
struct Running {
    float maximum, total;
};

// Computes the exponentials of scores, and rescales the sums so far to the new maximum.
void exponentials(const float* scores, int64_t count, float scaling, Running& running,
                  Factor* weights, float* mixed, int64_t dim) {
    Vec most = load<Vec>(scores);
    for (int64_t i = LANES; i < count; i += LANES) {
        const Vec next = load<Vec>(scores + i);
        most = next > most ? next : most;
    }
    float maximum = most[0];
    for (int lane = 1; lane < LANES; ++lane) maximum = std::max(maximum, most[lane]);
    maximum = std::max(maximum * scaling, running.maximum);
    Vec total{};
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec weight = exponential(load<Vec>(scores + i) * scaling - maximum);
        total += weight;
        store(weights + i, factors(weight));
    }
    const float before = std::exp(running.maximum - maximum);
    running = {maximum, running.total * before + sum(total)};
    for (int64_t d = 0; d < dim; ++d) mixed[d] *= before;
}

// Scratch memory of a thread.
struct Scratch {
    float *keys, *scores;
    Factor* weights;
    static size_t size(int64_t rows, int64_t dim) { return dim * PAIRS + 2 * rows * KEYS; }
    Scratch(float* memory, int64_t rows, int64_t dim)
        : keys(memory),
          scores(keys + dim * PAIRS),
          weights(reinterpret_cast<Factor*>(scores + rows * KEYS)) {}
};

// Causal mask: row r of the queries is token r / group, which attends to the keys before ends[r / group],
// its own the last, within `window`. Keys count from `first` on.
struct View {
    const int64_t* ends;
    int64_t first, group, window;
    float scaling;
};

// Attention of the queries of one KV head over `all` keys. At the end prefetches the keys at `next`.
void attend(const View& view, const Factor* queries, int64_t rows, const BFloat16* keys,
            const BFloat16* values, int64_t all, const BFloat16* next, int64_t dim,
            const Scratch& own, Running* running, float* mixed) {
    std::fill(running, running + rows, Running{NOTHING_YET, 0.0f});
    std::fill(mixed, mixed + rows * dim, 0.0f);
    for (int64_t start = 0; start < all; start += KEYS) {
        const int64_t count = std::min<int64_t>(KEYS, all - start);
        const int64_t padded = (count + GROUP - 1) / GROUP * GROUP;
        for (int64_t key = 0; key < count; key += GROUP) {
            transpose_keys(keys + (start + key) * dim, count - key, dim, own.keys);
            score(queries, rows, dim, own.keys, values + (start + key) * dim, own.scores + key);
        }
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = own.scores + r * KEYS;
            const int64_t end = view.ends[r / view.group] - view.first - start;
            const int64_t begin = std::clamp<int64_t>(end - view.window, 0, count);
            std::fill(scores, scores + begin, HIDDEN);
            std::fill(scores + std::clamp<int64_t>(end, 0, count), scores + padded, HIDDEN);
            exponentials(scores, padded, view.scaling, running[r], own.weights + r * KEYS,
                         mixed + r * dim, dim);
        }
        mix(own.weights, rows, values + start * dim, count, dim,
            start + KEYS < all ? keys + (start + KEYS) * dim : next, mixed);
    }
}

}  // namespace
