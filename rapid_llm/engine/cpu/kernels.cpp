// Two CPU kernels in bfloat16: a whole forward pass for few tokens of the Llama family, and causal
// attention for many. The pass is one parallel region over the model's weights (its own, or the 8-bit
// or 4-bit weights of a quantized copy) and its KV cache, and takes little longer than reading them.
//
// Products take bfloat16 weights, keys and values, and accumulate in float32; the residual stream is in
// float32 too. Activations in products are bfloat16 where the processor has instructions for it, else
// float32; with quantized weights they are 16-bit integers.
// Compiled once for AVX-512 with bfloat16 and once for AVX2 (pyproject.toml); called by kernels.py and
// compiled.py.

#include "attention.h"
#include "linear.h"

// ---------------------------------------------------------------- exported functions

// Whether this CPU has the instructions that this file was compiled for.
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

// Runs the model on n tokens after the `length` tokens in the cache.
//   cosine, sine: [n, dim]. logits: [keep, vocab], for the last tokens.
extern "C" void rapid_forward(const Model* model, const int64_t* ids, int64_t n, int64_t length,
                              const float* cosine, const float* sine, int64_t keep,
                              int64_t threads, float* logits) {
    const Model& m = *model;
    const int64_t dim = m.dim, group = m.heads / m.kv_heads, rows = m.heads * n;
    const int64_t wide = m.heads * dim, narrow = m.kv_heads * dim, projected = wide + 2 * narrow;

    const bool whole = m.head.bits < 16;  // quantized weights: all linear layers take integers

    // Memory shared by all threads, followed by the memory of each thread.
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
    // Results for each part of the keys: [most, heads, n, dim], and [most, heads, n].
    float* parts = inputs + Input::size(n, wide) + Input::size(n, m.intermediate);
    auto* running = reinterpret_cast<Running*>(parts + most * rows * dim);

#pragma omp parallel num_threads(threads)
    {
        float* mine = x + shared + omp_get_thread_num() * own;
        float* one = mine;  // a row, or a part of one
        const Input input(mine + row, n, m.hidden);
        // Every thread computes the norm for itself, which is faster than waiting for another.
        const auto normalise = [&](const BFloat16* weight, int64_t first) {
            for (int64_t i = first; i < n; ++i) {
                rms_norm(x + i * m.hidden, weight, m.hidden, m.epsilon, one);
                input.put(i - first, 0, one, m.hidden, whole);
            }
        };
        // Embedding.
        const Share embedded(n, 1);
        for (int64_t i = embedded.first; i < embedded.last; ++i)
            for (int64_t d = 0; d < m.hidden; ++d)
                x[i * m.hidden + d] = value(m.embedding[ids[i] * m.hidden + d]);
#pragma omp barrier
        for (int64_t index = 0; index < m.layers; ++index) {
            const Layer& layer = m.layer[index];
            // Queries, keys and values.
            normalise(layer.input_norm, 0);
            linear(layer.query, input, n, qkv, projected);
            linear(layer.key, input, n, qkv + wide, projected);
            linear(layer.value, input, n, qkv + wide + narrow, projected);
#pragma omp barrier
            // Rotary embedding; keys and values are written to the cache.
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
            // Attention. Parts of the keys are scheduled dynamically: cores are not equally fast.
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
            // Merge the results of the parts.
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
            // Output.
            linear(layer.output, attended, n, x, m.hidden, true);
#pragma omp barrier
            // Gate and up.
            normalise(layer.post_norm, 0);
            linear(layer.gate, input, n, gate, m.intermediate);
            linear(layer.up, input, n, up, m.intermediate);
#pragma omp barrier
            // Activation.
            const Share active(n * m.intermediate, QUANTUM);
            for (int64_t at = active.first; at < active.last; at += QUANTUM) {
                for (int64_t d = 0; d < QUANTUM; d += LANES)
                    store(one + d, gated(gate + at + d, up + at + d));
                activated.put(at / m.intermediate, at % m.intermediate, one, QUANTUM, whole);
            }
#pragma omp barrier
            // Down.
            linear(layer.down, activated, n, x, m.hidden, true);
#pragma omp barrier
        }
        // Head.
        normalise(m.norm, n - keep);
        linear(m.head, input, keep, logits, m.head.out);
    }
}

// Causal attention of n queries to the `length` keys before them and to their own.
//   queries, out: [heads, n, dim]. keys, values: [kv_heads, length + n, dim], with heads `stride`
//   numbers apart.
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
        // The last block first, as it takes longest.
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
