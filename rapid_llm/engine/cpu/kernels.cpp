// Two CPU kernels in bfloat16: a whole forward pass of a few tokens of the Llama family, and causal
// attention for many. The pass is one parallel region over the model's own weights (or those of 8
// and 4 bits of its twin) and its KV cache, so that it takes little longer than reading them once.
//
// Products take bfloat16 weights, keys and values, and add in float32, in which the residual stream
// stays. What is multiplied with them is bfloat16 too where the processor multiplies that, and float32
// elsewhere; with a twin's weights it is 16-bit whole numbers.
// Compiled once for AVX-512 with bfloat16 and once for AVX2 (pyproject.toml); called by kernels.py and
// compiled.py.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// ---------------------------------------------------------------- vectors

#ifdef __AVX512BF16__
constexpr int LANES = 16, OUTPUTS = 4, TOKENS = 6, QUERIES = 12;  // what 32 registers hold
constexpr int FEW_OUTPUTS = 4;
#else
constexpr int LANES = 8, OUTPUTS = 2, TOKENS = 5, QUERIES = 4;  // what 16 registers hold
constexpr int FEW_OUTPUTS = 1;  // one row after another is read faster, where that is what counts
#endif
constexpr int FEW = 4;                 // tokens that are multiplied faster than the weights are read
constexpr int FOLDED = 4;              // their outputs whose lanes are added up together
constexpr int AHEAD = 3072;            // bytes of a row that are fetched before their turn
constexpr int GROUP = 2 * LANES;       // keys that are scored together
constexpr int KEYS = 8 * GROUP;        // keys between two updates of the running softmax
constexpr int PARTS = 16;              // of the keys, for each thread, of which it takes what is left
constexpr int BLOCK = 64;              // tokens of a prefill that a thread takes at a time
constexpr int QUANTUM = 32;            // whole numbers that share a scale
constexpr int ROWS = 16;               // outputs whose weights of few bits lie together
constexpr float HIDDEN = -3e38f;       // the score of a key that a query must not look at
constexpr float NOTHING_YET = -1e30f;  // the maximum before the first key

using Vec = float __attribute__((vector_size(4 * LANES)));
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint16_t __attribute__((vector_size(4 * LANES)));
using BFloat16 = uint16_t;  // its bits
struct Float16 {
    uint16_t bits;
};

template <typename To, typename From>
To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <typename T>
T load(const void* from) {
    T to;
    std::memcpy(&to, from, sizeof(T));
    return to;
}

template <typename T>
void store(void* to, T x) {
    std::memcpy(to, &x, sizeof(T));
}

float value(BFloat16 x) { return bits<float>(uint32_t(x) << 16); }

// To nearest, ties to even. The NaN that a processor makes stays one.
BFloat16 rounded(float x) {
    const uint32_t wide = bits<uint32_t>(x);
    return BFloat16((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// A factor is what is multiplied with weights, keys and values. Of these, LANES pairs are taken at a
// time: dot is acc + a.even * b.even + a.odd * b.odd.
#ifdef __AVX512BF16__

Vec values(const BFloat16* p) { return Vec(Bits(_mm512_cvtepu16_epi32(load<__m256i>(p))) << 16); }
Vec values(const Float16* p) { return _mm512_cvtph_ps(load<__m256i>(p)); }

using Factor = BFloat16;
using Pairs = __m512bh;
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
Shorts rounded(Vec x) { return bits<Shorts>(_mm512_cvtneps_pbh(x)); }
Factor factor(float x) { return rounded(x); }
Factor factor(BFloat16 x) { return x; }
Shorts factors(Vec x) { return rounded(x); }
Pairs pairs(Bits x) { return bits<Pairs>(x); }
Pairs pairs(const Factor* p) { return load<Pairs>(p); }
Pairs both(const Factor* two) { return pairs(Bits{} + load<uint32_t>(two)); }
Pairs kept(const float* p) { return load<Pairs>(p); }
void keep(float* to, Pairs x) { store(to, x); }
Vec dot(Vec acc, Pairs a, Pairs b) { return _mm512_dpbf16_ps(acc, a, b); }
// The even dimensions of two keys as pairs, and the odd ones.
Pairs evens(Bits a, Bits b) { return pairs((a & 0xffffu) | (b << 16)); }
Pairs odds(Bits a, Bits b) { return pairs((a >> 16) | (b & 0xffff0000u)); }
void put_factors(Factor* to, Vec a, Vec b) {
    store(to, rounded(a));
    store(to + LANES, rounded(b));
}

using Wide = __m512i;  // 2 * LANES whole numbers of 16 bits
Wide wide(const int8_t* p) { return _mm512_cvtepi8_epi16(load<__m256i>(p)); }
Ints dot(Ints acc, Wide a, Wide b) { return Ints(_mm512_dpwssd_epi32(__m512i(acc), a, b)); }
Wide wide(Ints a, Ints b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(__m512i(a))),
                              _mm512_cvtepi32_epi16(__m512i(b)), 1);
}

#else

Vec values(const BFloat16* p) { return Vec(Bits(_mm256_cvtepu16_epi32(load<__m128i>(p))) << 16); }
Vec values(const Float16* p) { return _mm256_cvtph_ps(load<__m128i>(p)); }

using Factor = float;  // in each GROUP of a token's, the even ones come first
struct Pairs {
    Vec even, odd;
};
Factor factor(float x) { return x; }
Factor factor(BFloat16 x) { return value(x); }
Vec factors(Vec x) { return x; }
Vec low(Bits x) { return Vec(x << 16); }
Vec high(Bits x) { return Vec(x & 0xffff0000u); }
Pairs pairs(Bits x) { return {low(x), high(x)}; }
Pairs pairs(const Factor* p) { return {load<Vec>(p), load<Vec>(p + LANES)}; }
Pairs both(const Factor* two) { return {two[0] - Vec{}, two[1] - Vec{}}; }
Pairs kept(const float* p) { return {load<Vec>(p), load<Vec>(p + LANES)}; }
void keep(float* to, Pairs x) {
    store(to, x.even);
    store(to + LANES, x.odd);
}
Vec dot(Vec acc, Pairs a, Pairs b) { return acc + a.even * b.even + a.odd * b.odd; }
Pairs evens(Bits a, Bits b) { return {low(a), low(b)}; }
Pairs odds(Bits a, Bits b) { return {high(a), high(b)}; }
void put_factors(Factor* to, Vec a, Vec b) {
    store(to, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
    store(to + LANES, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
}

using Wide = __m256i;
Wide wide(const int8_t* p) { return _mm256_cvtepi8_epi16(load<__m128i>(p)); }
Ints dot(Ints acc, Wide a, Wide b) {
    acc += Ints(_mm256_madd_epi16(a, b));
    asm("" : "+x"(acc));  // GCC would add up products first, and run out of registers for them
    return acc;
}
Wide wide(Ints a, Ints b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(__m256i(a), __m256i(b)), 0xd8);
}

#endif

Wide both(const int16_t* two) { return bits<Wide>(Bits{} + load<uint32_t>(two)); }

// QUANTUM weights of each of ROWS outputs: step * whole. A pair is of two weights that follow one
// another, for LANES outputs.
struct Int8Block {
    Float16 step[ROWS];
    int8_t whole[QUANTUM / 2][ROWS][2];

    Wide pair(int p, int output) const { return wide(whole[p][output]); }
};

// smallest + step * whole, where a word has the bits of every second one of 8 weights.
struct Int4Block {
    Float16 step[ROWS], smallest[ROWS];
    uint16_t whole[QUANTUM / 8][ROWS][2];

    Wide pair(int p, int output) const {
        return Wide(load<Words>(whole[p / 4][output]) >> p % 4 * 4 & 15);
    }
};

constexpr int PAIRS = sizeof(Pairs) / sizeof(float);

// Lanes with the bit S of one vector trade places with those without it of another: a keeps its
// lanes without and gets b's, b keeps its lanes with and gets a's.
template <int S, typename V, int... L>
void exchange(V& a, V& b, std::integer_sequence<int, L...>) {
    const V without = __builtin_shufflevector(a, b, (L & S ? LANES + L - S : L)...);
    b = __builtin_shufflevector(a, b, (L & S ? LANES + L : L + S)...);
    a = without;
}
template <int S, typename V>
void exchange(V& a, V& b) {
    exchange<S>(a, b, std::make_integer_sequence<int, LANES>{});
}

// One vector whose lane j * LANES / J is the sum of x[j]; J is a power of 2. Overwrites x.
template <int J, int S = LANES / 2>
Vec folded(Vec* x) {
    if constexpr (S == 0) {
        return *x;
    } else if constexpr (J == 1) {
        Vec same = *x;
        exchange<S>(*x, same);
        *x += same;
        return folded<1, S / 2>(x);
    } else {
        for (int j = 0; j < J / 2; ++j) {
            exchange<S>(x[j], x[j + J / 2]);
            x[j] += x[j + J / 2];
        }
        return folded<J / 2, S / 2>(x);
    }
}
float sum(Vec x) { return folded<1>(&x)[0]; }

// Relative error below 3e-7 between -87 and 88; outside, as at these ends. The polynomial is that
// of the Cephes library's expf.
Vec exponential(Vec x) {
    x = x < -87.0f ? Vec{} - 87.0f : x;
    x = x > 88.0f ? Vec{} + 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec whole = x * 1.44269504f + magic - magic;
    const Vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return p * Vec((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// What one thread does of `total`, in whole units.
struct Share {
    int64_t first, last;
    Share(int64_t total, int64_t unit) {
        const int64_t units = (total + unit - 1) / unit;
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        first = std::min(total, units * thread / threads * unit);
        last = std::min(total, units * (thread + 1) / threads * unit);
    }
};

// Calls f(R, first) for n things in blocks of nearly the same size R, at most MOST; R is a constant
// to the compiler.
template <int R, typename F>
void in_block(int64_t size, int64_t first, const F& f) {
    if (size == R)
        f(std::integral_constant<int, R>{}, first);
    else if constexpr (R > 1)
        in_block<R - 1>(size, first, f);
}
template <int MOST, typename F>
void in_blocks(int64_t n, const F& f) {
    const int64_t blocks = (n + MOST - 1) / MOST;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = n * b / blocks;
        in_block<MOST>(n * (b + 1) / blocks - first, first, f);
    }
}

// A cache line holds so many float32 numbers. What vectors are loaded from begins with one: a load
// that touches two lines takes twice as long.
constexpr size_t LINE = 16;
size_t lines(size_t count) { return (count + LINE - 1) / LINE * LINE; }

// Float32 numbers that the calling thread may write to until its next call.
float* arena(size_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < count + LINE) memory.resize(count + LINE);
    void* from = memory.data();
    size_t room = memory.size() * sizeof(float);
    return static_cast<float*>(std::align(LINE * sizeof(float), count * sizeof(float), from, room));
}

}  // namespace

// ---------------------------------------------------------------- what compiled.py fills in

extern "C" {

struct Linear {             // y = weight x + bias
    const void* weight;     // [out, in] bfloat16, or [out / ROWS, in / QUANTUM] Int8Block or Int4Block
    const BFloat16* bias;   // [out], or null
    int64_t out, in, bits;  // of a weight
};

struct Layer {
    const BFloat16 *input_norm, *post_norm;
    const BFloat16 *query_norm, *key_norm;  // null but for Qwen3
    Linear query, key, value, output, gate, up, down;
    BFloat16 *keys, *values;  // [kv_heads, capacity, dim]
    int64_t window;           // so many keys a query sees, its own included
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, dim, intermediate, capacity;
    float epsilon, scaling;
    const BFloat16* embedding;  // [vocab, hidden]
    const BFloat16* norm;
    Linear head;
    const Layer* layer;
};

}  // extern "C"

namespace {

// ---------------------------------------------------------------- linear layers

// Rows of n tokens as a linear layer takes them: factors, or for weights of few bits whole numbers of
// 16 bits, which keeps more digits than bfloat16 has.
struct Input {
    Factor* factors;      // [n, in]
    int16_t* whole;       // [in / QUANTUM, n, QUANTUM], in the same memory
    float *step, *total;  // [in / QUANTUM, n]: their scale, and the sum of what they stand for
    int64_t n, in;

    static int64_t size(int64_t n, int64_t in) { return n * in; }
    Input(float* memory, int64_t n, int64_t in)
        : factors(reinterpret_cast<Factor*>(memory)),
          whole(reinterpret_cast<int16_t*>(memory)),
          step(memory + n * in / 2),
          total(step + n * in / QUANTUM),
          n(n),
          in(in) {}

    // Token r's numbers from `first` on: a multiple of QUANTUM.
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
            wrong += next * 0.0f;  // NaN where there is a NaN or an infinity, and so is the scale
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

// Fetches what follows w, of rows of which A are read at a time: a processor foresees that one row
// goes on, but not that many do.
template <int A>
void fetch(const BFloat16* w, int64_t in) {
    __builtin_prefetch(w + (A == 1 ? int64_t(AHEAD / sizeof(BFloat16)) : A * in));
}

// out[r][j] = w[j] . x[r] for J rows of a matrix, A at a time, and R tokens from the first on.
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

// Output j of a token, whose outputs are `row`, from its product.
void put(const Linear& m, int64_t j, float product, float* row, bool add) {
    if (m.bias) product += value(m.bias[j]);
    row[j] = add ? row[j] + product : product;
}

// Outputs j to j + J of n tokens, at most MOST at a time.
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

// out[r] = ROWS outputs of R tokens from the first on, from weights of few bits; a lane is an output.
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

// This thread's outputs of y = m(x), or of y += m(x), for n tokens; a row of y is `stride` long.
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

// x may be y. The size is a multiple of LANES.
void rms_norm(const float* x, const BFloat16* weight, int64_t size, float epsilon, float* y) {
    Vec square{};
    for (int64_t i = 0; i < size; i += LANES) square += load<Vec>(x + i) * load<Vec>(x + i);
    const float factor = 1.0f / std::sqrt(sum(square) / size + epsilon);
    for (int64_t i = 0; i < size; i += LANES)
        store(y + i, load<Vec>(x + i) * factor * values(weight + i));
}

// x cos + (-x2, x1) sin, with x = (x1, x2).
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

// ---------------------------------------------------------------- attention

template <int S = LANES / 2>
void transpose(Bits (&matrix)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        if (!(i & S)) exchange<S>(matrix[i], matrix[i + S]);
    if constexpr (S > 1) transpose<S / 2>(matrix);
}

// A GROUP of keys as pairs of neighbouring dimensions, [dim / 2, 2] Pairs; the last key is repeated.
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

// Fetches numbers that will be read soon, a cache line a step: as many of all as `piece` is of `work`,
// of which so much is done. A processor waits where more are fetched at once than it can keep apart.
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
// Meanwhile the values of these keys are fetched.
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

// out += weights values, with weights [n, KEYS]; in each GROUP of dimensions of out, the even ones
// come first. Meanwhile the keys after these are fetched.
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

int64_t mixed_at(int64_t d) { return d / GROUP * GROUP + d % 2 * LANES + d % GROUP / 2; }

// A softmax that is not complete yet: the greatest score so far, and the sum of
// exp(score - maximum).
struct Running {
    float maximum, total;
};

// Turns scores into their exponentials; scales what was mixed with those before.
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

// What a thread needs beside the queries and what it mixes for them.
struct Scratch {
    float *keys, *scores;
    Factor* weights;
    static size_t size(int64_t rows, int64_t dim) { return dim * PAIRS + 2 * rows * KEYS; }
    Scratch(float* memory, int64_t rows, int64_t dim)
        : keys(memory),
          scores(keys + dim * PAIRS),
          weights(reinterpret_cast<Factor*>(scores + rows * KEYS)) {}
};

// Which keys are there to be seen, and by whom: row r of the queries is token r % n, which follows
// `length` + r % n of the keys and sees so many up to its own.
struct View {
    int64_t n, length, window;
    float scaling;
};

// Keys divided into parts of `size`, a multiple of KEYS; `most` of them at most.
struct Parts {
    int64_t size, count;
    Parts(int64_t keys, int64_t most)
        : size(((keys + most - 1) / most + KEYS - 1) / KEYS * KEYS), count((keys + size - 1) / size) {}
};

// Queries of one KV head over `all` keys. At the end those at `next` are fetched.
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
            const int64_t end = view.length + r % view.n + 1 - start;
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

// ---------------------------------------------------------------- what is called

// Whether this machine has what this file was compiled for.
extern "C" int rapid_supported() {
#ifdef __AVX512BF16__
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
#endif
}

// Appends n tokens to the `length` that the cache holds.
//   cosine, sine: [n, dim]. logits: [keep, vocab], of the last tokens.
extern "C" void rapid_forward(const Model* model, const int64_t* ids, int64_t n, int64_t length,
                              const float* cosine, const float* sine, int64_t keep,
                              int64_t threads, float* logits) {
    const Model& m = *model;
    const int64_t dim = m.dim, group = m.heads / m.kv_heads, rows = m.heads * n;
    const int64_t wide = m.heads * dim, narrow = m.kv_heads * dim, projected = wide + 2 * narrow;

    const bool whole = m.head.bits < 16;  // all of a model's linear layers take such numbers, or none

    // What all threads see, then what each has of its own.
    const int64_t row = std::max(m.hidden, 2 * dim);
    const int64_t most = std::max<int64_t>(1, PARTS * threads / m.kv_heads);
    const size_t shared = lines(n * (m.hidden + projected + 2 * m.intermediate + wide) +
                                most * rows * (dim + 2) + Input::size(n, wide) +
                                Input::size(n, m.intermediate));
    const size_t own = lines(
        std::max<size_t>(row + Input::size(n, m.hidden), Scratch::size(group * n, dim)));
    float* x = arena(shared + threads * own);  // [n, hidden], the residual stream
    float* qkv = x + n * m.hidden;             // [n, heads + 2 * kv_heads, dim]
    float* gate = qkv + n * projected;
    float* up = gate + n * m.intermediate;
    auto* queries = reinterpret_cast<Factor*>(up + n * m.intermediate);  // [heads, n, dim]
    float* inputs = up + n * (m.intermediate + wide);
    const Input attended(inputs, n, wide);
    const Input activated(inputs + Input::size(n, wide), n, m.intermediate);
    // Of each part of the keys: [most, heads, n, dim], and [most, heads, n].
    float* parts = inputs + Input::size(n, wide) + Input::size(n, m.intermediate);
    auto* running = reinterpret_cast<Running*>(parts + most * rows * dim);

#pragma omp parallel num_threads(threads)
    {
        float* mine = x + shared + omp_get_thread_num() * own;
        float* one = mine;  // a row, or a part of one
        const Input input(mine + row, n, m.hidden);
        // Every thread normalises for itself, which takes less time than waiting for another.
        const auto normalise = [&](const BFloat16* weight, int64_t first) {
            for (int64_t i = first; i < n; ++i) {
                rms_norm(x + i * m.hidden, weight, m.hidden, m.epsilon, one);
                input.put(i - first, 0, one, m.hidden, whole);
            }
        };
        const Share embedded(n, 1);
        for (int64_t i = embedded.first; i < embedded.last; ++i)
            for (int64_t d = 0; d < m.hidden; ++d)
                x[i * m.hidden + d] = value(m.embedding[ids[i] * m.hidden + d]);
#pragma omp barrier
        for (int64_t index = 0; index < m.layers; ++index) {
            const Layer& layer = m.layer[index];
            normalise(layer.input_norm, 0);
            linear(layer.query, input, n, qkv, projected);
            linear(layer.key, input, n, qkv + wide, projected);
            linear(layer.value, input, n, qkv + wide + narrow, projected);
#pragma omp barrier
            const Share turned(n * (m.heads + m.kv_heads), 1);
            for (int64_t item = turned.first; item < turned.last; ++item) {
                const int64_t i = item / (m.heads + m.kv_heads);
                const int64_t head = item % (m.heads + m.kv_heads);
                const bool is_key = head >= m.heads;
                float* from = qkv + i * projected + head * dim;
                if (const BFloat16* norm = is_key ? layer.key_norm : layer.query_norm)
                    rms_norm(from, norm, dim, m.epsilon, from);
                rotate(from, cosine + i * dim, sine + i * dim, dim);
                const int64_t place = ((head - m.heads) * m.capacity + length + i) * dim;
                if (is_key)
                    for (int64_t d = 0; d < dim; ++d) {
                        layer.keys[place + d] = rounded(from[d]);
                        layer.values[place + d] = rounded(from[narrow + d]);
                    }
                else
                    for (int64_t d = 0; d < dim; ++d)
                        queries[(head * n + i) * dim + d] = factor(from[d]);
            }
#pragma omp barrier
            // Parts of the keys go to whichever thread is free: cores are not equally fast.
            const int64_t lowest = std::max<int64_t>(0, length + 1 - layer.window);
            const Parts split(length + n - lowest, most);
            const Scratch scratch(mine, group * n, dim);
            const auto place = [&](int64_t item) {
                const int64_t first = lowest + item % split.count * split.size;
                return (item / split.count * m.capacity + first) * dim;
            };
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < m.kv_heads * split.count; ++item) {
                const int64_t head = item / split.count, part = item % split.count;
                const int64_t first = lowest + part * split.size;
                const int64_t query = head * group * n, at = part * rows + query;
                attend({n, length - first, layer.window, m.scaling}, queries + query * dim,
                       group * n, layer.keys + place(item), layer.values + place(item),
                       std::min(split.size, length + n - first), layer.keys + place(item + threads),
                       dim, scratch, running + at, parts + at * dim);
            }
#pragma omp for schedule(static)
            for (int64_t query = 0; query < rows; ++query) {
                float maximum = NOTHING_YET, total = 0;
                for (int64_t p = 0; p < split.count; ++p)
                    maximum = std::max(maximum, running[p * rows + query].maximum);
                std::fill(one, one + dim, 0.0f);
                for (int64_t p = 0; p < split.count; ++p) {
                    const Running& part = running[p * rows + query];
                    const float weight = std::exp(part.maximum - maximum);
                    const float* from = parts + (p * rows + query) * dim;
                    total += part.total * weight;
                    for (int64_t d = 0; d < dim; ++d) one[d] += weight * from[d];
                }
                float* to = one + dim;
                for (int64_t d = 0; d < dim; ++d) to[d] = one[mixed_at(d)] / total;
                attended.put(query % n, query / n * dim, to, dim, whole);
            }
            linear(layer.output, attended, n, x, m.hidden, true);
#pragma omp barrier
            normalise(layer.post_norm, 0);
            linear(layer.gate, input, n, gate, m.intermediate);
            linear(layer.up, input, n, up, m.intermediate);
#pragma omp barrier
            const Share active(n * m.intermediate, QUANTUM);
            for (int64_t at = active.first; at < active.last; at += QUANTUM) {
                for (int64_t d = 0; d < QUANTUM; d += LANES)
                    store(one + d, gated(gate + at + d, up + at + d));
                activated.put(at / m.intermediate, at % m.intermediate, one, QUANTUM, whole);
            }
#pragma omp barrier
            linear(layer.down, activated, n, x, m.hidden, true);
#pragma omp barrier
        }
        normalise(m.norm, n - keep);
        linear(m.head, input, keep, logits, m.head.out);
    }
}

// Causal attention of n queries to the `length` keys before them and to their own.
//   queries, out: [heads, n, dim]. keys, values: [kv_heads, length + n, dim], where one head
//   begins `stride` numbers after another.
extern "C" void rapid_attend(const BFloat16* queries, const BFloat16* keys,
                             const BFloat16* values, int64_t heads, int64_t kv_heads, int64_t n,
                             int64_t length, int64_t dim, int64_t stride, int64_t window,
                             float scaling, int64_t threads, BFloat16* out) {
    const int64_t group = heads / kv_heads, blocks = (n + BLOCK - 1) / BLOCK;
    const size_t most = group * BLOCK;
    const size_t own = lines(Scratch::size(most, dim) + most * (2 * dim + 2));
    float* memory = arena(threads * own);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t item = 0; item < blocks * kv_heads; ++item) {
        // The last block first: it sees most keys.
        const int64_t head = item % kv_heads, first = (blocks - 1 - item / kv_heads) * BLOCK;
        const int64_t count = std::min<int64_t>(BLOCK, n - first), rows = group * count;
        float* mixed = memory + omp_get_thread_num() * own;
        auto* factors = reinterpret_cast<Factor*>(mixed + rows * dim);
        float* rest = mixed + 2 * rows * dim;
        const Scratch scratch(rest, rows, dim);
        auto* running = reinterpret_cast<Running*>(rest + Scratch::size(rows, dim));
        for (int64_t g = 0; g < group; ++g) {
            const BFloat16* from = queries + ((head * group + g) * n + first) * dim;
            for (int64_t i = 0; i < count * dim; ++i)
                factors[g * count * dim + i] = factor(from[i]);
        }
        const int64_t lowest = std::max<int64_t>(0, length + first + 1 - window);
        const int64_t at = head * stride + lowest * dim;
        attend({count, length + first - lowest, window, scaling}, factors, rows, keys + at,
               values + at, length + first + count - lowest, keys + at, dim, scratch, running, mixed);
        for (int64_t r = 0; r < rows; ++r) {
            BFloat16* to = out + ((head * group + r / count) * n + first + r % count) * dim;
            for (int64_t d = 0; d < dim; ++d)
                to[d] = rounded(mixed[r * dim + mixed_at(d)] / running[r].total);
        }
    }
}
