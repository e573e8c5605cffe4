#pragma once

#include "llama-batch.h"

#include <bitset>
#include <cstdint>
#include <vector>

// what llama_batch_allocr does not offer, as a friend of it
struct lt_batch_ops {
    // split the batch so that no ubatch has tokens of both kinds: those of the sequences in "apart" and those of the others
    // simple: as split_simple() does, else as split_equal()
    // returns nothing if a token belongs to sequences of both kinds, or if the batch can't be split this way
    static std::vector<llama_ubatch> split(
            llama_batch_allocr & balloc,
            const std::bitset<LLAMA_MAX_SEQ> & apart,
            uint32_t n_ubatch,
            bool simple);
};
