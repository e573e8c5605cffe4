#pragma once

#include "llama.h"

#include <functional>
#include <vector>

class llama_io_write_i;
class llama_io_read_i;

// a prompt that was read with full attention: the positions [begin, end)
struct lt_prompt {
    llama_pos begin;
    llama_pos end;   // LT_POS_END: it is being read
    llama_pos first; // behind the sinks, the first position that its tokens see
};

// the prompts of a sequence, ascending. they say what the tokens that follow a position see, also when the sequence is rolled back
class lt_prompts {
public:
    // the prompt that is being read, null if there is none
    const lt_prompt * current() const;

    // the prompt that a token at position q would go on with after a rollback to q, null if there is none
    const lt_prompt * find(llama_pos q) const;

    const std::vector<lt_prompt> & all() const { return prompts; }

    void open(llama_pos begin, llama_pos first);
    void close(llama_pos end);

    void clear();

    // positions from q on are removed. a prompt that loses its end is being read again
    void truncate(llama_pos q);

    // positions change. map_first gives the new position of the first one that is there from p on, map_last that of the
    // last one before p plus one, both -1 if there is none
    using pos_map = std::function<llama_pos(llama_pos)>;

    void map(const pos_map & map_first, const pos_map & map_last);

    // take over what another sequence says of the positions [p0, p1)
    void copy(const lt_prompts & src, llama_pos p0, llama_pos p1);

    // throws std::runtime_error if what is read makes no sense
    void write(llama_io_write_i & io) const;
    void read (llama_io_read_i  & io);

private:
    std::vector<lt_prompt> prompts;

    // ascending and without overlaps
    void normalize();
};
