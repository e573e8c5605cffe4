#include "lt.h"

#include "ggml.h"

#include <dlfcn.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#include <unwind.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>

#define LT_N_FRAMES  6    // of ours that are shown
#define LT_N_WALKED  64   // that are looked at
#define LT_TEXT_SIZE 4096 // bytes of a text, longer ones are cut

struct lt_signal {
    int          number;
    const char * name;

    struct sigaction previous;
};

static lt_signal lt_signals[] = {
    { SIGSEGV, "SIGSEGV (invalid memory access)", {} },
    { SIGBUS,  "SIGBUS (a mapped file has become shorter)", {} },
    { SIGILL,  "SIGILL (an instruction that this CPU doesn't have)", {} },
    { SIGFPE,  "SIGFPE (division by zero)", {} },
    { SIGABRT, "SIGABRT (a check failed)",  {} },
};

// two buffers: a crash reads the one that was published last, while another thread may be writing the next one
struct lt_text {
    char buf[2][LT_TEXT_SIZE] = {};

    std::atomic<const char *> current { buf[0] };

    void set(const char * text) {
        char * next = current == buf[0] ? buf[1] : buf[0];
        snprintf(next, LT_TEXT_SIZE, "%s", text ? text : "");
        current = next;
    }
};

static std::mutex       lt_mutex;
static lt_text          lt_step;
static lt_text          lt_about;
static lt_text          lt_assertion; // what ggml_abort() says
static std::atomic<int> lt_fd        { -1 };
static bool             lt_installed = false;
static std::atomic_flag lt_crashed   = ATOMIC_FLAG_INIT;

//
// from here on in the handler, where only async-signal-safe functions may be called
//

static void lt_write(const char * text, size_t size) {
    // note: nothing can be done about a failure
    (void) !write(lt_fd, text, size);
}

static void lt_write(const char * text) {
    lt_write(text, strlen(text));
}

static bool lt_is_digit(char c) {
    return c >= '0' && c <= '9';
}

// The name of a function without its arguments: _ZN11lt_kv_cache4initEi is lt_kv_cache::init.
// note: abi::__cxa_demangle() allocates
static void lt_write_function(const char * symbol) {
    const char * p = symbol;
    if (strncmp(p, "_Z", 2) == 0) {
        while (*p && !lt_is_digit(*p)) {
            p++;
        }
    }
    if (p == symbol || !*p) {
        lt_write(symbol);
        return;
    }

    const bool   nested = symbol[2] == 'N';
    const char * end    = symbol + strlen(symbol);
    for (bool first = true; lt_is_digit(*p) && (first || nested); first = false) {
        size_t size = 0;
        while (lt_is_digit(*p)) {
            size = 10*size + (*p++ - '0');
        }
        if (size > size_t(end - p)) {
            break;
        }
        lt_write(first ? "" : "::");
        lt_write(p, size);
        p += size;
    }
}

static const char * lt_file_name(const Dl_info & info) {
    const char * slash = info.dli_fname ? strrchr(info.dli_fname, '/') : nullptr;

    return slash ? slash + 1 : info.dli_fname ? info.dli_fname : "?";
}

static bool lt_is_ours(const Dl_info & info) {
    const char * name = lt_file_name(info);

    return strncmp(name, "libggml", 7) == 0 || strncmp(name, "libllama", 8) == 0 || strncmp(name, "libmtmd", 7) == 0;
}

static void lt_write_frame(const Dl_info & info, uintptr_t ip) {
    lt_write("  in ");
    lt_write(lt_file_name(info));
    if (info.dli_sname) {
        lt_write(": ");
        lt_write_function(info.dli_sname);
    } else {
        // what addr2line takes
        char offset[2 + 2*sizeof(uintptr_t)];
        int  n = 0;
        for (uintptr_t rest = ip - (uintptr_t) info.dli_fbase; rest || n == 0; rest /= 16) {
            offset[n++] = "0123456789abcdef"[rest % 16];
        }
        lt_write(": +0x");
        while (n > 0) {
            lt_write(&offset[--n], 1);
        }
    }
    lt_write("\n");
}

// the instruction that the signal interrupted, 0 where we don't know how to ask
static uintptr_t lt_interrupted(const void * context) {
    const auto * uc = static_cast<const ucontext_t *>(context);
#if defined(__APPLE__) && defined(__x86_64__)
    return uc->uc_mcontext->__ss.__rip;
#elif defined(__APPLE__) && defined(__aarch64__)
    return (uintptr_t) __darwin_arm_thread_state64_get_pc(uc->uc_mcontext->__ss);
#elif defined(__linux__) && defined(__x86_64__)
    return uc->uc_mcontext.gregs[REG_RIP];
#elif defined(__linux__) && defined(__aarch64__)
    return uc->uc_mcontext.pc;
#else
    (void) uc;
    return 0;
#endif
}

struct lt_walk {
    uintptr_t interrupted;

    bool is_inside = false; // in what the signal interrupted
    int  n_walked  = 0;
    int  n_written = 0;
};

static _Unwind_Reason_Code lt_visit(_Unwind_Context * context, void * data) {
    auto & walk = *static_cast<lt_walk *>(data);

    // note: GCC's unwinder marks the interrupted frame, others mark the one that the kernel made for the handler
    int  is_marked = 0;
    auto ip        = (uintptr_t) _Unwind_GetIPInfo(context, &is_marked);

    const bool is_first = !walk.is_inside && (walk.interrupted ? ip == walk.interrupted : is_marked != 0);
    walk.is_inside = walk.is_inside || is_first;
    if (!walk.is_inside) {
        return _URC_NO_REASON;
    }
    if (!is_first) {
        ip--; // a return address may be behind the end of the function that calls
    }

    Dl_info info = {};
    if (dladdr((void *) ip, &info) && lt_is_ours(info) && !(info.dli_sname && strcmp(info.dli_sname, "ggml_abort") == 0)) {
        lt_write_frame(info, ip);
        walk.n_written++;
    }

    return ++walk.n_walked < LT_N_WALKED && walk.n_written < LT_N_FRAMES ? _URC_NO_REASON : _URC_END_OF_STACK;
}

static void lt_on_signal(int number, siginfo_t *, void * context) {
    // all threads of a computation may crash at the same time: the first one tells, and ends the process
    while (lt_crashed.test_and_set()) {
        pause();
    }

    const lt_signal * found = lt_signals;
    for (auto & entry : lt_signals) {
        if (entry.number == number) {
            found = &entry;
        }
    }

    if (isatty(lt_fd)) {
        lt_write("\x1b[?25h"); // a progress bar may have hidden the cursor
    }
    lt_write("\ncrash: ");
    lt_write(found->name);
    lt_write(" in native code, while ");
    lt_write(lt_step.current);
    lt_write("\n");
    lt_write(lt_about.current);
    lt_write("\n");
    if (*lt_assertion.current) {
        lt_write("  ");
        lt_write(lt_assertion.current);
        lt_write("\n");
    }

    // note: last, because on a destroyed stack it may crash
    lt_walk walk { lt_interrupted(context) };
    _Unwind_Backtrace(lt_visit, &walk);
    Dl_info info = {};
    if (walk.n_written == 0 && dladdr((void *) walk.interrupted, &info)) {
        lt_write_frame(info, walk.interrupted);
    }

    // note: a computation's other threads crash with this one, or some moments later where cores are few. they come here and stay
    //       as long as this handler is the one, while the next one, such as Python's, may end the process where a second thread comes
    const timespec for_others = { 0, 200*1000*1000 };
    nanosleep(&for_others, nullptr);

    // to the handler that was there before, as soon as this one returns.
    // note: not earlier, else the other threads' crashes would go to it while this one is still writing
    for (auto & entry : lt_signals) {
        sigaction(entry.number, &entry.previous, nullptr);
    }
    raise(number);
}

static void lt_on_abort(const char * message) {
    lt_assertion.set(message);

    // ggml_init() aborts where it gets no memory: no fault of the program, so a line and a status as for any other error.
    // note: _exit(), as other threads may be computing; what a command has not finished the next one removes, as after a kill
    if (strstr(message, "GGML_ASSERT(ctx->mem_buffer != NULL)") && !lt_crashed.test_and_set()) {
        if (isatty(lt_fd)) {
            lt_write("\x1b[?25h");
        }
        lt_write("error: this process can get no more memory (ggml needs some for tensors), while ");
        lt_write(lt_step.current);
        lt_write("\n");
        _exit(1);
    }
}

void lt_crash_report(int fd, const char * about) {
    std::lock_guard<std::mutex> lock(lt_mutex);

    lt_fd = fd;
    lt_about.set(about);
    if (lt_installed) {
        return;
    }
    lt_installed = true;

    ggml_set_abort_callback(lt_on_abort);

    struct sigaction action = {};
    action.sa_sigaction = lt_on_signal;
    action.sa_flags     = SA_SIGINFO | SA_ONSTACK; // on the stack for signals: that of the thread may be full
    sigemptyset(&action.sa_mask);
    for (auto & entry : lt_signals) {
        sigaddset(&action.sa_mask, entry.number); // a crash of the handler itself then ends the process at once
    }
    for (auto & entry : lt_signals) {
        sigaction(entry.number, &action, &entry.previous);
    }
}

void lt_crash_step(const char * step) {
    std::lock_guard<std::mutex> lock(lt_mutex);

    lt_step.set(step);
}
