// Tensor to `ans` tiles and back in one launch: quantise (or split), choose tables, rANS. docs/format.md is the contract,
// packing/ans/reference.py the truth: both make the same bytes.
//
// One warp codes one tile. Lane l owns channels l*CPL .. l*CPL+CPL-1, so a token's row is read with one vector load a lane and
// the 32 lanes are the 32 interleaved rANS states. Nothing is atomic: words go out in lane order by ballot.
//
// The including host defines: KVF_BOUNDED (1 bounded, 0 lossless), KVF_ITEM (bytes of a value), KVF_MANTISSA and
// KVF_EXPONENT (bits). No header is included, so NVRTC needs none. Compile with -fmad=false: the quantiser is exact only if
// every product is rounded on its own, as PyTorch does.

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
constexpr int FIXED = 0, OUTLIER = 2;

struct Source {
    void *data;
    const i64 *offsets;
    const int *tokens, *channels;
    i64 token_stride, channel_stride;
    int num_tiles;
};

__device__ __forceinline__ int pad4(int n) { return (n + 3) & ~3; }

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

struct Quantiser {
    float step, inverse, bound;
};

// 1.5 * 2**23: adding it rounds a float below 2**22 to an integer (to nearest even) and leaves that in the low mantissa bits.
// Conversion instructions do the same at a quarter of the rate.
constexpr float ROUNDER = 12582912.0f;
constexpr int ROUNDER_BITS = 0x4b400000;

__device__ __forceinline__ float whole(int code) { return __int_as_float(ROUNDER_BITS + code) - ROUNDER; }  // |code| <= 2**22
__device__ __forceinline__ float deliver(float code, float step) { return as_float(as_word(__fmul_rn(code, step))); }

// |x - y| <= bound in exact arithmetic: the rounded difference decides unless it equals the bound.
__device__ __forceinline__ bool within(float x, float y, float bound) {
    float d = x - y, size = fabsf(d);
    if (size < bound) return true;
    if (!(size == bound)) return false;
    float part = d - x, error = (x - (d - part)) - (y + part);
    return d > 0 ? error <= 0 : error >= 0;
}

__device__ __forceinline__ int first_guess(u32 word, const Quantiser &q) {
    float scaled = __fmul_rn(as_float(word), q.inverse);
    return fabsf(scaled) < 4194304.0f ? __float_as_int(scaled + ROUNDER) - ROUNDER_BITS : 0;
}

// The code, and whether the value is to be stored in its own bits.
__device__ __forceinline__ int quantise(u32 word, const Quantiser &q, bool &exact) {
    float x = as_float(word), scaled = __fmul_rn(x, q.inverse);
    bool usable = fabsf(scaled) < 4194304.0f;
    float rounded = usable ? scaled + ROUNDER : ROUNDER;
    float y = deliver(rounded - ROUNDER, q.step);
    int code = __float_as_int(rounded) - ROUNDER_BITS;
    bool good = fabsf(x - y) < q.bound;
    if (!good && usable) {
        good = within(x, y, q.bound);
        if (!good) {
            float towards = x > y ? 1.0f : -1.0f;
            if (within(x, deliver(rounded - ROUNDER + towards, q.step), q.bound)) {
                code += (int)towards;
                good = true;
            }
        }
    }
    // Denormal (magnitude 1 to MANTISSA_MASK) or negative zero.
    bool special = (word & ((1u << TOP_BIT) - 1)) - 1 < MANTISSA_MASK || word == 1u << TOP_BIT;
    exact = !good || special;
    return code;
}

// The lossless split: minus the exponent above the low bits, and the bytes for the planes.
__device__ __forceinline__ int split(u32 word, u32 &rest) {
    u32 joined = (word >> TOP_BIT) << KVF_MANTISSA | (word & MANTISSA_MASK);
    rest = joined;
    return -(int)((word >> KVF_MANTISSA) & EXPONENT_MASK) * (1 << LOW_BITS) + (int)(joined >> (8 * PLANES));
}

__device__ __forceinline__ u32 join(int value, u32 plane_bytes) {
    u32 joined = ((u32)value & ((1u << LOW_BITS) - 1)) << (8 * PLANES) | plane_bytes;
    u32 exponent = (u32)(-(value >> LOW_BITS)) & EXPONENT_MASK;
    return (joined >> KVF_MANTISSA) << TOP_BIT | exponent << KVF_MANTISSA | (joined & MANTISSA_MASK);
}

// max(1, floor(1.5 * (log2(variance) + 7))), from the float's bits; 0 where nothing varies.
__device__ int spread_class(i64 spread, int tokens) {
    if (spread == 0) return 0;
    u32 bits = __float_as_uint(__fdiv_rn(__ll2float_rn(spread), (float)(tokens * tokens)));
    int octave = (int)(bits >> 23) - 127 + 7;
    u32 threshold = octave & 1 ? 2180376u : 4927478u;
    int c = ((3 * octave) >> 1) + ((bits & 0x7fffffu) >= threshold);
    return max(1, min(c, MAX_CLASS));
}

__device__ int reach_class(int c, int largest, const int *radius) {
    while (radius[c] < largest) ++c;
    return c;
}

__device__ __forceinline__ void table_and_shift(int c, int &table, int &shift) {
    if (!KVF_BOUNDED) {
        table = c;
        shift = LOW_BITS;
    } else {
        shift = c <= LAST_TWO_SIDED ? 0 : (c - LAST_TWO_SIDED + 2) / 3;
        table = c - 3 * shift;
    }
}

__device__ __forceinline__ int warp_min(int v) { return __reduce_min_sync(FULL, v); }
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(FULL, v); }

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
__device__ __forceinline__ int small_code(u32 largest) {
    return largest == 0 ? 0 : largest < 16 ? 1 : largest < 256 ? 2 : largest < 65536 ? 3 : 4;
}

// Write `count` staged values of `code`'s width at `out`, padded to 4 bytes with zeros.
__device__ void put_small(u8 *out, const u32 *staged, int count, int code, int lane) {
    int bits = small_bits(code), bytes = (count * bits + 7) / 8;
    for (int i = lane; i < pad4(bytes); i += 32) {
        u32 v = 0;
        if (i < bytes) {
            if (bits == 4) v = staged[2 * i] | (2 * i + 1 < count ? staged[2 * i + 1] << 4 : 0);
            else v = staged[i * 8 / bits] >> (i * 8 % bits);
        }
        out[i] = (u8)v;
    }
}

__device__ __forceinline__ u32 get_small(const u8 *in, int index, int code) {
    switch (code) {
    case 0: return 0;
    case 1: return in[index >> 1] >> (4 * (index & 1)) & 15;
    case 2: return in[index];
    case 3: return ((const u16 *)in)[index];
    default: return ((const u32 *)in)[index];
    }
}

// One lane's part of a token's row.
template <int CPL>
struct Rows {
    word_t *first;  // the lane's first channel of token 0
    i64 token_stride, channel_stride;
    int count;  // channels of this lane that exist
    bool vector;

    __device__ Rows(const Source &s, int tile, int lane, int channels) {
        token_stride = s.token_stride;
        channel_stride = s.channel_stride;
        first = (word_t *)s.data + s.offsets[tile] + (i64)lane * CPL * channel_stride;
        count = max(0, min(CPL, channels - lane * CPL));
        vector = (WIDTH == 2 || WIDTH == 4 || WIDTH == 8 || WIDTH == 16) && CPL > 1 && channel_stride == 1 && count == CPL &&
                 (u64)first % WIDTH == 0 && token_stride * KVF_ITEM % WIDTH == 0;
    }
    static constexpr int WIDTH = CPL * KVF_ITEM, PACKED = (WIDTH + 3) / 4;

    // A row as it lies in memory: what a prefetch holds.
    __device__ __forceinline__ void load(int t, u32 (&packed)[PACKED]) const {
        const word_t *p = first + t * token_stride;
        if (vector) {
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

// Calls body(t, row) for every token in order, loading AHEAD rows before the first is used: the loads hide one another's latency.
template <int CPL, typename Body>
__device__ __forceinline__ void for_rows(const Rows<CPL> &rows, int tokens, Body body) {
    constexpr int AHEAD = 8;
    for (int start = 0; start < tokens; start += AHEAD) {
        u32 packed[AHEAD][Rows<CPL>::PACKED];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < tokens) rows.load(start + i, packed[i]);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < tokens) body(start + i, packed[i]);
    }
}

__device__ __forceinline__ word_t &value_at(const Source &s, int tile, int channels, int position) {
    return ((word_t *)s.data)[s.offsets[tile] + position / channels * s.token_stride + position % channels * s.channel_stride];
}

// A tile that does not shrink: its values in their own bits.
__device__ int put_raw(const Source &s, int tile, int tokens, int channels, u8 *row, int lane) {
    int count = tokens * channels, size = 4 + pad4(count * KVF_ITEM);
    if (lane == 0) *(u32 *)row = 0;
    word_t *out = (word_t *)(row + 4);
    for (int i = lane; i < (size - 4) / KVF_ITEM; i += 32) out[i] = i < count ? value_at(s, tile, channels, i) : (word_t)0;
    return size;
}

// The low bits of one channel, written from its last token to its first.
struct LowWriter {
    u32 *words;
    u32 pending;
    int at, width;

    __device__ __forceinline__ void start(u32 *stream, int tokens, int w) {
        words = stream;
        width = w;
        pending = 0;
        at = (tokens * w - 1) >> 5;
    }
    __device__ __forceinline__ void put(int t, u32 value) {
        int bit = t * width, word = bit >> 5;
        u64 spread = (u64)value << (bit & 31);
        if (word < at) {
            words[at] = pending | (u32)(spread >> 32);
            at = word;
            pending = 0;
        }
        pending |= (u32)spread;
    }
    __device__ __forceinline__ void finish() { words[0] = pending; }
};

template <int CPL>
__device__ int encode_tile(const Source &src, int tile, const Quantiser *quantisers, int mode, bool channel_steps, const uint2 *tables,
                           const int *radius, u8 *row, int row_bytes, u32 *staged, int lane) {
    const int tokens = src.tokens[tile], channels = src.channels[tile];
    const int raw_size = 4 + pad4(tokens * channels * KVF_ITEM);
    const Rows<CPL> rows(src, tile, lane, channels);
    const bool fixed = mode == FIXED;
    Quantiser quantiser[CPL];
    if (KVF_BOUNDED) {
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            quantiser[k] = quantisers[channel_steps ? (i64)tile * 128 + min(lane * CPL + k, 127) : (i64)tile];
    }

    // 1. Statistics: base and class of each channel.
    int base[CPL] = {}, klass[CPL] = {};
    bool apart[CPL] = {};
    if (!KVF_BOUNDED) {
        int largest[CPL] = {}, total[CPL] = {}, counted[CPL] = {};
        for_rows(rows, tokens, [&](int t, const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const u32 word = Rows<CPL>::value(row, k);
                int e = (word >> KVF_MANTISSA) & EXPONENT_MASK;
                largest[k] = max(largest[k], e);
                total[k] += e;
                counted[k] += e > 0;
            }
        });
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            base[k] = -largest[k];
            klass[k] = min(LAST_ONE_SIDED, 5 * (largest[k] * counted[k] - total[k]) / max(counted[k], 1));
        }
    } else if (fixed) {
        int sum[CPL] = {};
        i64 squares[CPL] = {};
        for_rows(rows, tokens, [&](int t, const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const u32 word = Rows<CPL>::value(row, k);
                int q = first_guess(word, quantiser[k]);
                sum[k] += q;
                squares[k] += (i64)q * q;
            }
        });
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            int numerator = 2 * sum[k] + tokens, quotient = numerator / (2 * tokens);
            base[k] = quotient - (numerator % (2 * tokens) < 0);
            klass[k] = spread_class(tokens * squares[k] - (i64)sum[k] * sum[k], tokens);
        }
    } else {
        int first[CPL] = {}, previous[CPL] = {}, reach[CPL] = {};
        i64 squares[CPL] = {};  // of all differences but the first
        for_rows(rows, tokens, [&](int t, const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const u32 word = Rows<CPL>::value(row, k);
                bool exact;
                int q = quantise(word, quantiser[k], exact), r = q - previous[k];
                previous[k] = q;
                if (t == 0) first[k] = r;
                else {
                    squares[k] += (i64)r * r;
                    reach[k] = max(reach[k], abs(r));
                }
            }
        });
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            int whole = spread_class(tokens * (squares[k] + (i64)first[k] * first[k]), tokens);
            whole = reach_class(whole, max(reach[k], abs(first[k])), radius);
            klass[k] = whole;
            if (mode == OUTLIER) {
                int without = reach_class(spread_class(tokens * squares[k], tokens), reach[k], radius);
                apart[k] = (whole - without) * tokens > 48;
                if (apart[k]) {
                    klass[k] = without;
                    base[k] = first[k];
                }
            }
        }
    }

    // 2. Where the sections lie.
    const int lanes = (channels + CPL - 1) / CPL;
    int least_class = 255, most_class = 0, least_base = 0x7fffffff, most_base = -0x7fffffff - 1, my_bases = 0, my_words = 0;
    int table[CPL], shift[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        table_and_shift(klass[k], table[k], shift[k]);
        if (k >= rows.count) {
            table[k] = IDLE_TABLE;
            shift[k] = 0;
            continue;
        }
        int stored = mode == OUTLIER ? 2 * klass[k] + apart[k] : klass[k];
        least_class = min(least_class, stored);
        most_class = max(most_class, stored);
        if (!KVF_BOUNDED || fixed || apart[k]) {
            ++my_bases;
            least_base = min(least_base, base[k]);
            most_base = max(most_base, base[k]);
        }
        my_words += (tokens * shift[k] + 31) >> 5;
    }
    least_class = warp_min(least_class);
    const int class_code = small_code(warp_max(most_class) - least_class);
    least_base = warp_min(least_base);
    int num_bases, low_words;
    const int bases_before = exclusive_sum(my_bases, lane, num_bases);
    const int low_before = exclusive_sum(my_words, lane, low_words);
    most_base = warp_max(most_base);
    if (num_bases == 0) least_base = most_base = 0;
    const int base_code = small_code((u32)most_base - (u32)least_base);
    const int planes_at = 16 + 4 * lanes;
    const int steps_at = planes_at + pad4(PLANES * tokens * channels);
    const int classes_at = steps_at + (channel_steps ? pad4(2 * channels) : 0);
    const int bases_at = classes_at + pad4((channels * small_bits(class_code) + 7) / 8);
    const int low_at = bases_at + pad4((num_bases * small_bits(base_code) + 7) / 8);
    const int words_at = low_at + 4 * low_words;
    if (words_at >= raw_size) return put_raw(src, tile, tokens, channels, row, lane);

    // 3. Everything that does not depend on the coder.
#pragma unroll
    for (int k = 0; k < CPL; ++k)
        if (k < rows.count) staged[lane * CPL + k] = (mode == OUTLIER ? 2 * klass[k] + apart[k] : klass[k]) - least_class;
    __syncwarp();
    put_small(row + classes_at, staged, channels, class_code, lane);
    __syncwarp();
    {
        int at = bases_before;
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            if (k < rows.count && (!KVF_BOUNDED || fixed || apart[k])) staged[at++] = (u32)base[k] - (u32)least_base;
    }
    __syncwarp();
    put_small(row + bases_at, staged, num_bases, base_code, lane);
    __syncwarp();
    if (channel_steps) {
        u16 *steps = (u16 *)(row + steps_at);
        for (int c = lane; c < pad4(2 * channels) / 2; c += 32)
            steps[c] = c < channels ? (u16)(__float_as_uint(quantisers[(i64)tile * 128 + c].step) >> 16) : (u16)0;
    }
    if (PLANES && lane < pad4(PLANES * tokens * channels) - PLANES * tokens * channels)
        row[planes_at + PLANES * tokens * channels + lane] = 0;

    // 4. Code, last token first. Words and positions gather behind the tile, from the end of the row downwards.
    u16 *words_end = (u16 *)(row + row_bytes), *exact_end = words_end - tokens * channels, *exact_positions = exact_end;
    int words_at_end = 0;  // minus the words so far
    u32 state = STATE_LOW;
    const u32 below = (1u << lane) - 1;
    LowWriter low[CPL];
    {
        int at = low_before;
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            low[k].start((u32 *)(row + low_at) + at, tokens, shift[k]);
            at += (tokens * shift[k] + 31) >> 5;
        }
    }
    u32 low_mask = 0;  // slots in which some lane has low bits
#pragma unroll
    for (int k = 0; k < CPL; ++k) low_mask |= (u32)__any_sync(FULL, shift[k]) << k;
    int code[CPL];  // differences only: the codes of the row at hand, and which of its values are stored exactly
    u32 exact_mask = 0;
    // Differences need the row before the one at hand, so their loads run one row further ahead.
    const int lead = KVF_BOUNDED && !fixed ? 1 : 0;
    u32 row_bits[Rows<CPL>::PACKED] = {}, fetched[Rows<CPL>::PACKED] = {};
    if (tokens - 1 - lead >= 0) rows.load(tokens - 1 - lead, row_bits);
    if (lead) {
        rows.load(tokens - 1, fetched);
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            bool exact;
            code[k] = quantise(Rows<CPL>::value(fetched, k), quantiser[k], exact);
            exact_mask |= (u32)exact << k;
        }
    }
    for (int t = tokens - 1; t >= 0; --t) {
        int residual[CPL];
        u32 missing = exact_mask;
        if (t - 1 - lead >= 0) rows.load(t - 1 - lead, fetched);
        if (!KVF_BOUNDED) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                u32 rest;
                residual[k] = split(Rows<CPL>::value(row_bits, k), rest) - base[k] * (1 << LOW_BITS);
#pragma unroll
                for (int p = 0; p < PLANES; ++p)
                    if (k < rows.count) row[planes_at + (p * tokens + t) * channels + lane * CPL + k] = (u8)(rest >> (8 * p));
            }
        } else if (fixed) {
            missing = 0;
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                bool exact;
                residual[k] = quantise(Rows<CPL>::value(row_bits, k), quantiser[k], exact) - base[k];
                missing |= (u32)exact << k;
            }
        } else {
            exact_mask = 0;
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                bool exact = false;
                int before = t > 0 ? quantise(Rows<CPL>::value(row_bits, k), quantiser[k], exact) : base[k];
                residual[k] = code[k] - before;
                code[k] = before;
                exact_mask |= (u32)exact << k;
            }
        }
#pragma unroll
        for (int k = CPL - 1; k >= 0; --k) {
            int rounded = residual[k];
            if (low_mask >> k & 1) {
                rounded += KVF_BOUNDED ? (1 << shift[k]) >> 1 : 0;
                if (shift[k]) low[k].put(t, rounded & ((1 << shift[k]) - 1));
                rounded >>= shift[k];
            }
            // The first and the last entry of a table are empty: what lies outside it finds nothing there.
            const int column = min(max(rounded + (KVF_BOUNDED ? ALPHABET / 2 : 0), 0), ALPHABET - 1);
            const uint2 *entries = tables + table[k] * ALPHABET;
            uint2 entry = entries[column];
            if (entry.y == 0) {
                missing |= 1u << k;
                entry = entries[KVF_BOUNDED ? ALPHABET / 2 : 0];
            }
            // entry: x = reciprocal; y = frequency (11 bits), bias (11), shift of the reciprocal (4)
            const u32 frequency = entry.y & 2047, bias = entry.y >> 11 & 2047;
            const bool full = state >> (32 - PROB_BITS) >= frequency;
            const u32 mask = __ballot_sync(FULL, full);
            words_at_end -= __popc(mask);
            if (full) {
                words_end[words_at_end + __popc(mask & below)] = (u16)state;
                state >>= 16;
            }
            const u32 quotient = __umulhi(state, entry.x) >> (entry.y >> 22);
            state += bias + quotient * (PROB_SCALE - frequency);
        }
        missing &= (1u << rows.count) - 1;
        if (__any_sync(FULL, missing)) {
            int total, at = exclusive_sum(__popc(missing), lane, total);
            exact_positions -= total;
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                if (missing >> k & 1) exact_positions[at++] = (u16)(t * channels + lane * CPL + k);
        }
#pragma unroll
        for (int i = 0; i < Rows<CPL>::PACKED; ++i) row_bits[i] = fetched[i];
    }
#pragma unroll
    for (int k = 0; k < CPL; ++k)
        if (shift[k]) low[k].finish();
    if (lane < lanes) *(u32 *)(row + 16 + 4 * lane) = state;

    // 5. What the coder made, to its place.
    const u16 *words = words_end + words_at_end;
    const int num_words = -words_at_end, num_exact = (int)(exact_end - exact_positions);
    const int positions_at = words_at + pad4(2 * num_words), exact_at = positions_at + pad4(2 * num_exact);
    const int size = exact_at + pad4(KVF_ITEM * num_exact);
    if (size >= raw_size) return put_raw(src, tile, tokens, channels, row, lane);
    __syncwarp();
    u32 *out_words = (u32 *)(row + words_at);
    u16 *out_positions = (u16 *)(row + positions_at);
#pragma unroll 4
    for (int i = lane; i < (num_words + 1) / 2; i += 32)
        out_words[i] = words[2 * i] | (2 * i + 1 < num_words ? (u32)words[2 * i + 1] << 16 : 0u);
    word_t *out_exact = (word_t *)(row + exact_at);
    for (int i = lane; i < pad4(2 * num_exact) / 2; i += 32) out_positions[i] = i < num_exact ? exact_positions[i] : (u16)0;
    for (int i = lane; i < pad4(KVF_ITEM * num_exact) / KVF_ITEM; i += 32)
        out_exact[i] = i < num_exact ? value_at(src, tile, channels, exact_positions[i]) : (word_t)0;
    if (lane == 0) {
        u32 *header = (u32 *)row;
        header[0] = 1u | (u32)base_code << 8 | (u32)class_code << 16 | (u32)least_class << 24;
        header[1] = (u32)num_words | (u32)num_exact << 16;
        header[2] = (u32)least_base;
        header[3] = KVF_BOUNDED && !channel_steps ? __float_as_uint(quantiser[0].step) : 0u;
    }
    return size;
}

extern "C" __global__ void __launch_bounds__(256) kvf_encode(Source src, const Quantiser *quantisers, int mode, int channel_steps,
                                                             const uint2 *tables, const int *radius, u8 *scratch, i64 row_bytes,
                                                             int *sizes) {
    __shared__ uint2 shared_tables[NUM_TABLES * ALPHABET];
    __shared__ u32 staged[8][128];
    for (int i = threadIdx.x; i < NUM_TABLES * ALPHABET; i += blockDim.x) shared_tables[i] = tables[i];
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int tile = blockIdx.x * warps + warp; tile < src.num_tiles; tile += gridDim.x * warps) {
        u8 *row = scratch + tile * row_bytes;
        int size = 0;
#define KVF_ENCODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        size = encode_tile<CPL>(src, tile, quantisers, mode, channel_steps, shared_tables, radius, row, (int)row_bytes,    \
                                staged[warp], lane);                                                                        \
        break
        switch ((src.channels[tile] + 31) / 32) {
            KVF_ENCODE(1);
            KVF_ENCODE(2);
            KVF_ENCODE(3);
            KVF_ENCODE(4);
        }
        __syncwarp();
        if (lane == 0) sizes[tile] = size;
    }
}

constexpr int RING_BLOCKS = 4;

struct Stream {
    const u8 *planes;
    const u32 *words;  // two words each
    int num_words;

    __device__ Stream(const u8 *in, int planes_at, int words_at, int count)
        : planes(in + planes_at), words((const u32 *)(in + words_at)), num_words(count) {}
    // Words 64*block + 2*lane and the next one; 0 behind the end.
    __device__ __forceinline__ u32 pair(int block, int lane) const {
        const int i = 32 * block + lane;
        return 2 * i < num_words ? words[i] : 0u;
    }
};

// The tokens of a tile, in order. Returns whether the lane ended as it must. LOW: some channel has raw low bits.
//
// Words come through a ring of four blocks of 64 in shared memory, and a fifth waits in a register: reading them from memory
// when they are needed would put a memory latency into every other step of the chain. A row takes at most 128 words, so the
// ring is filled up once a row.
template <int CPL, bool LOW>
__device__ __forceinline__ bool decode_rows(const Rows<CPL> &rows, const Stream &stream, int tokens, int channels, int mode,
                                            const int (&table)[CPL], const int (&shift)[CPL], const int (&base)[CPL],
                                            const float (&step)[CPL], const u32 *const (&low)[CPL], u32 state, const u32 *slots,
                                            u32 *ring, int lane) {
    const u32 below = (1u << lane) - 1;
    const int keep = mode == FIXED ? 0 : -1;  // differences add up
    int taken = 0, filled = RING_BLOCKS, code[CPL] = {}, add[CPL];
    const u32 *table_slots[CPL];
    u32 low_mask = 0;
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        add[k] = base[k];
        table_slots[k] = slots + table[k] * PROB_SCALE;
        if (LOW) low_mask |= (u32)__any_sync(FULL, shift[k]) << k;
    }
    __syncwarp();
#pragma unroll
    for (int block = 0; block < RING_BLOCKS; ++block) ring[32 * block + lane] = stream.pair(block, lane);
    u32 waiting = stream.pair(RING_BLOCKS, lane);
    __syncwarp();
    const u16 *ring_words = (const u16 *)ring;
    for (int t = 0; t < tokens; ++t) {
        while (taken > 64 * (filled - 2)) {  // fewer than 128 words ahead: the oldest block is used up
            __syncwarp();
            ring[32 * (filled % RING_BLOCKS) + lane] = waiting;
            ++filled;
            waiting = stream.pair(filled, lane);
            __syncwarp();
        }
        u32 v[CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            // slot: symbol (8 bits, signed), frequency (12), bias (12)
            const u32 slot = table_slots[k][state & (PROB_SCALE - 1)];
            state = (slot >> 12 & 0xfff) * (state >> PROB_BITS) + (slot & 0xfff);
            const bool need = state < STATE_LOW;
            const u32 mask = __ballot_sync(FULL, need);
            if (need) state = state << 16 | ring_words[(taken + __popc(mask & below)) % (64 * RING_BLOCKS)];
            taken += __popc(mask);
            int value = (int)slot >> 24;
            if (LOW && (low_mask >> k & 1) && shift[k]) {
                const int bit = t * shift[k];
                const u32 *p = low[k] + (bit >> 5);
                u32 bits = p[0] >> (bit & 31);
                if ((bit & 31) + shift[k] > 32) bits |= p[1] << (32 - (bit & 31));
                value = value * (1 << shift[k]) + (int)(bits & ((1u << shift[k]) - 1)) - (KVF_BOUNDED ? (1 << shift[k]) >> 1 : 0);
            }
            if (KVF_BOUNDED) {
                code[k] = (code[k] & keep) + value + add[k];
                v[k] = as_word(__fmul_rn(whole(code[k]), step[k]));
            } else {
                u32 bytes = 0;
#pragma unroll
                for (int p = 0; p < PLANES; ++p)
                    if (k < rows.count) bytes |= (u32)stream.planes[(p * tokens + t) * channels + lane * CPL + k] << (8 * p);
                v[k] = join(value + base[k] * (1 << LOW_BITS), bytes);
            }
        }
        rows.store(t, v);
        if (keep) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) add[k] = 0;
        }
    }
    return state == STATE_LOW && taken == stream.num_words;
}

template <int CPL>
__device__ bool decode_tile(const Source &dst, int tile, const u8 *in, int size, int mode, bool channel_steps, const u32 *slots,
                            u32 *ring, int lane) {
    const int tokens = dst.tokens[tile], channels = dst.channels[tile];
    const int raw_size = 4 + pad4(tokens * channels * KVF_ITEM);
    if (size < 4) return false;
    if (in[0] == 0) {
        if (size != raw_size) return false;
        const word_t *values = (const word_t *)(in + 4);
        for (int i = lane; i < tokens * channels; i += 32) value_at(dst, tile, channels, i) = values[i];
        return true;
    }
    const int lanes = (channels + CPL - 1) / CPL;
    const int planes_at = 16 + 4 * lanes;
    const int steps_at = planes_at + pad4(PLANES * tokens * channels);
    const int classes_at = steps_at + (channel_steps ? pad4(2 * channels) : 0);
    if (in[0] != 1 || size < classes_at || size >= raw_size) return false;
    const u32 *header = (const u32 *)in;
    const int base_code = header[0] >> 8 & 255, class_code = header[0] >> 16 & 255, least_class = header[0] >> 24;
    const int num_words = header[1] & 0xffff, num_exact = header[1] >> 16;
    if (base_code > 4 || class_code > 2) return false;
    const int bases_at = classes_at + pad4((channels * small_bits(class_code) + 7) / 8);
    if (size < bases_at) return false;

    const Rows<CPL> rows(dst, tile, lane, channels);
    int table[CPL], shift[CPL], base[CPL], my_bases = 0, my_words = 0;
    bool has_base[CPL], good = true;
    float step[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        const int c = lane * CPL + k;
        const bool exists = k < rows.count;
        int klass = exists ? (int)get_small(in + classes_at, c, class_code) + least_class : 0;
        has_base[k] = exists && (!KVF_BOUNDED || mode == FIXED);
        if (mode == OUTLIER) {
            has_base[k] = exists && (klass & 1);
            klass >>= 1;
        }
        good &= klass <= (KVF_BOUNDED ? MAX_CLASS : LAST_ONE_SIDED);
        table_and_shift(good ? klass : 0, table[k], shift[k]);
        if (!exists) {
            table[k] = IDLE_TABLE;
            shift[k] = 0;
        }
        my_bases += has_base[k];
        my_words += (tokens * shift[k] + 31) >> 5;
        step[k] = __uint_as_float(header[3]);
        if (channel_steps && exists) step[k] = __uint_as_float((u32)((const u16 *)(in + steps_at))[c] << 16);
    }
    if (!__all_sync(FULL, good)) return false;
    int num_bases, low_words;
    int base_index = exclusive_sum(my_bases, lane, num_bases);
    int low_index = exclusive_sum(my_words, lane, low_words);
    const int low_at = bases_at + pad4((num_bases * small_bits(base_code) + 7) / 8);
    const int words_at = low_at + 4 * low_words;
    const int positions_at = words_at + pad4(2 * num_words), exact_at = positions_at + pad4(2 * num_exact);
    if (size != exact_at + pad4(KVF_ITEM * num_exact)) return false;
    const u32 *low[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        base[k] = has_base[k] ? (int)(get_small(in + bases_at, base_index, base_code) + header[2]) : 0;
        base_index += has_base[k];
        low[k] = (const u32 *)(in + low_at) + low_index;
        low_index += (tokens * shift[k] + 31) >> 5;
    }

    u32 state = lane < lanes ? header[4 + lane] : STATE_LOW;
    bool any_low = false;
#pragma unroll
    for (int k = 0; k < CPL; ++k) any_low |= shift[k] != 0;
    const Stream stream(in, planes_at, words_at, num_words);
    if (LOW_BITS || __any_sync(FULL, any_low))
        good = decode_rows<CPL, true>(rows, stream, tokens, channels, mode, table, shift, base, step, low, state, slots, ring, lane);
    else
        good = decode_rows<CPL, false>(rows, stream, tokens, channels, mode, table, shift, base, step, low, state, slots, ring, lane);
    __syncwarp();
    const u16 *positions = (const u16 *)(in + positions_at);
    const word_t *exact = (const word_t *)(in + exact_at);
    for (int i = lane; i < num_exact; i += 32) {
        if (positions[i] < tokens * channels) value_at(dst, tile, channels, positions[i]) = exact[i];
        else good = false;
    }
    return __all_sync(FULL, good);
}

// Tiles at `starts` of `payload`, `sizes` bytes each, into `dst`; status[tile] = 1 where the bytes contradict themselves.
extern "C" __global__ void __launch_bounds__(512, 2) kvf_decode(Source dst, const u8 *payload, const i64 *starts, const int *sizes, int mode,
                                                             int channel_steps, const u32 *slots, int *status) {
    extern __shared__ u32 shared_slots[];
    __shared__ u32 ring[16][32 * RING_BLOCKS];
    for (int i = threadIdx.x; i < NUM_TABLES * PROB_SCALE / 4; i += blockDim.x) ((uint4 *)shared_slots)[i] = ((const uint4 *)slots)[i];
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int tile = blockIdx.x * warps + warp; tile < dst.num_tiles; tile += gridDim.x * warps) {
        const u8 *in = payload + starts[tile];
        bool good = false;
#define KVF_DECODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        good = decode_tile<CPL>(dst, tile, in, sizes[tile], mode, channel_steps, shared_slots, ring[warp], lane);           \
        break
        switch ((dst.channels[tile] + 31) / 32) {
            KVF_DECODE(1);
            KVF_DECODE(2);
            KVF_DECODE(3);
            KVF_DECODE(4);
        }
        __syncwarp();
        if (lane == 0) status[tile] = good ? 0 : 1;
    }
}
