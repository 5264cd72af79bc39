// Instructions that C++ has no words for: all PTX of the kernels, and nothing else. Every other .cu file is compiled behind this text;
// tests/emulator puts C++ of its own in its place, and runs the rest on a CPU.
// No header is included, so NVRTC needs none. Compile with -fmad=false: the quantiser is exact only if every product is
// rounded on its own, as PyTorch does.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 FULL = 0xffffffffu;

// Bits of the lanes before this one. Volatile, so that it is kept in a register rather than made anew in every step.
__device__ __forceinline__ u32 lanes_before() {
    u32 mask;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
    return mask;
}

// Bits of this lane and of those behind it.
__device__ __forceinline__ u32 lanes_behind() {
    u32 mask;
    asm volatile("mov.u32 %0, %%lanemask_ge;" : "=r"(mask));
    return mask;
}

// v, which is not known before: what is made of it is not made ahead of a loop, and kept in registers that are needed.
__device__ __forceinline__ int made_now(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

// ---- memory ----

// Shared memory by its own 32-bit addresses: through pointers, the compiler computes the window's base in every step.
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ void store_shared(u32 address, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
__device__ __forceinline__ u32 load_shared_u8(u32 address) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ void store_shared_u8(u32 address, u32 v) { asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
__device__ __forceinline__ u32 load_shared_u16(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ void store_shared_u16(u32 address, u32 v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"((u16)v) : "memory");
}
// CPL words of a lane, at an address that is a multiple of 4*CPL (of 4 where CPL is 1 or 3).
template <int CPL>
__device__ __forceinline__ void load_shared_words(u32 address, u32 (&v)[CPL]) {
    if constexpr (CPL == 4) asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
    else if constexpr (CPL == 2) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address));
    else {
#pragma unroll
        for (int k = 0; k < CPL; ++k) v[k] = load_shared(address + 4 * k);
    }
}
template <int CPL>
__device__ __forceinline__ void store_shared_words(u32 address, const u32 (&v)[CPL]) {
    if constexpr (CPL == 4) asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    else if constexpr (CPL == 2) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v[0]), "r"(v[1]) : "memory");
    else {
#pragma unroll
        for (int k = 0; k < CPL; ++k) store_shared(address + 4 * k, v[k]);
    }
}
// Of tables that do not change: the compiler may move these.
__device__ __forceinline__ u32 table_word(u32 address) {
    u32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 table_words(u32 address) {
    uint2 v;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

// WIDTH bytes (2, 4, 8 or 16; anything else does nothing) of global memory, said to be that: the compiler cannot tell from a table of addresses. They
// are read once, and would drive what registers have no room for out of the first-level cache.
template <int WIDTH, int COUNT>
__device__ __forceinline__ void load_global(const u8 *p, u32 (&packed)[COUNT]) {
    if constexpr (WIDTH == 16) asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(packed[0]), "=r"(packed[1]), "=r"(packed[2]), "=r"(packed[3]) : "l"(p));
    else if constexpr (WIDTH == 8) asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(packed[0]), "=r"(packed[1]) : "l"(p));
    else if constexpr (WIDTH == 4) asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(packed[0]) : "l"(p));
    else if constexpr (WIDTH == 2) asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=r"(packed[0]) : "l"(p));
}
template <int WIDTH, int COUNT>
__device__ __forceinline__ void store_global(u8 *p, const u32 (&packed)[COUNT]) {
    if constexpr (WIDTH == 16) asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3]) : "memory");
    else if constexpr (WIDTH == 8) asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(packed[0]), "r"(packed[1]) : "memory");
    else if constexpr (WIDTH == 4) asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(packed[0]) : "memory");
    else if constexpr (WIDTH == 2) asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "r"(packed[0]) : "memory");
}
// Two 16-bit values at an address that may be odd in words.
__device__ __forceinline__ void store_pair(u64 address, u32 pair) {
    if ((address & 3) == 0) {
        asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(pair) : "memory");
    } else {
        asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"((u16)pair) : "memory");
        asm volatile("st.global.u16 [%0], %1;" ::"l"(address + 2), "h"((u16)(pair >> 16)) : "memory");
    }
}

// 16 bytes from global memory into shared memory, behind the thread's back, until await_copies(); zeros where there are none.
__device__ __forceinline__ void copy_behind(u32 address, u64 from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Words through which blocks talk to each other.
__device__ __forceinline__ u32 peek(const u32 *p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void poke(u32 *p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// The same, to be seen only after what this thread wrote before. (A fence would empty the first-level cache too.)
__device__ __forceinline__ void poke_behind(u32 *p, u32 v) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }

// ---- numbers ----

// Rounded to nearest even; the result's bits. Of pairs the first is in the low half: one instruction.
__device__ __forceinline__ u32 half_bits(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ u32 half_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// Halves plus zero: denormals and negative zeros become zeros.
__device__ __forceinline__ u32 flushed_pair(u32 pair) {
    asm("fma.rn.ftz.f16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(0x3c003c00u), "r"(0u));
    return pair;
}
__device__ __forceinline__ float from_half(u32 word) {
    float f;
    u16 h = (u16)word;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ u32 bfloat_bits(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The larger one, or NaN if either is that.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
// min(max(v, 0), most), for most >= 0.
__device__ __forceinline__ int clamp_to(int v, int most) {
#if __CUDA_ARCH__ >= 900
    int clamped;
    asm("min.s32.relu %0, %1, %2;" : "=r"(clamped) : "r"(v), "r"(most));
    return clamped;
#else
    return max(min(v, most), 0);
#endif
}
// The same of both halves of v + addend, signed.
__device__ __forceinline__ u32 clamp_halves(u32 v, u32 addend, u32 most) {
#if __CUDA_ARCH__ >= 900
    u32 clamped;
    asm("{ .reg .b32 sum;\n\tadd.s16x2 sum, %1, %2;\n\tmin.s16x2.relu %0, sum, %3; }" : "=r"(clamped) : "r"(v), "r"(addend), "r"(most));
    return clamped;
#else
    return (u32)clamp_to((short)(v + addend), (int)(most & 0xffff)) | (u32)clamp_to((short)((v >> 16) + (addend >> 16)), (int)(most >> 16)) << 16;
#endif
}
// One instruction on the halves of two words.
#define KVF_HALVES(NAME, INSTRUCTION)                                                                                       \
    __device__ __forceinline__ u32 NAME(u32 a, u32 b) {                                                                     \
        u32 v;                                                                                                              \
        asm(INSTRUCTION " %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));                                                         \
        return v;                                                                                                           \
    }

// Smallest and largest of unsigned halves; smallest of signed ones; and of unsigned ones to which -1 is added first.
#if __CUDA_ARCH__ >= 900
KVF_HALVES(min_halves, "min.u16x2")
KVF_HALVES(max_halves, "max.u16x2")
KVF_HALVES(min_signed_halves, "min.s16x2")
__device__ __forceinline__ u32 min_halves_before(u32 a, u32 b) {
    u32 v;
    asm("{ .reg .b32 before;\n\tadd.u16x2 before, %1, %3;\n\tmin.u16x2 %0, before, %2; }" : "=r"(v) : "r"(a), "r"(b), "r"(FULL));
    return v;
}
#else
__device__ __forceinline__ u32 min_halves(u32 a, u32 b) { return min(a & 0xffff, b & 0xffff) | min(a >> 16, b >> 16) << 16; }
__device__ __forceinline__ u32 max_halves(u32 a, u32 b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
__device__ __forceinline__ u32 min_signed_halves(u32 a, u32 b) { return min_halves(a ^ 0x80008000u, b ^ 0x80008000u) ^ 0x80008000u; }
__device__ __forceinline__ u32 min_halves_before(u32 a, u32 b) { return min_halves((a - 1 & 0xffff) | (a - 0x10000 & 0xffff0000u), b); }
#endif
// Differences of pairs of 16-bit floats, rounded to such floats; and of two such pairs the larger in size, whatever their signs.
__device__ __forceinline__ u32 bfloat_differences(u32 a, u32 b) {
    u32 v;
    asm("fma.rn.bf16x2 %0, %2, %3, %1;" : "=r"(v) : "r"(a), "r"(b), "r"(0xbf80bf80u));
    return v;
}
KVF_HALVES(half_differences, "sub.rn.f16x2")
#if __CUDA_ARCH__ >= 860
KVF_HALVES(larger_bfloats, "max.xorsign.abs.bf16x2")
KVF_HALVES(larger_halves, "max.xorsign.abs.f16x2")
#else
KVF_HALVES(max_bfloats, "max.bf16x2")
KVF_HALVES(max_half_floats, "max.f16x2")
__device__ __forceinline__ u32 larger_bfloats(u32 a, u32 b) { return max_bfloats(a & 0x7fff7fffu, b & 0x7fff7fffu); }
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) { return max_half_floats(a & 0x7fff7fffu, b & 0x7fff7fffu); }
#endif
// Products of four bytes each, and `sum`.
__device__ __forceinline__ u32 dot4(u32 a, u32 b, u32 sum) {
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}
// Products of `a`'s halves with the two low bytes of `b`, and `sum`.
__device__ __forceinline__ u32 dot2(u32 a, u32 b, u32 sum) {
    asm("dp2a.lo.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

// ---- a warp at once ----

// rANS, one word: where `state` is above `limit`, its low half goes below `words_at` in shared memory, in the order of the lanes. `behind`:
// lanes_behind().
__device__ __forceinline__ void emit_word(u32 &state, u32 &words_at, u32 limit, u32 behind) {
    asm volatile(
        "{ .reg .pred full; .reg .u32 mask, rank; .reg .u16 word;\n\t"
        "setp.gt.u32 full, %0, %2;\n\t"
        "vote.sync.ballot.b32 mask, full, 0xffffffff;\n\t"
        "and.b32 rank, mask, %3;\n\t"
        "popc.b32 rank, rank;\n\t"
        "popc.b32 mask, mask;\n\t"
        "mad.lo.u32 rank, rank, -2, %1;\n\t"
        "mad.lo.u32 %1, mask, -2, %1;\n\t"
        "cvt.u16.u32 word, %0;\n\t"
        "@full st.shared.u16 [rank], word;\n\t"
        "@full shr.u32 %0, %0, 16; }"
        : "+r"(state), "+r"(words_at)
        : "r"(limit), "r"(behind)
        : "memory");
}
// The other way round: where `state` has become small, the next word in shared memory goes below it.
__device__ __forceinline__ void take_word(u32 &state, u32 &words, u32 below) {
    asm volatile(
        "{ .reg .pred need; .reg .u32 mask, rank, word; .reg .u16 half;\n\t"
        "setp.lt.u32 need, %0, 65536;\n\t"
        "vote.sync.ballot.b32 mask, need, 0xffffffff;\n\t"
        "and.b32 rank, mask, %2;\n\t"
        "popc.b32 rank, rank;\n\t"
        "popc.b32 mask, mask;\n\t"
        "mad.lo.u32 rank, rank, 2, %1;\n\t"
        "ld.shared.u16 half, [rank];\n\t"
        "cvt.u32.u16 word, half;\n\t"
        "@need prmt.b32 %0, word, %0, 0x5410;\n\t"
        "mad.lo.u32 %1, mask, 2, %1; }"
        : "+r"(state), "+r"(words)
        : "r"(below)
        : "memory");
}

// c += a * b on tensor cores, 16 x 32 times 32 x 8 bytes, each signed or not (PTX ISA, mma.m16n8k32).
#define KVF_MMA(NAME, A, B)                                                                                                 \
    __device__ __forceinline__ void NAME(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {                                  \
        asm("mma.sync.aligned.m16n8k32.row.col.s32." A "." B ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                \
    }
KVF_MMA(multiply_high, "s8", "s8")
KVF_MMA(multiply_high_low, "s8", "u8")
KVF_MMA(multiply_low_high, "u8", "s8")
KVF_MMA(multiply_low, "u8", "u8")

// Four 8 x 16 byte parts of rows in shared memory, as the fragments `a` of those have them: lane l gives the address of row l.
__device__ __forceinline__ void load_fragments(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address));
}
// The other way: 8 x 8 pairs of bytes each, from fragments as `c` above have them, two values to a word. Lane l gives the address of row l.
__device__ __forceinline__ void store_fragments(u32 address, const u32 (&a)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
#else
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared(__shfl_sync(FULL, address, 8 * i + (lane >> 2)) + 4 * (lane & 3), a[i]);
#endif
}
