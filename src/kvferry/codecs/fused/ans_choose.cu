// From values to integers, and the base and class of each channel. Behind ans_common.cu, before ans_encode.cu.

struct Quantiser {
    float step, inverse, bound;
};

__device__ __forceinline__ float deliver(float code, float step) { return as_float(as_word(__fmul_rn(code, step))); }

// |x - y| <= bound in exact arithmetic: the rounded difference decides unless it equals the bound.
__device__ __forceinline__ bool within(float x, float y, float bound) {
    float d = x - y, size = fabsf(d);
    if (size < bound) return true;
    if (!(size == bound)) return false;
    float part = d - x, error = (x - (d - part)) - (y + part);
    return d > 0 ? error <= 0 : error >= 0;
}

// What to do about a value whose nearest code misses the bound, or meets it exactly: 0 keep the code, +1 or -1 take the next
// one, 2 store the value. Rare, so kept out of line.
__device__ __noinline__ int second_chance(float x, float code, float step, float bound) {
    float y = deliver(code, step);
    if (within(x, y, bound)) return 0;
    float towards = x > y ? 1.0f : -1.0f;
    return within(x, deliver(code + towards, step), bound) ? (int)towards : 2;
}

__device__ __forceinline__ int first_guess(u32 word, const Quantiser &q) {
    float scaled = __fmul_rn(as_float(word), q.inverse);
    return fabsf(scaled) < 4194304.0f ? __float_as_int(scaled + ROUNDER) - ROUNDER_BITS : 0;
}

// The code, and whether the value is to be stored in its own bits.
__device__ __forceinline__ int quantise(u32 word, const Quantiser &q, bool &exact) {
    float x = as_float(word), scaled = __fmul_rn(x, q.inverse);
    const bool usable = fabsf(scaled) < 4194304.0f;
    const float rounded = usable ? scaled + ROUNDER : ROUNDER;
    int code = __float_as_int(rounded) - ROUNDER_BITS;
    exact = !(fabsf(x - deliver(rounded - ROUNDER, q.step)) < q.bound);
    if (exact && usable) {
        const int change = second_chance(x, rounded - ROUNDER, q.step, q.bound);
        exact = change == 2;
        if (!exact) code += change;
    }
    // Denormal (magnitude 1 to MANTISSA_MASK) or negative zero.
    exact |= (word & ((1u << TOP_BIT) - 1)) - 1 < MANTISSA_MASK || word == 1u << TOP_BIT;
    return code;
}

// The lossless split: minus the exponent above the low bits, and the bytes for the planes.
__device__ __forceinline__ int split(u32 word, u32 &rest) {
    u32 joined = (word >> TOP_BIT) << KVF_MANTISSA | (word & MANTISSA_MASK);
    rest = joined;
    return -(int)((word >> KVF_MANTISSA) & EXPONENT_MASK) * (1 << LOW_BITS) + (int)(joined >> (8 * PLANES));
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

__device__ __forceinline__ int warp_min(int v) { return __reduce_min_sync(FULL, v); }
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(FULL, v); }

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

// Calls body(t, row) for every token in order, loading AHEAD rows before the first is used: the loads hide one another's latency.
template <int CPL, typename Body>
__device__ __forceinline__ void for_rows(const Rows<CPL> &rows, int tokens, Body body) {
    constexpr int AHEAD = 8;
    for (int start = 0; start < tokens; start += AHEAD) {
        u32 packed[AHEAD][Rows<CPL>::PACKED] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < tokens) rows.load(start + i, packed[i]);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < tokens) body(start + i, packed[i]);
    }
}

// A tile that does not shrink: its values in their own bits.
__device__ int put_raw(const Source &s, int tile, int tokens, int channels, u8 *row, int lane) {
    int count = tokens * channels, size = 4 + pad4(count * KVF_ITEM);
    if (lane == 0) *(u32 *)row = 0;
    word_t *out = (word_t *)(row + 4);
    for (int i = lane; i < (size - 4) / KVF_ITEM; i += 32) out[i] = i < count ? value_at(s, tile, channels, i) : (word_t)0;
    return size;
}

// Base and class of each channel of a lane, by the rules of packing/ans/classes.py.
template <int CPL>
struct Choice {
    int base[CPL] = {}, klass[CPL] = {};
    u32 apart = 0;  // bit k: channel k's first value is kept apart

    __device__ __forceinline__ bool has_base(int k) const { return KVF_BASES == ALL || apart >> k & 1; }
    __device__ __forceinline__ int stored(int k) const { return KVF_BASES == APART ? 2 * klass[k] + (apart >> k & 1) : klass[k]; }
};

template <int CPL>
__device__ __forceinline__ Choice<CPL> choose(const Rows<CPL> &rows, int tokens, const Quantiser (&quantiser)[CPL], const int *radius) {
    Choice<CPL> choice;
    if constexpr (!KVF_BOUNDED) {
        int largest[CPL] = {}, total[CPL] = {}, counted[CPL] = {};
        for_rows(rows, tokens, [&](int, const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const int e = (Rows<CPL>::value(row, k) >> KVF_MANTISSA) & EXPONENT_MASK;
                largest[k] = max(largest[k], e);
                total[k] += e;
                counted[k] += e > 0;
            }
        });
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            choice.base[k] = -largest[k];
            choice.klass[k] = min(LAST_ONE_SIDED, 5 * (largest[k] * counted[k] - total[k]) / max(counted[k], 1));
        }
    } else if constexpr (!DELTA) {
        int sum[CPL] = {};
        i64 squares[CPL] = {};
        for_rows(rows, tokens, [&](int, const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const int q = first_guess(Rows<CPL>::value(row, k), quantiser[k]);
                sum[k] += q;
                squares[k] += (i64)q * q;
            }
        });
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const int numerator = 2 * sum[k] + tokens;
            choice.base[k] = numerator / (2 * tokens) - (numerator % (2 * tokens) < 0);
            choice.klass[k] = spread_class(tokens * squares[k] - (i64)sum[k] * sum[k], tokens);
        }
    } else {
        int first[CPL] = {}, previous[CPL] = {}, reach[CPL] = {};
        i64 squares[CPL] = {};  // of all differences but the first
        for_rows(rows, tokens, [&](int t, const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                bool exact;
                const int q = quantise(Rows<CPL>::value(row, k), quantiser[k], exact), r = t == 0 ? 0 : q - previous[k];
                if (t == 0) first[k] = q;
                previous[k] = q;
                squares[k] += (i64)r * r;
                reach[k] = max(reach[k], abs(r));
            }
        });
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            int whole = spread_class(tokens * (squares[k] + (i64)first[k] * first[k]), tokens);
            choice.klass[k] = whole = reach_class(whole, max(reach[k], abs(first[k])), radius);
            if (KVF_BASES == APART) {
                const int without = reach_class(spread_class(tokens * squares[k], tokens), reach[k], radius);
                if ((whole - without) * tokens > 48) {
                    choice.apart |= 1u << k;
                    choice.klass[k] = without;
                    choice.base[k] = first[k];
                }
            }
        }
    }
    return choice;
}
