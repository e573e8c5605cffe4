#include "lt-batch-ops.h"

std::vector<llama_ubatch> lt_batch_ops::split(
        llama_batch_allocr & balloc,
        const std::bitset<LLAMA_MAX_SEQ> & apart,
        uint32_t n_ubatch,
        bool simple) {
    const uint32_t n_tokens = balloc.get_n_tokens();

    std::vector<bool> is_apart(n_tokens);

    for (uint32_t i = 0; i < n_tokens; ++i) {
        const auto & set = balloc.seq_set[i];

        is_apart[i] = (set & apart).any();

        if (is_apart[i] && (set & ~apart).any()) {
            return {};
        }
    }

    balloc.split_reset();

    std::vector<llama_ubatch> res;

    for (const bool kind : { true, false }) {
        if (simple) {
            std::vector<int32_t> idxs;

            for (uint32_t i = 0; i < n_tokens; ++i) {
                if (is_apart[i] == kind) {
                    idxs.push_back(i);

                    balloc.used[i] = true;
                    balloc.n_used++;
                }

                if (idxs.size() == n_ubatch || (i + 1 == n_tokens && !idxs.empty())) {
                    res.push_back(balloc.ubatch_add(idxs, idxs.size(), false));
                    idxs.clear();
                }
            }

            continue;
        }

        // note: split_equal() takes what has not been used
        for (uint32_t i = 0; i < n_tokens; ++i) {
            balloc.used[i] = is_apart[i] != kind;
        }

        while (true) {
            auto ubatch = balloc.split_equal(n_ubatch, true, 0);
            if (ubatch.n_tokens == 0) {
                break;
            }

            res.push_back(std::move(ubatch));
        }
    }

    return balloc.get_n_used() < n_tokens ? std::vector<llama_ubatch>() : res;
}
