#pragma once

// Attention with few queries on the CPU: of decoding, of drafts, of several sequences at a time.
//
// ggml's own kernel computes one query head after the other, so each head of a group reads the keys and values that the group
// shares again, and converts them again. This one reads each of them once: the memory's speed is the limit where a cache is long.

#include <stdbool.h>
#include <stddef.h>

struct ggml_compute_params;
struct ggml_tensor;

#ifdef __cplusplus
extern "C" {
#endif

// where GGML_OP_FLASH_ATTN_EXT has a word of its parameters that is not in use: LT_CPU_ATTENTION_ON asks for this kernel
#define LT_CPU_ATTENTION_PARAM 15
#define LT_CPU_ATTENTION_ON    0x6c74

// true: dst has been computed; false: it is left to ggml. To be called by all threads
bool lt_cpu_attention(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of the work buffer that it needs, 0 where it is left to ggml
size_t lt_cpu_attention_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}
#endif
