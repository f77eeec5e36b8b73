/* Paged attention on a CPU: one library without torch or Python in it, every instruction set of the processor family inside,
   chosen when it is loaded. The plan's tasks are taken from a queue by as many threads as the caller asks for. */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "call.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (vi){i, j, k, l})
#endif

typedef int32_t int32_alias __attribute__((may_alias));

#define MAX_DIM 1024
#define MAX_FEW_ROWS 16
#define FEW_TILE 48 /* keys of a tile that few rows read in place; 32 to 128 differ by 5 % */
#define KEY_TILE 128    /* keys of a tile that is laid out for many rows */
#define ROW_BLOCK 48 /* rows whose scores stay in the first-level cache */
#define TILE 16      /* rows of a tile register, and words of each */
#define TILE_PAIR 32 /* rows, and columns, of a product that tile registers hold: two tiles high and two wide */
#define LAID_KEYS 512   /* keys that are laid out for tile registers at a time: they stay in the second-level cache */
#define SCORED_KEYS 256 /* of those, keys that TILE_PAIR rows are scored with at a time */
#define MAX_SCALE_BYTES 16384 /* of the keys of a tile: 32 heads of int8, or 8 of int4 with four groups */
#define MAX_THREADS 255
#define MIN_ELEMENTS_WRITTEN 65536 /* fewer are not worth another thread */

/* What the threads of one call share. */
struct job {
    const struct attention_call *call;
    int64_t widest, bytes, num_units; /* query rows of the widest unit; bytes of one thread's memory */
    char *memory;
    float *partial_out, *partial_lse; /* of sequences that are split: [num_partial_tokens][num_q_heads][value_dim], and without the last */
    int has_tiles;
    atomic_llong next, next_thread;
};
struct write_job {
    const struct write_call *call;
    int64_t tokens_at_once;
    atomic_llong next;
};

#define JOIN(a, b) a##_##b
#define EXPAND(a, b) JOIN(a, b)
#define NAME(x) EXPAND(x, ISA)

#define ISA plain
#define TARGET
#define LANES 4
#define GEMM_ROWS 6
#define GEMM_VECTORS 2
#include "one_isa.h"

#if defined(__x86_64__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define GEMM_ROWS 6
#define GEMM_VECTORS 2
#include "one_isa.h"

#define ISA avx2int16
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INT16_DOT
#define LANES 8
#define GEMM_ROWS 6
#define GEMM_VECTORS 2
#include "one_isa.h"

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define LANES 16
#define GEMM_ROWS 6
#define GEMM_VECTORS 4
#include "one_isa.h"

#define ISA avx512vnni
#define TARGET __attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define INT16_DOT
#define LANES 16
#define GEMM_ROWS 6
#define GEMM_VECTORS 4
#include "one_isa.h"

#define ISA avx512bf16
#define TARGET __attribute__((target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define BF16_DOT
#define HAS_TILES
#define LANES 16
#define GEMM_ROWS 6
#define GEMM_VECTORS 4
#include "one_isa.h"
#endif

struct instruction_set {
    const char *name;
    /* INT8: with bf16 queries. MANY_ROWS: bf16, and a task that is not of few rows. Where a set does not serve, the next does. */
    enum { SERVES_ALL, SERVES_BF16, SERVES_INT8, SERVES_MANY_ROWS } serves;
    int (*is_supported)(void);
    void (*run)(void *);
    void (*merge)(void *);
    void (*write)(void *);
    int64_t (*scratch_bytes)(const struct attention_call *, int64_t rows, int has_tiles);
    int has_tiles;
};

static int always(void) { return 1; }
#if defined(__x86_64__)
/* Not all compilers' __builtin_cpu_supports knows F16C. Asked once: each call asks for its sets, and under a hypervisor
   CPUID takes microseconds. */
static int has_f16c(void) {
    static atomic_int answer; /* 0 before it is known, then 1 or 2 */
    if (!atomic_load(&answer)) {
        unsigned a, b, c = 0, d;
        atomic_store(&answer, __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C ? 2 : 1);
    }
    return atomic_load(&answer) == 2;
}
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static int has_avx512vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static int has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
/* Tile registers, for products of bf16 (AMX): the processor has them, and Linux gives them to the process that asks. */
static int has_amx(void) {
    static atomic_int answer; /* 0 before it is known, then 1 or 2 */
    if (!atomic_load(&answer)) {
        int is_there = 0;
#if defined(__linux__)
        const unsigned tiles_and_bf16 = 1u << 24 | 1u << 22;
        unsigned a, b, c, d;
        is_there = has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles_and_bf16) == tiles_and_bf16 &&
                   syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
#endif
        atomic_store(&answer, is_there ? 2 : 1);
    }
    return atomic_load(&answer) == 2;
}
#define scratch_bytes_amx scratch_bytes_avx512bf16
static void run_amx(void *job) {
    struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 4 * TILE, config.rows[i] = TILE;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
    run_avx512bf16(job);
    __asm__ volatile("tilerelease" : : : "memory");
}
#endif

/* `isa` attends, `plain` of the same vectors merges and writes. */
#define SET(name, isa, plain, serves, is_supported, has_tiles) \
    {name, serves, is_supported, run_##isa, merge_##plain, write_tokens_##plain, scratch_bytes_##isa, has_tiles}
static const struct instruction_set SETS[] = {
#if defined(__x86_64__)
    SET("amx", amx, avx512, SERVES_MANY_ROWS, has_amx, 1),
    SET("avx512vnni", avx512vnni, avx512, SERVES_INT8, has_avx512vnni, 0),
    SET("avx512bf16", avx512bf16, avx512, SERVES_BF16, has_avx512bf16, 0),
    SET("avx512", avx512, avx512, SERVES_ALL, has_avx512, 0),
    SET("avx2int16", avx2int16, avx2, SERVES_INT8, has_avx2, 0),
    SET("avx2", avx2, avx2, SERVES_ALL, has_avx2, 0),
#endif
#if defined(__aarch64__)
    SET("neon", plain, plain, SERVES_ALL, always, 0), /* every 64-bit Arm has it: the compiler uses it for the plain vectors */
#else
    SET("plain", plain, plain, SERVES_ALL, always, 0),
#endif
};
enum { NUM_SETS = sizeof(SETS) / sizeof(SETS[0]) };

/* The i-th instruction set, best first, or NULL; whether this processor has it, and whether it serves every call. */
const char *pagedkv_instruction_set(int i, int *is_supported, int *serves_all) {
    if (i < 0 || i >= NUM_SETS) return NULL;
    *is_supported = SETS[i].is_supported();
    *serves_all = SETS[i].serves == SERVES_ALL;
    return SETS[i].name;
}

/* For the caller to hold its own idea of the structures against. */
int64_t pagedkv_size_of_attention_call(void) { return sizeof(struct attention_call); }
int64_t pagedkv_size_of_write_call(void) { return sizeof(struct write_call); }

static int serves(const struct instruction_set *set, const struct attention_call *call, int64_t most_rows) {
    if (set->serves == SERVES_ALL) return 1;
    if (set->serves == SERVES_INT8 && call->format != FORMAT_INT8) return 0;
    if (set->serves == SERVES_MANY_ROWS && most_rows <= MAX_FEW_ROWS) return 0;
    return call->dtype == DTYPE_BF16 && set->is_supported();
}

/* Without an OpenMP runtime in the process, threads are made for the call: some 20 us each. */
struct errand {
    void (*body)(void *);
    void *argument;
};
static void *run_errand(void *errand) {
    ((struct errand *)errand)->body(((struct errand *)errand)->argument);
    return NULL;
}
static void run_on_threads(void (*body)(void *), void *argument, int num_threads, parallel_t parallel) {
    if (num_threads <= 1) {
        body(argument);
    } else if (parallel) {
        parallel(body, argument, (unsigned)num_threads, 0);
    } else {
        pthread_t others[MAX_THREADS];
        struct errand errand = {body, argument};
        int num_others = 0;
        while (num_others < num_threads - 1 && num_others < MAX_THREADS)
            if (pthread_create(&others[num_others], NULL, run_errand, &errand)) break; else num_others++;
        body(argument);
        for (int i = 0; i < num_others; i++) pthread_join(others[i], NULL);
    }
}

/* Runs a call with the i-th instruction set. Returns 0, or -1 if there was no memory for the threads to work in. */
int pagedkv_attention(const struct attention_call *call, int set, int num_threads, parallel_t parallel) {
    int64_t widest = 1, most_rows = 0, group = call->num_q_heads / call->num_kv_heads;
    for (int64_t i = 0; i < call->num_tasks; i++) {
        int64_t rows = (call->tasks[2 * call->num_tasks + i] - call->tasks[call->num_tasks + i]) * group;
        if (rows > most_rows) most_rows = rows;
        rows += rows > MAX_FEW_ROWS ? TILE_PAIR - 1 : 3; /* the most that they are padded by */
        if (i < call->num_decode_tasks) rows *= call->num_kv_heads;
        if (rows > widest) widest = rows;
    }
    while (!serves(&SETS[set], call, most_rows)) set++;
    int64_t num_units = call->num_decode_tasks + (call->num_tasks - call->num_decode_tasks) * call->num_kv_heads;
    if (num_threads > num_units) num_threads = num_units ? (int)num_units : 1;
    struct job job = {.call = call, .widest = widest, .bytes = SETS[set].scratch_bytes(call, widest, SETS[set].has_tiles), .num_units = num_units,
                      .has_tiles = SETS[set].has_tiles};
    int64_t num_partials = call->num_partial_tokens * call->num_q_heads;
    int64_t partial_bytes = (num_partials * (call->value.dim + 1) * (int64_t)sizeof(float) + 63) / 64 * 64;
    job.memory = aligned_alloc(64, (size_t)(job.bytes * num_threads + partial_bytes));
    if (!job.memory) return -1;
    job.partial_out = (float *)(job.memory + job.bytes * num_threads);
    job.partial_lse = job.partial_out + num_partials * call->value.dim;
    run_on_threads(SETS[set].run, &job, num_threads, parallel);
    if (call->num_merges) {
        atomic_store(&job.next, 0);
        run_on_threads(SETS[set].merge, &job, num_threads, parallel);
    }
    free(job.memory);
    return 0;
}

void pagedkv_write(const struct write_call *call, int set, int num_threads, parallel_t parallel) {
    int64_t elements = call->num_kv_heads * (call->cache[0].dim + (call->source[1] ? call->cache[1].dim : 0));
    int64_t at_once = MIN_ELEMENTS_WRITTEN / elements + 1;
    struct write_job job = {.call = call, .tokens_at_once = at_once};
    if (num_threads > call->num_tokens / at_once) num_threads = (int)(call->num_tokens / at_once);
    run_on_threads(SETS[set].write, &job, num_threads, parallel);
}

#include "known_calls.h"
