#pragma once

#include "llama-graph.h"

#include <vector>

class lt_kv_cache_context;

// where a graph can be cut between layers
//
// the nodes of a graph are computed in their order. if all that the later ones use of what was computed from the tokens is one
// tensor with a row of n_embd values for each token, the graph can be cut there, whatever the model. what depends on positions,
// masks and weights alone is computed again on either side
struct lt_cut {
    int i_node = -1; // the last node before the cut, -1: there is none

    ggml_tensor * t = nullptr; // what the later nodes use
};

// the cut before each layer, [n_layer_all]. there is none before the first layer
std::vector<lt_cut> lt_find_cuts(const llm_graph_params & params, const lt_kv_cache_context & mctx);

// called with each graph that a model has built. while a prompt is read layer by layer, the nodes of the current layers are left
// in it, which take their input from the rows that the layers before have left, and leave theirs in the same place
// returns null, with a line in the log, if the graph can't be cut as one before could
ggml_cgraph * lt_cut_graph(const llm_graph_params & params);
