// The sequences of a forward pass: where their keys lie, who reads which, and how the reading is divided.

#pragma once

#include "attention.h"
#include "linear.h"

// ---------------------------------------------------------------- structs filled by compiled.py

extern "C" {

struct Cache {
    BFloat16 *const *keys, *const *values;  // of each layer: [kv_heads, capacity, dim]
    int64_t capacity;
    int64_t first;  // position of the first key
};

// Keys of a cache, from `start` to `end`, and the tokens that attend to them.
struct Stretch {
    int64_t cache, start, end;
    int64_t token, tokens;  // the first of the tokens, and their number
};

// New tokens of several sequences, one behind the other.
struct Batch {
    int64_t n, kept, stretches;
    const int64_t *ids, *owner, *ends;  // [n]: id, own cache, position and 1
    const int64_t* keep;                // [kept]: tokens for which logits are computed
    const float *cosine, *sine;         // [n, dim]
    const Cache* cache;
    const Stretch* stretch;
};

}  // extern "C"

namespace {

// A part of a stretch, which one thread reads for one KV head at a time.
struct Piece {
    const Stretch* stretch;
    int64_t start, count;  // keys
    int64_t at;            // tokens of the pieces before it
};

// The pieces of all stretches, for layers with one sliding window: about `most`, of equal size.
struct Pieces {
    std::vector<Piece> all;
    int64_t tokens = 0;  // of all pieces

    Pieces(const Batch& batch, int64_t window, int64_t most) {
        int64_t keys = 0;
        for (int64_t s = 0; s < batch.stretches; ++s)
            keys += batch.stretch[s].end - lowest(batch, batch.stretch[s], window);
        const int64_t size = ((keys + most - 1) / most + KEYS - 1) / KEYS * KEYS;
        for (int64_t s = 0; s < batch.stretches; ++s) {
            const Stretch& stretch = batch.stretch[s];
            for (int64_t at = lowest(batch, stretch, window); at < stretch.end; at += size) {
                all.push_back({&stretch, at, std::min(size, stretch.end - at), tokens});
                tokens += stretch.tokens;
            }
        }
    }

   private:
    // The first key that any token's window reaches.
    static int64_t lowest(const Batch& batch, const Stretch& stretch, int64_t window) {
        const int64_t* ends = batch.ends + stretch.token;
        const int64_t end = *std::min_element(ends, ends + stretch.tokens);
        return std::clamp(end - window - batch.cache[stretch.cache].first, stretch.start, stretch.end);
    }
};

}  // namespace
