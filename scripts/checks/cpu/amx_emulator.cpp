// Lets a program that uses AMX run on a processor that has AVX-512 but no AMX: LD_PRELOAD=amx_emulator.so.
//
// The tile instructions are illegal there; the handler of SIGILL does what they would do, those that ggml uses, as Intel's manual
// has it (Software Developer's Manual, volume 2, and volume 1, chapter 18). What the processor refuses ends the program with a line.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int N_TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64;

struct tile {
    int    rows, bytes; // bytes a row; 0: not configured
    int8_t data[MAX_ROWS][MAX_BYTES];
};

thread_local tile tiles[N_TILES];

[[noreturn]] void refuse(const char * format, ...) {
    char line[200];
    va_list arguments;
    va_start(arguments, format);
    int n = snprintf(line, sizeof(line), "amx_emulator: ");
    n += vsnprintf(line + n, sizeof(line) - n - 1, format, arguments);
    va_end(arguments);
    line[n++] = '\n';
    (void) !write(2, line, n);
    abort();
}

// An instruction of the encoding VEX.128.0F38.W0
struct instruction {
    int             opcode, prefix; // 0: none, 1: 66, 2: F3, 3: F2
    int             reg, rm, vvvv;
    bool            memory;
    uint8_t       * base;   // of the operand in memory, with displacement
    int64_t         stride; // what its index register says
    const uint8_t * next;   // the instruction behind it
};

int64_t general_register(const ucontext_t * context, int number) {
    static const int names[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[names[number]];
}

bool decode(const ucontext_t * context, instruction & in) {
    const uint8_t * p = (const uint8_t *) context->uc_mcontext.gregs[REG_RIP];
    if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) {
        return false;
    }
    const int x = ~p[1] >> 6 & 1, b = ~p[1] >> 5 & 1;
    in.opcode = p[3];
    in.prefix = p[2] & 3;
    in.vvvv   = ~p[2] >> 3 & 15;
    const int modrm = p[4], mod = modrm >> 6;
    in.reg    = modrm >> 3 & 7;
    in.rm     = modrm & 7;
    in.memory = mod != 3;
    in.stride = 0;
    p += 5;
    if (in.memory) {
        int base = in.rm | b << 3;
        if (in.rm == 4) {
            const int sib = *p++, index = (sib >> 3 & 7) | x << 3;
            base = (sib & 7) | b << 3;
            in.stride = index == 4 ? 0 : general_register(context, index) << (sib >> 6);
        }
        int64_t address = 0;
        int32_t displacement = 0;
        if (mod == 1) {
            displacement = (int8_t) *p++;
        } else if (mod == 2 || (base & 7) == 5) {
            memcpy(&displacement, p, 4);
            p += 4;
        }
        if (mod != 0 || (base & 7) != 5) {
            address = general_register(context, base);
        } else if (in.rm != 4) {
            address = (int64_t) p; // relative to the next instruction
        }
        in.base = (uint8_t *) (address + displacement);
    }
    in.next = p;
    return true;
}

// LDTILECFG
void configure(const uint8_t * config) {
    uint16_t colsb[16];
    const uint8_t * rows = config + 48;
    memcpy(colsb, config + 16, sizeof(colsb));
    if (config[0] != 1) {
        refuse("ldtilecfg, general protection fault: palette %d", config[0]);
    }
    for (int i = 2; i < 16; i++) {
        if (config[i]) {
            refuse("ldtilecfg, general protection fault: reserved byte %d is %d", i, config[i]);
        }
    }
    for (int i = 0; i < 16; i++) {
        const int max_rows = i < N_TILES ? MAX_ROWS : 0, max_bytes = i < N_TILES ? MAX_BYTES : 0;
        if (rows[i] > max_rows || colsb[i] > max_bytes || !rows[i] != !colsb[i]) {
            refuse("ldtilecfg, general protection fault: tile %d of %d rows of %d bytes", i, rows[i], colsb[i]);
        }
    }
    memset(tiles, 0, sizeof(tiles));
    for (int i = 0; i < N_TILES; i++) {
        tiles[i].rows  = rows[i];
        tiles[i].bytes = colsb[i];
    }
}

tile & configured(int number) {
    if (!tiles[number].rows) {
        refuse("invalid opcode: tile %d isn't configured", number);
    }
    return tiles[number];
}

// TDPBSSD
void multiply(tile & c, const tile & a, const tile & b) {
    if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows) {
        refuse("tdpbssd, invalid opcode: %d x %d by %d x %d to %d x %d", a.rows, a.bytes, b.rows, b.bytes, c.rows, c.bytes);
    }
    // each byte of b on its own, as wide as the sums, which is what a compiler makes vectors of
    int32_t wide[MAX_ROWS][4][MAX_BYTES / 4];
    for (int k = 0; k < b.rows; k++) {
        for (int i = 0; i < 4; i++) {
            for (int n = 0; n < MAX_BYTES / 4; n++) {
                wide[k][i][n] = b.data[k][4 * n + i];
            }
        }
    }
    for (int m = 0; m < c.rows; m++) {
        int32_t sums[MAX_BYTES / 4];
        memcpy(sums, c.data[m], sizeof(sums));
        for (int k = 0; k < b.rows; k++) {
            for (int i = 0; i < 4; i++) {
                for (int n = 0; n < MAX_BYTES / 4; n++) {
                    sums[n] += a.data[m][4 * k + i] * wide[k][i][n];
                }
            }
        }
        memcpy(c.data[m], sums, c.bytes);
    }
}

bool execute(const instruction & in) {
    if (in.opcode == 0x49 && in.prefix == 0 && in.memory) {
        configure(in.base);
    } else if (in.opcode == 0x49 && in.prefix == 3 && !in.memory) { // TILEZERO
        tile & t = configured(in.reg);
        memset(t.data, 0, sizeof(t.data));
    } else if (in.opcode == 0x4b && in.prefix == 3 && in.memory) { // TILELOADD
        tile & t = configured(in.reg);
        memset(t.data, 0, sizeof(t.data));
        for (int row = 0; row < t.rows; row++) {
            memcpy(t.data[row], in.base + row * in.stride, t.bytes);
        }
    } else if (in.opcode == 0x4b && in.prefix == 2 && in.memory) { // TILESTORED
        const tile & t = configured(in.reg);
        for (int row = 0; row < t.rows; row++) {
            memcpy(in.base + row * in.stride, t.data[row], t.bytes);
        }
    } else if (in.opcode == 0x5e && in.prefix == 3 && !in.memory) {
        multiply(configured(in.reg), configured(in.rm), configured(in.vvvv));
    } else {
        return false;
    }
    return true;
}

void on_illegal_instruction(int, siginfo_t *, void * raw) {
    ucontext_t * context = (ucontext_t *) raw;
    instruction in = {};
    if (!decode(context, in) || !execute(in)) {
        const uint8_t * p = (const uint8_t *) context->uc_mcontext.gregs[REG_RIP];
        refuse("not emulated: %02x %02x %02x %02x %02x", p[0], p[1], p[2], p[3], p[4]);
    }
    do { // those behind it, too: each signal costs microseconds
        context->uc_mcontext.gregs[REG_RIP] = (greg_t) in.next;
    } while (decode(context, in) && execute(in));
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags     = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

} // namespace

// ggml asks the kernel for the tiles' state, and a kernel on such a processor has none.
extern "C" long syscall(long number, ...) noexcept {
    constexpr long REQUEST_PERMISSION = 0x1023; // ARCH_REQ_XCOMP_PERM
    static const auto real = (long (*)(long, ...)) dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (long & argument : a) {
        argument = va_arg(list, long);
    }
    va_end(list);
    if (number == SYS_arch_prctl && a[0] == REQUEST_PERMISSION) {
        return 0;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
