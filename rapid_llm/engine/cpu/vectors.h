// Vector types and operations for AVX-512 and AVX2, blocks of quantized weights, division of work among
// threads, and their memory.

#pragma once

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

#ifdef __AVX512BF16__
constexpr int LANES = 16, OUTPUTS = 4, TOKENS = 6, QUERIES = 12;  // fit 32 registers
constexpr int FEW_OUTPUTS = 4;
#else
constexpr int LANES = 8, OUTPUTS = 2, TOKENS = 5, QUERIES = 4;  // fit 16 registers
constexpr int FEW_OUTPUTS = 1;  // reading one row after another is faster, when limited by memory
#endif
constexpr int FEW = 4;                 // tokens up to which products are limited by reading weights
constexpr int FOLDED = 4;              // outputs for few tokens whose lanes are summed together
constexpr int AHEAD = 3072;            // bytes of a row to prefetch ahead
constexpr int GROUP = 2 * LANES;       // keys that are scored together
constexpr int KEYS = 8 * GROUP;        // keys between two updates of the running softmax
constexpr int PARTS = 16;              // parts of the keys per thread, for load balancing
constexpr int BLOCK = 64;              // prefill tokens that a thread takes at a time
constexpr int QUANTUM = 32;            // integers that share a scale
constexpr int ROWS = 16;               // outputs in a block of quantized weights
constexpr float HIDDEN = -3e38f;       // score of a masked key
constexpr float NOTHING_YET = -1e30f;  // maximum before the first key

using Vec = float __attribute__((vector_size(4 * LANES)));
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint16_t __attribute__((vector_size(4 * LANES)));
using BFloat16 = uint16_t;  // bits of a bfloat16
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

// Rounds to nearest, ties to even. A NaN made by the processor remains NaN.
BFloat16 rounded(float x) {
    const uint32_t wide = bits<uint32_t>(x);
    return BFloat16((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// Factor is the type of activations in products. Products take LANES pairs at a time: dot is
// acc + a.even * b.even + a.odd * b.odd.
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
// The even (odd) dimensions of two keys as pairs.
Pairs evens(Bits a, Bits b) { return pairs((a & 0xffffu) | (b << 16)); }
Pairs odds(Bits a, Bits b) { return pairs((a >> 16) | (b & 0xffff0000u)); }
void put_factors(Factor* to, Vec a, Vec b) {
    store(to, rounded(a));
    store(to + LANES, rounded(b));
}

using Wide = __m512i;  // 2 * LANES 16-bit integers
Wide wide(const int8_t* p) { return _mm512_cvtepi8_epi16(load<__m256i>(p)); }
Ints dot(Ints acc, Wide a, Wide b) { return Ints(_mm512_dpwssd_epi32(__m512i(acc), a, b)); }
Wide wide(Ints a, Ints b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(__m512i(a))),
                              _mm512_cvtepi32_epi16(__m512i(b)), 1);
}

#else

Vec values(const BFloat16* p) { return Vec(Bits(_mm256_cvtepu16_epi32(load<__m128i>(p))) << 16); }
Vec values(const Float16* p) { return _mm256_cvtph_ps(load<__m128i>(p)); }

using Factor = float;  // in each GROUP of a token's factors, the even ones come first
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
    asm("" : "+x"(acc));  // keeps GCC from summing products first, which spills registers
    return acc;
}
Wide wide(Ints a, Ints b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(__m256i(a), __m256i(b)), 0xd8);
}

#endif

Wide both(const int16_t* two) { return bits<Wide>(Bits{} + load<uint32_t>(two)); }

// 8-bit weights, step * whole: QUANTUM weights of each of ROWS outputs. A pair is two neighbouring
// weights of LANES outputs.
struct Int8Block {
    Float16 step[ROWS];
    int8_t whole[QUANTUM / 2][ROWS][2];

    Wide pair(int p, int output) const { return wide(whole[p][output]); }
};

// 4-bit weights, smallest + step * whole; a 16-bit word has every second one of 8 weights.
struct Int4Block {
    Float16 step[ROWS], smallest[ROWS];
    uint16_t whole[QUANTUM / 8][ROWS][2];

    Wide pair(int p, int output) const {
        return Wide(load<Words>(whole[p / 4][output]) >> p % 4 * 4 & 15);
    }
};

constexpr int PAIRS = sizeof(Pairs) / sizeof(float);

// Exchanges the lanes of a whose index has bit S with the lanes of b whose index does not.
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

// Vector whose lane j * LANES / J is the sum of the lanes of x[j]; J is a power of 2. Overwrites x.
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

// exp(x) with a relative error below 3e-7; x is clamped to [-87, 88]. The polynomial is that of the
// Cephes library's expf.
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

// The calling thread's share [first, last) of `total` items, in whole units.
struct Share {
    int64_t first, last;
    Share(int64_t total, int64_t unit) {
        const int64_t units = (total + unit - 1) / unit;
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        first = std::min(total, units * thread / threads * unit);
        last = std::min(total, units * (thread + 1) / threads * unit);
    }
};

// Calls f(R, first) for blocks of n items of nearly the same size R, at most MOST; R is a compile-time
// constant.
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

// Float32 numbers in a cache line. Memory is aligned to lines, because a load that touches two lines
// takes twice as long.
constexpr size_t LINE = 16;
size_t lines(size_t count) { return (count + LINE - 1) / LINE * LINE; }

// Memory for `count` float32 numbers, valid until the calling thread's next call.
float* arena(size_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < count + LINE) memory.resize(count + LINE);
    void* from = memory.data();
    size_t room = memory.size() * sizeof(float);
    return static_cast<float*>(std::align(LINE * sizeof(float), count * sizeof(float), from, room));
}

}  // namespace
