// Two CPU kernels in bfloat16: a whole forward pass for few tokens of the Llama family, and causal
// attention for many. The pass is one parallel region over the model's weights (its own, or the 8-bit
// or 4-bit weights of a quantized copy) and its KV cache, and takes little longer than reading them.
//
// Products take bfloat16 weights, keys and values, and accumulate in float32; the residual stream is in
// float32 too. Activations in products are bfloat16 where the processor has instructions for it, else
// float32; with quantized weights they are 16-bit integers.
// Compiled once for AVX-512 with bfloat16 and once for AVX2 (pyproject.toml); called by kernels.py and
// compiled.py.

#include <map>

#include "batch.h"

// ---------------------------------------------------------------- exported functions

// Number of the functions and structs that Python and this file have in common; it changes with them.
extern "C" int rapid_interface() { return 2; }

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

// Runs the model on new tokens of several sequences, and writes their keys and values to their caches.
//   logits: [kept, vocab].
extern "C" void rapid_forward(const Model* model, const Batch* tokens, int64_t threads,
                              float* logits) {
    const Model& m = *model;
    const Batch& batch = *tokens;
    const int64_t n = batch.n, dim = m.dim, group = m.heads / m.kv_heads;
    const int64_t wide = m.heads * dim, narrow = m.kv_heads * dim, projected = wide + 2 * narrow;

    const bool whole = m.head.bits < 16;  // quantized weights: all linear layers take integers

    // Division of the keys, for each window that layers have.
    const int64_t most = std::max<int64_t>(1, PARTS * threads / m.kv_heads);
    std::map<int64_t, Pieces> divisions;
    int64_t results = 0;  // rows of all pieces
    for (int64_t index = 0; index < m.layers; ++index) {
        const int64_t window = m.layer[index].window;
        const Pieces& pieces = divisions.try_emplace(window, batch, window, most).first->second;
        results = std::max(results, pieces.tokens * m.heads);
    }

    // Memory shared by all threads, followed by the memory of each thread.
    const int64_t row = std::max(m.hidden, 2 * dim);
    const size_t shared = lines(n * (m.hidden + projected + 2 * m.intermediate + wide) +
                                results * (dim + 2) + Input::size(n, wide) +
                                Input::size(n, m.intermediate));
    const size_t own = lines(
        std::max<size_t>(row + Input::size(n, m.hidden), Scratch::size(group * n, dim)));
    float* x = arena(shared + threads * own);  // [n, hidden], the residual stream
    float* qkv = x + n * m.hidden;             // [n, heads + 2 * kv_heads, dim]
    float* gate = qkv + n * projected;
    float* up = gate + n * m.intermediate;
    auto* queries = reinterpret_cast<Factor*>(up + n * m.intermediate);  // [kv_heads, n, group, dim]
    float* inputs = up + n * (m.intermediate + wide);
    const Input attended(inputs, n, wide);
    const Input activated(inputs + Input::size(n, wide), n, m.intermediate);
    // Results of each piece for its tokens: [kv_heads, tokens, group, dim], and [kv_heads, tokens, group].
    float* mixed = inputs + Input::size(n, wide) + Input::size(n, m.intermediate);
    auto* running = reinterpret_cast<Running*>(mixed + results * dim);

#pragma omp parallel num_threads(threads)
    {
        float* mine = x + shared + omp_get_thread_num() * own;
        float* one = mine;  // a row, or a part of one
        const Input input(mine + row, n, m.hidden);
        // Every thread computes the norm for itself, which is faster than waiting for another.
        const auto normalise = [&](const BFloat16* weight, int64_t to, int64_t token) {
            rms_norm(x + token * m.hidden, weight, m.hidden, m.epsilon, one);
            input.put(to, 0, one, m.hidden, whole);
        };
        // Embedding.
        const Share embedded(n, 1);
        for (int64_t i = embedded.first; i < embedded.last; ++i)
            for (int64_t d = 0; d < m.hidden; ++d)
                x[i * m.hidden + d] = value(m.embedding[batch.ids[i] * m.hidden + d]);
#pragma omp barrier
        for (int64_t index = 0; index < m.layers; ++index) {
            const Layer& layer = m.layer[index];
            // Queries, keys and values.
            for (int64_t i = 0; i < n; ++i) normalise(layer.input_norm, i, i);
            linear(layer.query, input, n, qkv, projected);
            linear(layer.key, input, n, qkv + wide, projected);
            linear(layer.value, input, n, qkv + wide + narrow, projected);
#pragma omp barrier
            // Rotary embedding; keys and values are written to the caches.
            const Share turned(n * (m.heads + m.kv_heads), 1);
            for (int64_t item = turned.first; item < turned.last; ++item) {
                const int64_t i = item / (m.heads + m.kv_heads);
                const int64_t head = item % (m.heads + m.kv_heads);
                const bool is_key = head >= m.heads;
                float* from = qkv + i * projected + head * dim;
                if (const BFloat16* norm = is_key ? layer.key_norm : layer.query_norm)
                    rms_norm(from, norm, dim, m.epsilon, from);
                rotate(from, batch.cosine + i * dim, batch.sine + i * dim, dim);
                if (is_key) {
                    const Cache& cache = batch.cache[batch.owner[i]];
                    const int64_t key = batch.ends[i] - 1 - cache.first;
                    const int64_t place = ((head - m.heads) * cache.capacity + key) * dim;
                    for (int64_t d = 0; d < dim; ++d) {
                        cache.keys[index][place + d] = rounded(from[d]);
                        cache.values[index][place + d] = rounded(from[narrow + d]);
                    }
                } else {
                    Factor* to = queries + ((head / group * n + i) * group + head % group) * dim;
                    for (int64_t d = 0; d < dim; ++d) to[d] = factor(from[d]);
                }
            }
#pragma omp barrier
            // Attention. Pieces of the keys are scheduled dynamically: cores are not equally fast.
            const std::vector<Piece>& pieces = divisions.at(layer.window).all;
            const int64_t count = pieces.size(), items = m.kv_heads * count;
            const Scratch scratch(mine, group * n, dim);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < items; ++item) {
                const Piece& piece = pieces[item % count];
                const Stretch& stretch = *piece.stretch;
                const Cache& cache = batch.cache[stretch.cache];
                const auto place = [&](int64_t item) {
                    const Piece& piece = pieces[item % count];
                    const int64_t capacity = batch.cache[piece.stretch->cache].capacity;
                    return (item / count * capacity + piece.start) * dim;
                };
                const int64_t soon = std::min(item + threads, items - 1);
                const int64_t head = item / count, rows = stretch.tokens * group;
                const int64_t at = piece.at * m.heads + head * rows;
                attend({batch.ends + stretch.token, cache.first + piece.start, group, layer.window,
                        m.scaling},
                       queries + (head * n + stretch.token) * group * dim, rows,
                       cache.keys[index] + place(item), cache.values[index] + place(item),
                       piece.count,
                       batch.cache[pieces[soon % count].stretch->cache].keys[index] + place(soon),
                       dim, scratch, running + at, mixed + at * dim);
            }
            // Merge the results of the pieces.
#pragma omp for schedule(static)
            for (int64_t query = 0; query < n * m.heads; ++query) {
                const int64_t i = query / m.heads, head = query % m.heads;
                float maximum = NOTHING_YET, total = 0;
                const auto each = [&](auto&& use) {
                    for (const Piece& piece : pieces) {
                        const int64_t token = i - piece.stretch->token, tokens = piece.stretch->tokens;
                        if (token < 0 || token >= tokens) continue;
                        const int64_t at = (head / group * tokens + token) * group + head % group;
                        use(piece.at * m.heads + at);
                    }
                };
                each([&](int64_t at) { maximum = std::max(maximum, running[at].maximum); });
                std::fill(one, one + dim, 0.0f);
                each([&](int64_t at) {
                    const float weight = std::exp(running[at].maximum - maximum);
                    total += running[at].total * weight;
                    for (int64_t d = 0; d < dim; ++d) one[d] += weight * mixed[at * dim + d];
                });
                float* to = one + dim;
                for (int64_t d = 0; d < dim; ++d) to[d] = one[mixed_at(d)] / total;
                attended.put(i, head * dim, to, dim, whole);
            }
            // Output.
            linear(layer.output, attended, n, x, m.hidden, true);
#pragma omp barrier
            // Gate and up.
            for (int64_t i = 0; i < n; ++i) normalise(layer.post_norm, i, i);
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
        for (int64_t i = 0; i < batch.kept; ++i) normalise(m.norm, i, batch.keep[i]);
        linear(m.head, input, batch.kept, logits, m.head.out);
    }
}

// Attention of n queries to `all` keys, of which query i sees those before `visible + i` within `window`.
//   queries: [heads, n, dim]. keys, values: [kv_heads, all, dim], with heads `stride` numbers apart.
//   out: [heads, n, dim]. Or, to be merged with the results for other keys, part, of the same shape, and
//   lse: [heads, n], the natural log-sum-exp of the scores.
extern "C" void rapid_attend(const BFloat16* queries, const BFloat16* keys,
                             const BFloat16* values, int64_t heads, int64_t kv_heads, int64_t n,
                             int64_t visible, int64_t all, int64_t dim, int64_t stride,
                             int64_t window, float scaling, int64_t threads, BFloat16* out,
                             float* part, float* lse) {
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
        const auto place = [&](int64_t r) {
            return (head * group + r % group) * n + first + r / group;
        };
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t d = 0; d < dim; ++d)
                factors[r * dim + d] = factor(queries[place(r) * dim + d]);
        int64_t ends[BLOCK];
        for (int64_t i = 0; i < count; ++i) ends[i] = std::min(all, visible + first + i);
        const int64_t lowest = std::max<int64_t>(0, ends[0] - window);
        const int64_t at = head * stride + lowest * dim;
        attend({ends, lowest, group, window, scaling}, factors, rows, keys + at, values + at,
               ends[count - 1] - lowest, keys + at, dim, scratch, running, mixed);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t to = place(r);
            if (lse) lse[to] = running[r].maximum + std::log(running[r].total);
            for (int64_t d = 0; d < dim; ++d) {
                const float result = mixed[r * dim + mixed_at(d)] / running[r].total;
                if (lse)
                    part[to * dim + d] = result;
                else
                    out[to * dim + d] = rounded(result);
            }
        }
    }
}
