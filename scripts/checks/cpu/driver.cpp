// Runs models for tests that run elsewhere: on another processor (under qemu), or on one backend library of several.
//
//     driver BACKEND_LIBRARY [unsupported]    with "unsupported" also where the library says that this processor can't run it
//     driver BACKEND_LIBRARY score            prints the library's score on this processor, 0 if it can't run it
//
// Takes a command a line on stdin and answers each on stdout, with a line "ok ..." or "error ...". tests/support/driver.py is the
// other end:
//
//     features                            -> ok WHAT THE BACKEND HAS BEEN COMPILED FOR
//     load PATH                           -> ok N_VOCAB N_LAYER N_SWA
//     spec TEXT                           -> ok; empty: the file's own
//     context KEY=VALUE ...               -> ok
//     decode N [ID POS LOGITS SEQ]*N      -> ok ROWS, and behind the line ROWS * N_VOCAB native floats; error CODE
//     in_prompt SEQ | kv_bytes PART       -> ok VALUE
//     prompt_begin SEQ N_TOKENS           -> ok

#include "ggml-backend.h"
#include "llama.h"
#include "lt.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

static std::string last_error; // of the library's log

static void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        last_error = text;
        last_error.erase(last_error.find_last_not_of('\n') + 1);
    }
}

// What ggml_backend_load() does, but also with a library that this processor can't run without help.
static void load_backend(void * library) {
    auto init = (ggml_backend_reg_t (*)()) dlsym(library, "ggml_backend_init");
    if (!init) {
        throw std::runtime_error("no backend: it has no ggml_backend_init");
    }
    ggml_backend_register(init());
}

static std::string features() {
    std::string text;
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
    auto get = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    for (ggml_backend_feature * feature = get(reg); feature->name; feature++) {
        text += std::string(" ") + feature->name + "=" + feature->value;
    }
    return text;
}

struct session {
    llama_model *   model   = nullptr;
    llama_context * context = nullptr;
    int             n_vocab = 0;

    std::string answer(const std::string & command, std::istringstream & arguments, std::vector<float> & rows);

    void load(const std::string & path);
    void make_context(std::istringstream & arguments);
    void decode(std::istringstream & arguments, std::vector<float> & rows);
};

void session::load(const std::string & path) {
    llama_free(context);
    llama_model_free(model);
    context = nullptr;
    model   = llama_model_load_from_file(path.c_str(), llama_model_default_params());
    if (!model) {
        throw std::runtime_error(path + " was not loaded: " + last_error);
    }
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
}

void session::make_context(std::istringstream & arguments) {
    std::map<std::string, int> settings;
    for (std::string word; arguments >> word;) {
        const size_t equals = word.find('=');
        settings[word.substr(0, equals)] = std::stoi(word.substr(equals + 1));
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = settings.at("n_ctx");
    params.n_batch         = settings.at("n_batch");
    params.n_ubatch        = settings.at("n_ubatch");
    params.n_threads       = settings.at("n_threads");
    params.n_threads_batch = params.n_threads;
    params.type_k          = (ggml_type) settings.at("type_k");
    params.type_v          = (ggml_type) settings.at("type_v");
    params.flash_attn_type = (llama_flash_attn_type) settings.at("flash_attn_type");
    llama_free(context);
    context = llama_init_from_model(model, params);
    if (!context) {
        throw std::runtime_error("no context: " + last_error);
    }
}

void session::decode(std::istringstream & arguments, std::vector<float> & rows) {
    int n_tokens = 0;
    arguments >> n_tokens;
    llama_batch batch = llama_batch_init(n_tokens, 0, 1);
    for (int i = 0; i < n_tokens; i++) {
        int logits = 0;
        batch.n_seq_id[i] = 1;
        arguments >> batch.token[i] >> batch.pos[i] >> logits >> batch.seq_id[i][0];
        batch.logits[i] = logits;
    }
    batch.n_tokens = n_tokens;
    const int code = arguments ? llama_decode(context, batch) : -99;
    for (int i = 0; i < n_tokens && code == 0; i++) {
        if (batch.logits[i]) {
            const float * row = llama_get_logits_ith(context, i);
            rows.insert(rows.end(), row, row + n_vocab);
        }
    }
    llama_batch_free(batch);
    if (code != 0) {
        throw std::runtime_error(std::to_string(code) + " " + last_error);
    }
}

std::string session::answer(const std::string & command, std::istringstream & arguments, std::vector<float> & rows) {
    std::ostringstream out;
    char err[512] = "";
    int seq = 0, n = 0;
    std::string text;
    if (command == "features") {
        out << features();
    } else if (command == "load") {
        std::getline(arguments >> std::ws, text);
        load(text);
        out << " " << n_vocab << " " << llama_model_n_layer(model) << " " << llama_model_n_swa(model);
    } else if (command == "spec") {
        arguments >> text;
        if (!lt_model_set_spec(model, text.empty() ? nullptr : text.c_str(), err, sizeof(err))) {
            throw std::runtime_error(err);
        }
    } else if (command == "context") {
        make_context(arguments);
    } else if (command == "decode") {
        decode(arguments, rows);
        out << " " << rows.size() / n_vocab;
    } else if (command == "in_prompt" && arguments >> seq) {
        out << " " << lt_seq_in_prompt(context, seq);
    } else if (command == "kv_bytes" && arguments >> n) {
        out << " " << lt_kv_bytes(context, (lt_kv_part) n);
    } else if (command == "prompt_begin" && arguments >> seq >> n) {
        if (!lt_prompt_begin(context, seq, n, err, sizeof(err))) {
            throw std::runtime_error(err);
        }
    } else {
        throw std::runtime_error("no such command: " + command);
    }
    return out.str();
}

static int serve() {
    session session;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream arguments(line);
        std::string command;
        arguments >> command;
        std::vector<float> rows;
        try {
            std::cout << "ok" << session.answer(command, arguments, rows) << "\n";
            std::cout.write((const char *) rows.data(), rows.size() * sizeof(float));
        } catch (const std::exception & error) {
            std::cout << "error " << error.what() << "\n";
        }
        std::cout.flush();
    }
    return 0;
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 2 ? argv[2] : "";
    void * library = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) {
        fprintf(stderr, "driver: error: %s\n", argc > 1 ? dlerror() : "which backend library?");
        return 2;
    }
    auto get_score = (int (*)()) dlsym(library, "ggml_backend_score");
    const int score = get_score ? get_score() : 1;
    if (mode == "score") {
        printf("%d\n", score);
        return 0;
    }
    if (score == 0 && mode != "unsupported") {
        fprintf(stderr, "driver: error: this processor can't run %s\n", argv[1]);
        return 3;
    }
    llama_log_set(keep_errors, nullptr);
    try {
        load_backend(library);
    } catch (const std::exception & error) {
        fprintf(stderr, "driver: error: %s: %s\n", argv[1], error.what());
        return 2;
    }
    return serve();
}
