#include "lt-prompts.h"

#include "lt-mask.h"

#include "llama-io.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

const lt_prompt * lt_prompts::current() const {
    return !prompts.empty() && prompts.back().end == LT_POS_END ? &prompts.back() : nullptr;
}

const lt_prompt * lt_prompts::find(llama_pos q) const {
    for (auto it = prompts.rbegin(); it != prompts.rend(); ++it) {
        if (it->begin < q && q < it->end) {
            return &*it;
        }
    }

    return nullptr;
}

void lt_prompts::open(llama_pos begin, llama_pos first) {
    assert(!current());

    prompts.push_back({ begin, LT_POS_END, first });
}

void lt_prompts::close(llama_pos end) {
    assert(current());

    prompts.back().end = end;
}

void lt_prompts::clear() {
    prompts.clear();
}

void lt_prompts::truncate(llama_pos q) {
    while (!prompts.empty() && prompts.back().begin >= q) {
        prompts.pop_back();
    }

    if (!prompts.empty() && prompts.back().end > q) {
        prompts.back().end = LT_POS_END;
    }
}

void lt_prompts::map(const pos_map & map_first, const pos_map & map_last) {
    std::vector<lt_prompt> res;

    for (const auto & prompt : prompts) {
        lt_prompt cur = {
            map_first(prompt.begin),
            prompt.end == LT_POS_END ? LT_POS_END : map_last(prompt.end),
            prompt.first == 0 ? 0 : map_first(prompt.first),
        };

        if (cur.begin >= 0 && cur.begin < cur.end) {
            cur.first = std::clamp(cur.first, 0, cur.begin);
            res.push_back(cur);
        }
    }

    prompts = std::move(res);

    normalize();
}

void lt_prompts::copy(const lt_prompts & src, llama_pos p0, llama_pos p1) {
    std::vector<lt_prompt> res;

    for (const auto & cur : prompts) {
        if (cur.end <= p0 || cur.begin >= p1) {
            res.push_back(cur);
        }
    }

    for (const auto & cur : src.prompts) {
        if (cur.end > p0 && cur.begin < p1) {
            res.push_back({ std::max(cur.begin, p0), cur.end, cur.first });
        }
    }

    prompts = std::move(res);

    normalize();
}

void lt_prompts::normalize() {
    std::stable_sort(prompts.begin(), prompts.end(), [](const auto & a, const auto & b) { return a.begin < b.begin; });

    for (size_t i = 0; i + 1 < prompts.size(); ++i) {
        prompts[i].end = std::min(prompts[i].end, prompts[i + 1].begin);
    }

    prompts.erase(std::remove_if(prompts.begin(), prompts.end(), [](const auto & cur) { return cur.begin >= cur.end; }), prompts.end());
}

void lt_prompts::write(llama_io_write_i & io) const {
    const uint32_t n = prompts.size();

    io.write(&n, sizeof(n));
    for (const auto & cur : prompts) {
        io.write(&cur, sizeof(cur));
    }
}

void lt_prompts::read(llama_io_read_i & io) {
    uint32_t n;
    io.read(&n, sizeof(n));

    // note: one by one, because a damaged n must not become an allocation
    std::vector<lt_prompt> res;
    for (uint32_t i = 0; i < n; ++i) {
        lt_prompt cur;
        io.read(&cur, sizeof(cur));

        const bool ok = cur.begin >= (res.empty() ? 0 : res.back().end) && cur.end > cur.begin && cur.first >= 0 && cur.first <= cur.begin;
        if (!ok) {
            throw std::runtime_error("the list of prompts in the state is damaged");
        }

        res.push_back(cur);
    }

    prompts = std::move(res);
}
