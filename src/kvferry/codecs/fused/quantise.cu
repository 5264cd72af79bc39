// The quantiser: steps from bounds, codes from values, the test of the bound; and the split of exact codecs. Behind common.cu.

struct Quantiser {
    float step, inverse, bound;
};

template <int CPL>
struct Quantisers {  // of a lane's channels
    Quantiser each[CPL];
};

// Where a tile's bound comes from: `relative` (if above 0) times the range of its values, else `bounds` of its line (of the tile itself
// where there are no pages, or with `per_tile`), else `bound`. Codecs without a bound use none of it.
struct Bounds {
    const float *bounds;
    double relative;
    float bound;
    int per_tile;
    // Whether a chunk's largest bound is known from these alone.
    __device__ __forceinline__ bool foreseen() const { return !(relative > 0.0) && (!bounds || (SLOTS && !per_tile)); }
};

__shared__ Bounds the_bounds;

// It then, in all lanes.
__device__ __forceinline__ float largest_bound(const Bounds &how, int num_lines, int lane) {
    if (!how.bounds) return how.bound;
    int most = 0;  // floats that are not negative are in the order of their bits
    for (int line = lane; line < num_lines; line += 32) most = max(most, __float_as_int(how.bounds[line]));
    return __int_as_float(warp_max(most));
}

constexpr float LARGEST_BOUND = 8.507059173023462e37f, SMALLEST_STEP = 7.888609052210118e-31f;  // 2**126, 2**-100

__device__ __forceinline__ float loosened(float bound, float looser) { return fminf(__fmul_rn(bound, looser), LARGEST_BOUND); }

constexpr int LEVELS = 6;

// The largest step, up to `step`, at which every code's value is within `bound`, where values lie `unit` apart (the level's).
__device__ __forceinline__ float step_at(int level, float bound, int typical, float step) {
    const int field = typical - KVF_MANTISSA - level;
    if (field < 1 || field > 254) return step;
    // Divided by a power of two: of the largest one the inverse is denormal, and 0 does as well, since no bound is that large.
    const float unit = __uint_as_float((u32)field << 23), inverse = __uint_as_float((u32)(254 - field) << 23);
    const float count = floorf(__fmul_rn(bound, inverse)), limit = __fmul_rn(__fadd_rn(__fmul_rn(2.0f, count), 1.0f), unit);
    return count < 2097152.0f && limit < step ? limit : step;
}

// codecs/bounded/steps.py, step_from_bound. `typical`: the mean biased exponent (as float32) plus two. Where all lanes have the same bound,
// each of them looks at a level.
__device__ Quantiser quantiser_of(float bound, int typical) {
    Quantiser q;
    q.bound = bound;
    q.step = __fmul_rn(2.0f, bound);
    if constexpr (CHANNEL_STEPS) {
        for (int level = 0; level < LEVELS; ++level) q.step = step_at(level, bound, typical, q.step);
    } else {
        // Floats that are not negative are in the order of their bits.
        q.step = __int_as_float(warp_min(__float_as_int(step_at(min((int)threadIdx.x & 31, LEVELS - 1), bound, typical, q.step))));
    }
    if (CHANNEL_STEPS) q.step = __uint_as_float(__float_as_uint(q.step) & 0xffff0000u);
    if (!(q.step >= SMALLEST_STEP)) q.step = 0.0f;
    q.inverse = q.step > 0.0f ? __fdiv_rn(1.0f, q.step) : 0.0f;
    return q;
}

// steps.py, bound_from_range and round_down.
__device__ float bound_of_range(float low, float high, double relative) {
    double width = (double)high - (double)low;
    if (!(width > 0.0)) width = 0.0;
    const double bound = __dmul_rn(__dmul_rn(width, relative), 1.0 - 8.8817841970012523e-16);
    float nearest = __double2float_rn(bound);
    if ((double)nearest > bound) nearest = __uint_as_float(__float_as_uint(nearest) - 1);
    return fminf(nearest, LARGEST_BOUND);
}

// From the range of a tile's, or of each channel's, finite values.
template <int CPL>
__device__ __forceinline__ void range_quantisers(int tokens, const Rows<CPL> &rows, double relative, float looser, int typical,
                                                 Quantiser (&quantiser)[CPL]) {
    float low[CPL], high[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        low[k] = __uint_as_float(0x7f800000u);
        high[k] = __uint_as_float(0xff800000u);
    }
    for (int t0 = 0; t0 < tokens; t0 += 4) {
        u32 row[4][Rows<CPL>::PACKED];
        rows.load_rows(rows.group(t0), t0, tokens, row);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const float x = Rows<CPL>::number(row[i], k);
                if (t0 + i < tokens && k < rows.count && fabsf(x) < __uint_as_float(0x7f800000u)) {
                    low[k] = fminf(low[k], x);
                    high[k] = fmaxf(high[k], x);
                }
            }
    }
    if constexpr (!CHANNEL_STEPS) {
        float least = low[0], most = high[0];
#pragma unroll
        for (int k = 1; k < CPL; ++k) {
            least = fminf(least, low[k]);
            most = fmaxf(most, high[k]);
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            least = fminf(least, __shfl_xor_sync(FULL, least, d));
            most = fmaxf(most, __shfl_xor_sync(FULL, most, d));
        }
        const Quantiser q = quantiser_of(loosened(bound_of_range(least, most, relative), looser), typical);
#pragma unroll
        for (int k = 0; k < CPL; ++k) quantiser[k] = q;
    } else {
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            quantiser[k] = quantiser_of(loosened(bound_of_range(low[k], high[k], relative), looser), typical);
    }
}

template <int CPL>
__device__ __forceinline__ void make_quantisers(const Source &s, const Tile &tile, const Rows<CPL> &rows, const Bounds &how, float looser,
                                                Quantiser (&quantiser)[CPL], int lane) {
    // Every eighth token's exponents.
    int exponents = 0;
    const auto add = [&](const u32(&row)[Rows<CPL>::PACKED]) {
#pragma unroll
        for (int k = 0; k < CPL; ++k) exponents += k < rows.count ? __float_as_uint(Rows<CPL>::number(row, k)) >> 23 & 255 : 0;
    };
    if (rows.vector && tile.tokens == TILE_TOKENS) {
        u32 row[TILE_TOKENS / 8][Rows<CPL>::PACKED];
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; ++i) {
            const u8 *p = rows.group(8 * i);
#pragma unroll
            for (int j = 0; j < Rows<CPL>::PACKED; ++j) row[i][j] = 0;
            if (p && rows.count) load_global<Rows<CPL>::WIDTH>(p, row[i]);
        }
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; ++i) add(row[i]);
    } else {
#pragma unroll 1
        for (int t = 0; t < tile.tokens; t += 8) {
            u32 row[Rows<CPL>::PACKED];
            rows.load_row(t, row);
            add(row);
        }
    }
    const int sampled = (tile.tokens + 7) / 8 * tile.channels;
    const int typical = warp_sum(exponents) / max(sampled, 1) + 2;
    if (!(how.relative > 0.0)) {
        const float asked = how.bounds ? how.bounds[SLOTS && !how.per_tile ? tile.local % s.num_lines : tile.index] : how.bound;
        const Quantiser q = quantiser_of(loosened(asked, looser), typical);
#pragma unroll
        for (int k = 0; k < CPL; ++k) quantiser[k] = q;
        return;
    }
    range_quantisers<CPL>(tile.tokens, rows, how.relative, looser, typical, quantiser);
}

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

// Denormal (magnitude 1 to MANTISSA_MASK) or negative zero: to be stored in its own bits.
__device__ __forceinline__ bool special(u32 word) {
    return (word & ((1u << TOP_BIT) - 1)) - 1 < MANTISSA_MASK || word == 1u << TOP_BIT;
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
    exact |= special(word);
    return code;
}

// The lossless split: minus the exponent above the low bits, and the bytes for the planes.
__device__ __forceinline__ int split(u32 word, u32 &rest) {
    u32 joined = (word >> TOP_BIT) << KVF_MANTISSA | (word & MANTISSA_MASK);
    rest = joined;
    return -(int)((word >> KVF_MANTISSA) & EXPONENT_MASK) * (1 << LOW_BITS) + (int)(joined >> (8 * PLANES));
}
