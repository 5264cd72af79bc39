// CUDA, as far as the kernels of codecs/fused use it, on a CPU: they run as they are, but for intrinsics.cu, whose functions stand here in
// C++. Each block of threads is a thread of the operating system, its threads are contexts that take turns and give way where a warp or
// the block waits for its last thread. Blocks run at once, as on a GPU, and shared memory is a block's own.
//
// What this cannot show: races between warps of a block, wrong addresses in shared memory that stay within it, and speed.

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <type_traits>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct Dimension {
    u32 x;
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __grid_constant__

constexpr u32 FULL = 0xffffffffu;
constexpr int SHARED_BYTES = 256 << 10;
thread_local uint4 shared[SHARED_BYTES / 16];

namespace emulator {

constexpr size_t STACK_BYTES = 256 << 10;

struct Meeting {
    int arrived = 0;
    u32 turn = 0;
};
struct Warp {
    Meeting meeting;
    u64 given[2][32][8];  // by parity of the meeting: nobody is two ahead
};
struct Thread {
    ucontext_t context;
    Dimension index;
    Warp *warp;
    bool over = false;
};
struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Meeting meeting;
    ucontext_t scheduler;
    const std::function<void()> *kernel;
    Dimension index, size, grid;
};

thread_local Block *block;
thread_local Thread *current;

inline void give_way() { swapcontext(&current->context, &block->scheduler); }
inline void meet(Meeting &meeting, int expected) {
    const u32 turn = meeting.turn;
    if (++meeting.arrived == expected) {
        meeting.arrived = 0;
        ++meeting.turn;
    } else {
        while (meeting.turn == turn) give_way();
    }
}
inline int lane() { return (int)(current->index.x & 31); }

// What every lane of the warp gives, `count` words each: [lane][word].
inline const u64 (*exchange(const u64 *words, int count))[8] {
    Warp &warp = *current->warp;
    auto *given = warp.given[warp.meeting.turn & 1];
    std::copy(words, words + count, given[lane()]);
    meet(warp.meeting, 32);
    return given;
}
inline const u64 (*exchange(u64 word))[8] { return exchange(&word, 1); }

template <typename T>
u64 to_word(T value) {
    static_assert(sizeof(T) <= 8, "");
    u64 word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}
template <typename T>
T from_word(u64 word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

inline void begin() {
    (*block->kernel)();
    current->over = true;
    give_way();
}

inline void run_block(const std::function<void()> &kernel, u32 number, u32 grid, u32 size) {
    Block mine;
    block = &mine;
    mine.kernel = &kernel;
    mine.index = {number};
    mine.size = {size};
    mine.grid = {grid};
    mine.threads.resize(size);
    mine.warps.resize(size / 32);
    std::memset(shared, 0xA5, sizeof shared);  // nobody may count on zeros
    // Pages that no thread touches are never made.
    char *stacks = (char *)mmap(nullptr, size * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) std::abort();
    for (u32 i = 0; i < size; ++i) {
        Thread &thread = mine.threads[i];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = nullptr;
        thread.index = {i};
        thread.warp = &mine.warps[i / 32];
        makecontext(&thread.context, begin, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (Thread &thread : mine.threads) {
            if (thread.over) continue;
            alive = true;
            current = &thread;
            swapcontext(&mine.scheduler, &thread.context);
        }
    }
    munmap(stacks, size * STACK_BYTES);
}

inline void run(const std::function<void()> &kernel, u32 grid, u32 size) {
    std::vector<std::thread> blocks;
    for (u32 number = 0; number < grid; ++number) blocks.emplace_back([&kernel, number, grid, size] { run_block(kernel, number, grid, size); });
    for (std::thread &each : blocks) each.join();
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A> *)arguments[I]...);
}
template <typename... A>
void launch(void (*kernel)(A...), void **arguments, u32 grid, u32 size) {
    run([&] { call(kernel, arguments, std::index_sequence_for<A...>()); }, grid, size);
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

// ---- what CUDA offers ----

inline void __syncthreads() { emulator::meet(emulator::block->meeting, (int)emulator::block->threads.size()); }
inline void __syncwarp() { emulator::meet(emulator::current->warp->meeting, 32); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(u32) {
    std::this_thread::yield();
    emulator::give_way();
}

template <typename T>
T __shfl_sync(u32, T value, int from) {
    return emulator::from_word<T>(emulator::exchange(emulator::to_word(value))[from & 31][0]);
}
template <typename T>
T __shfl_xor_sync(u32, T value, int mask) {
    const int from = emulator::lane() ^ mask;
    return emulator::from_word<T>(emulator::exchange(emulator::to_word(value))[from][0]);
}
template <typename T>
T __shfl_up_sync(u32, T value, int delta) {
    const int lane = emulator::lane();
    return emulator::from_word<T>(emulator::exchange(emulator::to_word(value))[lane >= delta ? lane - delta : lane][0]);
}
inline u32 __ballot_sync(u32, bool predicate) {
    const auto given = emulator::exchange(predicate);
    u32 mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= (u32)given[lane][0] << lane;
    return mask;
}
inline bool __any_sync(u32, bool predicate) { return __ballot_sync(FULL, predicate) != 0; }
inline bool __all_sync(u32, bool predicate) { return __ballot_sync(FULL, predicate) == FULL; }
template <typename T, typename Join>
T reduced(T value, Join join) {
    const auto given = emulator::exchange(emulator::to_word(value));
    T result = emulator::from_word<T>(given[0][0]);
    for (int lane = 1; lane < 32; ++lane) result = join(result, emulator::from_word<T>(given[lane][0]));
    return result;
}
template <typename T>
T __reduce_min_sync(u32, T value) {
    return reduced(value, [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_max_sync(u32, T value) {
    return reduced(value, [](T a, T b) { return a < b ? b : a; });
}
inline u32 __reduce_or_sync(u32, u32 value) {
    return reduced(value, [](u32 a, u32 b) { return a | b; });
}
template <typename T>
T __reduce_add_sync(u32, T value) {
    return reduced(value, [](T a, T b) { return (T)((u32)a + (u32)b); });
}

inline u32 atomicAdd(u32 *p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline u32 atomicSub(u32 *p, u32 v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
inline u32 atomicOr(u32 *p, u32 v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
inline int atomicMax(int *p, int v) {
    int old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
inline u32 atomicMax(u32 *p, u32 v) {
    u32 old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}

template <typename T>
T __ldg(const T *p) {
    return *p;
}
inline float __uint_as_float(u32 v) { return emulator::from_word<float>(v); }
inline float __int_as_float(int v) { return emulator::from_word<float>((u32)v); }
inline u32 __float_as_uint(float v) { return (u32)emulator::to_word(v); }
inline int __float_as_int(float v) { return (int)emulator::to_word(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_rn(double v) { return (float)v; }
inline float __uint2float_rn(u32 v) { return (float)v; }
inline float __int2float_rn(int v) { return (float)v; }
inline float __ll2float_rn(i64 v) { return (float)v; }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __ffs(u32 v) { return __builtin_ffs((int)v); }
inline int __clz(u32 v) { return v ? __builtin_clz(v) : 32; }
inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((i64)a * b >> 32); }
inline u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
inline u32 __funnelshift_l(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) << (by & 31) >> 32); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 v = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 choice = selector >> (4 * i) & 15;
        u32 byte = (u32)(bytes >> (8 * (choice & 7))) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        v |= byte << (8 * i);
    }
    return v;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return (T)b < (T)a ? (T)b : (T)a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return (T)a < (T)b ? (T)b : (T)a;
}

// ---- intrinsics.cu ----

inline u32 lanes_before() { return (1u << emulator::lane()) - 1; }
inline u32 lanes_behind() { return ~lanes_before(); }

inline int made_now(int v) { return v; }

template <typename T>
T &at_shared(u32 address) {
    if (address > SHARED_BYTES - sizeof(T) || address % sizeof(T)) std::abort();
    return *(T *)((char *)shared + address);
}
inline u32 shared_address(const void *p) { return (u32)((const char *)p - (const char *)shared); }
inline u32 load_shared(u32 address) { return at_shared<u32>(address); }
inline void store_shared(u32 address, u32 v) { at_shared<u32>(address) = v; }
inline u32 load_shared_u8(u32 address) { return at_shared<u8>(address); }
inline void store_shared_u8(u32 address, u32 v) { at_shared<u8>(address) = (u8)v; }
inline u32 load_shared_u16(u32 address) { return at_shared<u16>(address); }
inline void store_shared_u16(u32 address, u32 v) { at_shared<u16>(address) = (u16)v; }
template <int CPL>
void load_shared_words(u32 address, u32 (&v)[CPL]) {
    if ((CPL == 2 || CPL == 4) && address % (4 * CPL)) std::abort();
    for (int k = 0; k < CPL; ++k) v[k] = load_shared(address + 4 * k);
}
template <int CPL>
void store_shared_words(u32 address, const u32 (&v)[CPL]) {
    if ((CPL == 2 || CPL == 4) && address % (4 * CPL)) std::abort();
    for (int k = 0; k < CPL; ++k) store_shared(address + 4 * k, v[k]);
}
inline u32 table_word(u32 address) { return load_shared(address); }
inline uint2 table_words(u32 address) {
    if (address % 8) std::abort();
    return {load_shared(address), load_shared(address + 4)};
}
template <int WIDTH, int COUNT>
void load_global(const u8 *p, u32 (&packed)[COUNT]) {
    if ((u64)p % WIDTH) std::abort();
    if (WIDTH == 2) packed[0] = *(const u16 *)p;
    else std::memcpy(packed, p, WIDTH);
}
template <int WIDTH, int COUNT>
void store_global(u8 *p, const u32 (&packed)[COUNT]) {
    if ((u64)p % WIDTH) std::abort();
    std::memcpy(p, packed, WIDTH);
}
inline void store_pair(u64 address, u32 pair) {
    if (address % 2) std::abort();
    std::memcpy((void *)address, &pair, 4);
}
inline void copy_behind(u32 address, u64 from, bool there) {
    if (from % 16 || address % 16) std::abort();
    for (u32 i = 0; i < 16; i += 4) store_shared(address + i, there ? *(const u32 *)(from + i) : 0);
}
inline void await_copies() {}
inline u32 peek(const u32 *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
inline void poke(u32 *p, u32 v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
inline void poke_behind(u32 *p, u32 v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }

// To nearest even, of float32 to `mantissa` bits of a smaller format with `exponent` bits of exponent.
inline u32 narrowed(float f, int mantissa, int exponent) {
    const u32 bits = __float_as_uint(f), sign = bits >> 31, magnitude = bits & 0x7fffffff;
    const int bias = (1 << (exponent - 1)) - 1;
    const u32 infinity = (u32)((1 << exponent) - 1) << mantissa;
    if (magnitude > 0x7f800000) return 0x7fff;  // as the instruction does
    int shift = 23 - mantissa;
    const int field = (int)(magnitude >> 23);
    u64 significand = magnitude;
    if (exponent < 8) {
        const int target = field - 127 + bias;
        if (target <= 0) {  // denormal: of the value with its leading one
            if (field == 0) return sign << (mantissa + exponent);
            significand = (magnitude & 0x7fffff) | 0x800000;
            shift = std::min(shift + 1 - target, 40);
        } else {
            significand = magnitude - ((u64)(127 - bias) << 23);
        }
    }
    const u64 rounded = (significand + ((1ull << (shift - 1)) - 1) + (significand >> shift & 1)) >> shift;
    return sign << (mantissa + exponent) | (u32)std::min<u64>(rounded, infinity);
}
inline u32 half_bits(float f) { return narrowed(f, 10, 5); }
inline u32 bfloat_bits(float f) { return narrowed(f, 7, 8); }
inline u32 half_pair(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline u32 bfloat_pair(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }
inline float from_half(u32 word) {
    const u32 sign = word >> 15 & 1, field = word >> 10 & 31, mantissa = word & 1023;
    float magnitude;
    if (field == 31) magnitude = __uint_as_float(0x7f800000 | mantissa << 13);
    else if (field) magnitude = std::ldexp((float)(1024 + mantissa), (int)field - 25);
    else magnitude = std::ldexp((float)mantissa, -24);
    return sign ? -magnitude : magnitude;
}
inline u32 flushed_pair(u32 pair) {
    for (int half = 0; half < 32; half += 16)
        if (!(pair >> half & 0x7c00)) pair &= ~(0xffffu << half);
    return pair;
}
inline float larger_or_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? b : a; }
inline int clamp_to(int v, int most) { return max(min(v, most), 0); }
inline u32 min_halves(u32 a, u32 b) { return min(a & 0xffff, b & 0xffff) | min(a >> 16, b >> 16) << 16; }
inline u32 max_halves(u32 a, u32 b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
inline u32 min_signed_halves(u32 a, u32 b) { return min_halves(a ^ 0x80008000u, b ^ 0x80008000u) ^ 0x80008000u; }
inline u32 min_halves_before(u32 a, u32 b) { return min_halves(((a - 1) & 0xffff) | ((a - 0x10000) & 0xffff0000u), b); }
// Differences of floats, rounded once: to odd, then to the 16-bit float.
inline float to_odd(double exact) {
    const float f = (float)exact;
    const u32 bits = __float_as_uint(f);
    if ((double)f == exact || f != f || (bits & 1)) return f;
    return __uint_as_float(std::fabs((double)f) > std::fabs(exact) ? bits - 1 : bits + 1);
}
inline u32 bfloat_differences(u32 a, u32 b) {
    const auto from = [](u32 word) { return (double)__uint_as_float(word << 16); };
    return bfloat_pair(to_odd(from(a & 0xffff) - from(b & 0xffff)), to_odd(from(a >> 16) - from(b >> 16)));
}
inline u32 half_differences(u32 a, u32 b) {
    const auto from = [](u32 word) { return (double)from_half(word); };
    return half_pair(to_odd(from(a & 0xffff) - from(b & 0xffff)), to_odd(from(a >> 16) - from(b >> 16)));
}
inline u32 larger_halves(u32 a, u32 b) { return max_halves(a & 0x7fff7fff, b & 0x7fff7fff) | ((a ^ b) & 0x80008000); }  // of numbers
inline u32 larger_bfloats(u32 a, u32 b) { return larger_halves(a, b); }
inline u32 clamp_halves(u32 v, u32 addend, u32 most) {
    return (u32)clamp_to((short)(v + addend), (int)(most & 0xffff)) | (u32)clamp_to((short)((v >> 16) + (addend >> 16)), (int)(most >> 16)) << 16;
}
inline u32 dot2(u32 a, u32 b, u32 sum) { return sum + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255); }
inline u32 dot4(u32 a, u32 b, u32 sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
    return sum;
}

inline void emit_word(u32 &state, u32 &words_at, u32 limit, u32 behind) {
    const bool full = state > limit;
    const u32 mask = __ballot_sync(FULL, full);
    if (full) {
        at_shared<u16>(words_at - 2 * (u32)__popc(mask & behind)) = (u16)state;
        state >>= 16;
    }
    words_at -= 2 * (u32)__popc(mask);
}
inline void take_word(u32 &state, u32 &words, u32 below) {
    const bool need = state < 65536;
    const u32 mask = __ballot_sync(FULL, need);
    if (need) state = state << 16 | at_shared<u16>(words + 2 * (u32)__popc(mask & below));
    words += 2 * (u32)__popc(mask);
}

// c += a * b as mma.m16n8k32 has its fragments (PTX ISA): of lane l, c is (row l/4, columns 2*(l%4) and next), then 8 rows further; words
// of a are (row l/4, inner 4*(l%4) on), 8 rows further, 16 inner further, both; words of b (inner 4*(l%4) on, column l/4), 16 inner further.
template <typename A, typename B>
void multiply(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u64 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto given = emulator::exchange(mine, 6);
    const int lane = emulator::lane();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
        u32 sum = (u32)c[i];
        for (int inner = 0; inner < 32; ++inner) {
            const int quad = inner % 16 / 4, byte = 8 * (inner % 4), upper = inner / 16;
            const A x = (A)(given[4 * row + quad][2 * upper + i / 2] >> byte);
            const B y = (B)(given[4 * column + quad][4 + upper] >> byte);
            sum += (u32)((int)x * (int)y);
        }
        c[i] = (int)sum;
    }
}
inline void multiply_high(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<signed char, signed char>(c, a, b0, b1); }
inline void multiply_high_low(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<signed char, u8>(c, a, b0, b1); }
inline void multiply_low_high(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<u8, signed char>(c, a, b0, b1); }
inline void multiply_low(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<u8, u8>(c, a, b0, b1); }
inline void load_fragments(u32 (&a)[4], u32 address) {
    const auto given = emulator::exchange(address);
    const int lane = emulator::lane();
    for (int i = 0; i < 4; ++i) {
        const u32 row = (u32)given[8 * i + lane / 4][0];
        if (row % 16) std::abort();
        a[i] = load_shared(row + 4 * (u32)(lane % 4));
    }
}
inline void store_fragments(u32 address, const u32 (&a)[4]) {
    const auto given = emulator::exchange(address);
    const int lane = emulator::lane();
    for (int i = 0; i < 4; ++i) {
        const u32 row = (u32)given[8 * i + lane / 4][0];
        if (row % 16) std::abort();
        store_shared(row + 4 * (u32)(lane % 4), a[i]);
    }
}
