// What the encoder and the decoder of `ans` tiles share (ans_choose.cu, ans_encode.cu, ans_decode.cu are compiled behind this text).
//
// docs/format.md is the contract, packing/ans/reference.py the truth: both make the same bytes. One warp codes one tile. Lane l
// owns channels l*CPL .. l*CPL+CPL-1, so a token's row is read with one vector load a lane, and the 32 lanes are the 32
// interleaved rANS states. Nothing is atomic: words go out in lane order by ballot.
//
// The host defines: KVF_BOUNDED (1 bounded, 0 lossless), KVF_ITEM (bytes of a value), KVF_MANTISSA and KVF_EXPONENT (bits),
// KVF_BASES (0 every channel has a base, 1 none, 2 those kept apart), KVF_CHANNEL_STEPS (1 if each channel has its own step).
// No header is included, so NVRTC needs none. Compile with -fmad=false: the quantiser is exact only if every product is
// rounded on its own, as PyTorch does.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if KVF_ITEM == 1
typedef u8 word_t;
#elif KVF_ITEM == 2
typedef u16 word_t;
#else
typedef u32 word_t;
#endif

constexpr u32 FULL = 0xffffffffu;
constexpr int PROB_BITS = 10, PROB_SCALE = 1 << PROB_BITS, ALPHABET = 64;
constexpr u32 STATE_LOW = 1u << 16;
constexpr int MAX_CLASS = 120, LAST_TWO_SIDED = 16, LAST_ONE_SIDED = 15;
// Each family as the host lays it out: one table more than the format has, whose only symbol, 0, has probability 1. It leaves
// the state as it is, so slots of a lane that have no channel are coded like the others.
constexpr int NUM_TABLES = (KVF_BOUNDED ? LAST_TWO_SIDED : LAST_ONE_SIDED) + 2, IDLE_TABLE = NUM_TABLES - 1;
constexpr int TOP_BIT = 8 * KVF_ITEM - 1;
constexpr u32 MANTISSA_MASK = (1u << KVF_MANTISSA) - 1, EXPONENT_MASK = (1u << KVF_EXPONENT) - 1;
// Lossless: sign and mantissa; whole bytes of it go to planes, the other bits stay under the exponent.
constexpr int REST_BITS = KVF_MANTISSA + 1, PLANES = KVF_BOUNDED ? 0 : REST_BITS / 8, LOW_BITS = KVF_BOUNDED ? 0 : REST_BITS % 8;
constexpr int ALL = 0, NONE = 1, APART = 2;
constexpr bool DELTA = KVF_BASES != ALL, CHANNEL_STEPS = KVF_CHANNEL_STEPS;

struct Source {
    void *data;
    const i64 *offsets;
    const int *tokens, *channels;
    i64 token_stride, channel_stride;
    int num_tiles;
};

__device__ __forceinline__ int pad4(int n) { return (n + 3) & ~3; }

// Bits of the lanes before this one. Volatile, so that it is kept in a register rather than made anew in every step.
__device__ __forceinline__ u32 lanes_before() {
    u32 mask;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
    return mask;
}

// Shared memory by its own 32-bit addresses: through pointers, the compiler computes the window's base in every step.
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ u32 load_shared_u16(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 load_shared_pair(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

__device__ __forceinline__ float as_float(u32 word) {
#if KVF_ITEM == 4
    return __uint_as_float(word);
#elif KVF_EXPONENT == 8
    return __uint_as_float(word << 16);
#else
    float f;
    u16 h = (u16)word;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
}

// Round to the dtype, to nearest even; the result's bits.
__device__ __forceinline__ u32 as_word(float f) {
#if KVF_ITEM == 4
    return __float_as_uint(f);
#elif KVF_EXPONENT == 8
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#else
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#endif
}

// 1.5 * 2**23: adding it rounds a float below 2**22 to an integer (to nearest even) and leaves that in the low mantissa bits.
// Conversion instructions do the same at a quarter of the rate.
constexpr float ROUNDER = 12582912.0f;
constexpr int ROUNDER_BITS = 0x4b400000;

__device__ __forceinline__ float whole(int code) { return __int_as_float(ROUNDER_BITS + code) - ROUNDER; }  // |code| <= 2**22

__device__ __forceinline__ void table_and_shift(int c, int &table, int &shift) {
    if (!KVF_BOUNDED) {
        table = c;
        shift = LOW_BITS;
    } else {
        shift = c <= LAST_TWO_SIDED ? 0 : (c - LAST_TWO_SIDED + 2) / 3;
        table = c - 3 * shift;
    }
}

__device__ __forceinline__ int exclusive_sum(int v, int lane, int &total) {
    int sum = v;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        int other = __shfl_up_sync(FULL, sum, d);
        if (lane >= d) sum += other;
    }
    total = __shfl_sync(FULL, sum, 31);
    return sum - v;
}

__device__ __forceinline__ int small_bits(int code) { return code == 0 ? 0 : 2 << code; }

// One lane's part of a token's row.
template <int CPL>
struct Rows {
    word_t *first;  // the lane's first channel of token 0
    i64 token_stride, channel_stride;
    int count;    // channels of this lane that exist
    bool vector;  // the same in all lanes: each existing lane has all its channels, at an aligned address

    __device__ Rows(const Source &s, int tile, int lane, int channels) {
        token_stride = s.token_stride;
        channel_stride = s.channel_stride;
        word_t *tile_start = (word_t *)s.data + s.offsets[tile];
        first = tile_start + (i64)lane * CPL * channel_stride;
        count = max(0, min(CPL, channels - lane * CPL));
        vector = (WIDTH == 2 || WIDTH == 4 || WIDTH == 8 || WIDTH == 16) && CPL > 1 && channel_stride == 1 &&
                 channels % CPL == 0 && (u64)tile_start % WIDTH == 0 && token_stride * KVF_ITEM % WIDTH == 0;
    }
    static constexpr int WIDTH = CPL * KVF_ITEM, PACKED = (WIDTH + 3) / 4;

    // A row as it lies in memory: what a prefetch holds.
    __device__ __forceinline__ void load(int t, u32 (&packed)[PACKED]) const {
        const word_t *p = first + t * token_stride;
        if (vector) {
            if (count == 0) return;
            if constexpr (WIDTH == 16) *(uint4 *)packed = *(const uint4 *)p;
            else if constexpr (WIDTH == 8) *(uint2 *)packed = *(const uint2 *)p;
            else if constexpr (WIDTH == 4) packed[0] = *(const u32 *)p;
            else if constexpr (WIDTH == 2) packed[0] = *(const u16 *)p;
        } else {
#pragma unroll
            for (int i = 0; i < PACKED; ++i) packed[i] = 0;
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                if (k < count) packed[k * KVF_ITEM / 4] |= (u32)p[k * channel_stride] << (8 * (k * KVF_ITEM % 4));
        }
    }
    __device__ static __forceinline__ u32 value(const u32 (&packed)[PACKED], int k) {
        return (packed[k * KVF_ITEM / 4] >> (8 * (k * KVF_ITEM % 4))) & (FULL >> (32 - 8 * KVF_ITEM));
    }
    __device__ __forceinline__ void store(int t, const u32 (&v)[CPL]) const {
        word_t *p = first + t * token_stride;
        if (vector) {
            if (count == 0) return;
            u32 packed[PACKED] = {};
#pragma unroll
            for (int k = 0; k < CPL; ++k) packed[k * KVF_ITEM / 4] |= v[k] << (8 * (k * KVF_ITEM % 4));
            if constexpr (WIDTH == 16) *(uint4 *)p = *(uint4 *)packed;
            else if constexpr (WIDTH == 8) *(uint2 *)p = *(uint2 *)packed;
            else if constexpr (WIDTH == 4) *(u32 *)p = packed[0];
            else if constexpr (WIDTH == 2) *(u16 *)p = (u16)packed[0];
        } else {
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                if (k < count) p[k * channel_stride] = (word_t)v[k];
        }
    }
};

__device__ __forceinline__ word_t &value_at(const Source &s, int tile, int channels, int position) {
    return ((word_t *)s.data)[s.offsets[tile] + position / channels * s.token_stride + position % channels * s.channel_stride];
}

