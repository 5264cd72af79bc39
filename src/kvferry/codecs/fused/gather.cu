// Tensor to bytes: a tile's values as one byte each in shared memory, with bases and classes on the way. Behind choose.cu.
//
// A channel's codes nearly always lie within 127 of its first one (transform coefficients: of 0), so a byte holds the distance. Where they do not
// (but see WIDE), or where a value is special (NaN, infinity, denormal, negative zero), the tile takes the slow way: its values go through the whole
// quantiser each time they are needed. Four tokens of a channel share a word: word (t/4 * 32 + lane) * CPL + k.

// Whether bytes are counted from 0.
constexpr bool AROUND_ZERO = BOUNDED && SLOTS && !PAGED;
// Bytes of the lossless split, and its other direction: value + ORIGIN.
constexpr int ORIGIN = LOSSLESS ? (int)(EXPONENT_MASK << LOW_BITS) : 0;

// Shared memory of a warp.
constexpr int CODE_BYTES = TILE_TOKENS * 128, EXACT_WORDS = TILE_TOKENS * 128 / 32;
// `small`: the list of repairs, then classes and behind them bases of all groups; ORIGINS_AT: what the bytes of each channel are counted from; that
// done with, LOW_SUM_AT: the checksum of what low bits each lane wrote.
constexpr int BASES_AT = 128 * NUM_GROUPS, ORIGINS_AT = 2 * BASES_AT, LOW_SUM_AT = ORIGINS_AT, SMALL_WORDS = ORIGINS_AT + 128;
constexpr int STAGE_BYTES = CODE_BYTES + 4 * EXACT_WORDS + 4 * SMALL_WORDS;

struct Stage {
    u32 codes;   // address: CODE_BYTES
    u32 *exact;  // a bit for each value: stored in its own bits
    u32 *small;  // what few lanes need, or not soon: SMALL_WORDS

    __device__ __forceinline__ u32 exact_at(int word) const { return codes + CODE_BYTES + 4 * word; }  // addresses of the same
    __device__ __forceinline__ u32 small_at(int word) const { return exact_at(EXACT_WORDS + word); }
    // Code = byte + origin, of a channel.
    __device__ __forceinline__ int origin(int channel) const { return BOUNDED ? (int)load_shared(small_at(ORIGINS_AT + channel)) - ROUNDER_BITS : -ORIGIN; }
};

__device__ __forceinline__ void mark_exact(const Stage &stage, int position) { atomicOr(stage.exact + (position >> 5), 1u << (position & 31)); }

// Watches for values that must be stored in their own bits: denormals and negative zeros. NaN and infinities have no byte.
struct Specials {
    // 16 bits: of both halves, the least but one (so that 0 is the largest) and, signed, the least; 32 bits: `least` of the bits turned left
    // by one, less one.
    u32 least = FULL, lowest = 0;

    __device__ __forceinline__ void see(u32 packed) {
#if KVF_ITEM == 2
        least = min_halves_before(packed, least);
        lowest = min_signed_halves(packed, lowest);
#else
        least = min(least, __funnelshift_l(packed, packed, 1) - 1);
#endif
    }
    __device__ __forceinline__ bool any() const {
#if KVF_ITEM == 2
        const u32 negative = lowest ^ 0x80008000u;
        return min(least & 0xffff, least >> 16) < MANTISSA_MASK || min(negative & 0xffff, negative >> 16) <= MANTISSA_MASK;
#else
        return least < ((MANTISSA_MASK << 1) | 1);
#endif
    }
};

// What became of a tile: whether its codes are in the bytes (`wide`: only those that fit; of the others, what is left of them), and any value
// is stored in its own bits.
struct Gathered {
    bool fast, wide, any_exact;
};

// How many times four rows are on their way. More than once hides more of their latency, and takes registers that cost more.
constexpr int AHEAD = 1;

// Rows with values whose nearest code may miss the bound are listed, and looked at after the rest: few, but each waits for memory.
constexpr int REPAIRS = ORIGINS_AT - 1;  // small[REPAIRS] counts them; an entry is token << 8 | lane

__device__ __noinline__ void list_repairs(u32 *small, int t0, u32 missed, int lane) {
#pragma unroll 1
    for (; missed; missed &= missed - 1) {
        const u32 i = atomicAdd(small + REPAIRS, 1u);
        if (i < REPAIRS) small[i] = (u32)(t0 + __ffs(missed) - 1) << 8 | lane;
    }
}

// Gives what misses the bound the next code, or marks it to be stored in its own bits. False where a byte cannot hold a code, or the list is full.
template <int CPL>
__device__ __noinline__ bool repair(int index, const Quantisers<CHANNEL_STEPS ? CPL : 1> quantisers, const Stage stage, int lane, bool &any_exact) {
    const Source &s = the_source;
    const Tile tile(s, index);
    const int count = (int)stage.small[REPAIRS];
    if (count > REPAIRS) return false;
    bool good = true;
#pragma unroll 1
    for (int first = 0; first < count; first += 32) {
        const bool mine = first + lane < count;
        const u32 entry = mine ? stage.small[first + lane] : 0;
        const int owner = entry & 31, t = entry >> 8;
        const u8 *row = mine ? tile.row(s, t) : nullptr;
        float x[CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) x[k] = row && owner * CPL + k < tile.channels ? as_float(*(const word_t *)(row + (owner * CPL + k) * tile.channel_bytes)) : 0.0f;
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const int c = owner * CPL + k;
            Quantiser q = quantisers.each[CHANNEL_STEPS ? k : 0];
            if (CHANNEL_STEPS) {
                q.step = __shfl_sync(FULL, q.step, owner);
                q.bound = __shfl_sync(FULL, q.bound, owner);
            }
            if (!row || c >= tile.channels) continue;
            const u32 address = stage.codes + ((t / 4 * 32 + owner) * CPL + k) * 4 + t % 4;
            const int byte = (int)load_shared_u8(address);
            const float code = (float)(byte + (int)stage.small[ORIGINS_AT + c] - ROUNDER_BITS);
            if (fabsf(x[k] - deliver(code, q.step)) < q.bound) continue;
            const int change = second_chance(x[k], code, q.step, q.bound);
            if (change == 2) {
                mark_exact(stage, t * tile.channels + c);
                any_exact = true;
            } else {
                good &= (u32)(byte + change) < 256;
                store_shared_u8(address, (u32)(byte + change));
            }
        }
    }
    __syncwarp();
    return good;
}

// Bases and classes from the bytes (`ans` in the mode `fixed` takes them from first guesses, on the way).
template <int CPL>
__device__ __forceinline__ void summarise(int tokens, const int *radius, const Stage &stage, int lane, Choice<CPL> &choice) {
    choice.apart = 0;
#pragma unroll 1
    for (int b = 0; b < NUM_GROUPS; ++b) {
        const int length = min(GROUP, tokens - b * GROUP);
        if (length <= 0) break;
        u32 sum[CPL], squares[CPL], reach[CPL], least[CPL], most[CPL];
        int first[CPL], previous[CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            sum[k] = squares[k] = reach[k] = most[k] = 0;
            least[k] = 0x00ff00ffu;
            first[k] = previous[k] = 0;
        }
#pragma unroll 1
        for (int t0 = b * GROUP; t0 < b * GROUP + length; t0 += 4) {
            u32 packed[CPL];
            load_shared_words<CPL>(stage.codes + (t0 / 4 * 32 + lane) * CPL * 4, packed);
            const int behind = max(0, t0 + 4 - tokens);
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                if constexpr (DELTA) {
                    if (t0 == b * GROUP) {
                        first[k] = (int)(packed[k] & 255) + stage.origin(lane * CPL + k);
                        previous[k] = packed[k] & 255;
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int byte = __byte_perm(packed[k], 0, 0x4440 + i);
                        int r = byte - previous[k];
                        if (behind && i >= 4 - behind) r = 0;
                        previous[k] = byte;
                        if (ANS) squares[k] += (u32)(r * r);
                        reach[k] = max(reach[k], ANS ? (u32)abs(r) : zigzag(r));
                    }
                } else {
                    // Two bytes at a time; behind the last token its byte is taken again.
                    u32 bytes = packed[k];
                    if (behind) {
                        const u32 last = (bytes >> (8 * (3 - behind)) & 255) * 0x01010101u, keep = FULL >> (8 * behind);
                        bytes = (bytes & keep) | (last & ~keep);
                    }
                    const u32 even = bytes & 0x00ff00ffu, odd = bytes >> 8 & 0x00ff00ffu;
                    least[k] = min_halves(min_halves(least[k], even), odd);
                    most[k] = max_halves(max_halves(most[k], even), odd);
                    if (ANS) sum[k] = dot4(packed[k] >> LOW_BITS & (0x01010101u * (255u >> LOW_BITS)), 0x01010101u, sum[k]);
                }
            }
        }
        Choice<CPL> chosen;
        chosen.apart = 0;
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const int low = (int)min(least[k] & 0xffff, least[k] >> 16), high = (int)max(most[k] & 0xffff, most[k] >> 16);
            if constexpr (LOSSLESS && ANS) {
                // byte >> LOW_BITS is EXPONENT_MASK minus the exponent; those of exponent 0 are left out of the mean.
                const int largest_exponent = (int)EXPONENT_MASK - (low >> LOW_BITS);
                const int total = (int)EXPONENT_MASK * length - (int)sum[k];
                int counted = length;
                if (high >> LOW_BITS == EXPONENT_MASK) {
                    counted = 0;
                    for (int t = 0; t < length; ++t)
                        counted += load_shared_u8(stage.codes + ((t / 4 * 32 + lane) * CPL + k) * 4 + t % 4) >> LOW_BITS != EXPONENT_MASK;
                }
                chosen.base[0][k] = -largest_exponent;
                chosen.klass[0][k] = min(LAST_ONE_SIDED, 5 * (largest_exponent * counted - total) / max(counted, 1));
            } else if constexpr (DELTA) {
                chosen.differences(0, k, length, first[k], squares[k], reach[k], radius);
            } else {
                chosen.range(0, k, low + stage.origin(lane * CPL + k), high + stage.origin(lane * CPL + k));
            }
            choice.base[NUM_GROUPS - 1][k] = chosen.base[0][k];
            choice.klass[NUM_GROUPS - 1][k] = chosen.klass[0][k];
            if (b == 0) {
                choice.base[0][k] = chosen.base[0][k];
                choice.klass[0][k] = chosen.klass[0][k];
            }
        }
        choice.apart |= chosen.apart << (CPL * b);
    }
}

// What the distance between a value and what is delivered must not exceed, in bits of the dtype, for the value to be within `bound` without
// a closer look. Distances are rounded to the dtype, but nearly all of them need not be: with the value they are of, what is delivered for
// it has the sign of the value and at most twice its size (P. H. Sterbenz, "Floating-Point Computation", 1974, section 4.3), or is 0. The one
// exception is the code +-1 of a value just below a power of two, delivered as a bit more than twice as much. Its distance may be rounded
// down to that power: where only that separates it from the bound, distances of just the power are looked at too.
__device__ __forceinline__ u32 surely_within(float bound) {
    const u32 nearest = as_word(bound), floor = as_float(nearest) > bound ? nearest - 1 : nearest;
    const bool exact = as_float(floor) == bound, power = (floor & MANTISSA_MASK) == 0;
    // Half-precision values are multiples of 2**-24, so distances up to 0.5 are what floats make of them too, and one that equals the bound is within
    // it. That is common where values are in units of the step (transform coefficients).
    const bool bound_within = KVF_EXPONENT == 5 && bound <= 0.5f;
    return floor == 0 || (exact ? bound_within : !power) ? floor : floor - 1;
}

// Of CENTRED tiles, codes that lie further than a byte reaches, but within WIDE: the values are read and rounded again, for what is made of all
// of them here, and for the columns of those that do not fit (stage_wide).
constexpr int WIDE = 1024, WIDE_BELOW = (WIDE - 256) / 2;
// visit(t, k, code - first code + 128 + WIDE_BELOW), which is below WIDE if the code is within.
template <int CPL, typename Visit>
__device__ __forceinline__ void each_wide_code(int index, const Quantisers<CPL> &quantisers, const Stage &stage, int lane, Visit visit) {
    const Source &s = the_source;
    const Tile tile(s, index);
    const Rows<CPL> rows(s, tile, lane);
    u32 offset[CPL];
    load_shared_words<CPL>(stage.small_at(ORIGINS_AT + lane * CPL), offset);
#pragma unroll 1
    for (int t = 0; t < tile.tokens; ++t) {
        u32 row[Rows<CPL>::PACKED];
        rows.load_row(t, row);
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            visit(t, k, __float_as_uint(__fmul_rn(Rows<CPL>::number(row, k), quantisers.each[k].inverse) + ROUNDER) - offset[k] + WIDE_BELOW);
    }
}
template <int CPL>
struct WideSums {
    u32 sum[CPL], squares[CPL];
    bool good;
};
template <int CPL>
__device__ __noinline__ WideSums<CPL> wide_sums(int index, const Quantisers<CPL> quantisers, const Stage stage, int lane) {
    WideSums<CPL> sums = {};
    sums.good = true;
    each_wide_code<CPL>(index, quantisers, stage, lane, [&](int, int k, u32 code) {
        sums.good &= code < WIDE;
        sums.sum[k] += code;
        sums.squares[k] += code * code;  // wraps, and so does what is taken off it: their difference fits
    });
    return sums;
}

// Transform coefficients are float16 without denormals and negative zeros. Where their step is a power of two and their bound no less than half of
// it, rounding is all there is to quantising them: it is exact but for that, so no value misses the bound, and what is delivered needs no rounding.
// (NaN and infinities are beyond a byte's reach.)
constexpr bool WHOLE_STEPS = AROUND_ZERO && KVF_EXPONENT == 5 && !CHANNEL_STEPS;
__device__ __forceinline__ bool in_whole_steps(const Quantiser &q) {
    return (__float_as_uint(q.step) & 0x7fffff) == 0 && q.step >= 0x1p-10f && q.step <= 32.0f && q.bound >= 0.5f * q.step;
}

template <int CPL>
__device__ __forceinline__ void gather(const Source &s, const Tile &tile, const Rows<CPL> &rows, u32 (&ahead)[AHEAD][4][Rows<CPL>::PACKED], const u8 *p,
                                       const Quantisers<CPL> &quantisers, const int *radius, const Stage &stage, int lane, Gathered &gathered, Choice<CPL> &choice) {
    constexpr int PACKED = Rows<CPL>::PACKED;
    const int tokens = tile.tokens;
    const Quantiser(&quantiser)[CPL] = quantisers.each;
    gathered.fast = true;
    gathered.wide = gathered.any_exact = false;
    // In shared memory: what is taken off a rounded float's bits to get its byte. In registers, the compiler makes it anew in every round.
    const u32 offsets = stage.small_at(ORIGINS_AT + lane * CPL);
    u32 sum[CPL], squares[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        sum[k] = squares[k] = 0;
        if constexpr (BOUNDED) {
            int bits = ROUNDER_BITS;
            if (!AROUND_ZERO) {
                const float scaled = __fmul_rn(Rows<CPL>::number(ahead[0][0], k), quantiser[k].inverse);
                gathered.fast &= fabsf(scaled) < 2097152.0f;
                bits = __float_as_int(scaled + ROUNDER);
            }
            store_shared(offsets + 4 * k, (u32)(bits - 128));
        }
    }
    constexpr int PAIRS = KVF_ITEM == 2 ? PACKED : 0;
    u32 within_pair[PAIRS + 1];
#pragma unroll
    for (int j = 0; j < PAIRS; ++j)
        within_pair[j] = surely_within(quantiser[2 * j].bound) | surely_within(quantiser[min(2 * j + 1, CPL - 1)].bound) << 16;
    Specials specials;
    u32 beyond = 0;  // above 255 where some code does not fit its byte
    const bool whole = WHOLE_STEPS && in_whole_steps(quantiser[0]);
    u32 largest_value = 0;
    // Four rows at a time, the next ones on their way. Behind the last token its row is taken again, which does no harm but in sums.
#pragma unroll 1
    for (int t0 = 0; t0 < tokens; t0 += 4) {
        u32 row[4][PACKED], packed[CPL];
        rows.advance(row, ahead, p, t0 + 4 * AHEAD, tokens);
        if (WHOLE_STEPS && whole) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < PACKED; ++j) largest_value = max_halves(largest_value, row[i][j] & 0x7fff7fffu);
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                u32 code[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) code[i] = __float_as_uint(__fmaf_rn(Rows<CPL>::number(row[i], k), quantiser[0].inverse, ROUNDER));
                packed[k] = __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410) ^ 0x80808080u;
            }
        } else if constexpr (BOUNDED) {
            u32 byte[4][CPL], offset[CPL], difference[4][PAIRS + 1];
            bool missed[4] = {}, any_missed = false;  // of token t0+i: a value may miss the bound. (NaN are found in another way.)
            if (AROUND_ZERO) {
#pragma unroll
                for (int k = 0; k < CPL; ++k) offset[k] = ROUNDER_BITS - 128;
            } else {
                load_shared_words<CPL>(offsets, offset);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float rounded[PACKED * 4 / KVF_ITEM] = {};
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    const float r = __fmul_rn(Rows<CPL>::number(row[i], k), quantiser[k].inverse) + ROUNDER;
                    byte[i][k] = __float_as_uint(r) - offset[k];
                    beyond |= byte[i][k];
                    rounded[k] = __fmul_rn(r - ROUNDER, quantiser[k].step);
                }
#pragma unroll
                for (int j = 0; j < PACKED; ++j) specials.see(row[i][j]);
                if constexpr (PAIRS > 0) {
#pragma unroll
                    for (int j = 0; j < PAIRS; ++j) difference[i][j] = differences(row[i][j], as_word_pair(rounded[2 * j], rounded[2 * j + 1]));
                } else {
#pragma unroll
                    for (int k = 0; k < CPL; ++k) missed[i] |= !(fabsf(Rows<CPL>::number(row[i], k) - rounded[k]) < quantiser[k].bound);
                    any_missed |= missed[i];
                }
            }
            const auto beyond_pair = [&](u32 pair, int j) { return max_halves(pair & 0x7fff7fffu, within_pair[j]) != within_pair[j]; };
            if constexpr (PAIRS > 0) {
                u32 largest[PAIRS + 1];
#pragma unroll
                for (int j = 0; j < PAIRS; ++j) {
                    largest[j] = larger_pair(larger_pair(difference[0][j], difference[1][j]), larger_pair(difference[2][j], difference[3][j]));
                    if (!CHANNEL_STEPS && j) largest[0] = larger_pair(largest[0], largest[j]);
                    if (CHANNEL_STEPS) any_missed |= beyond_pair(largest[j], j);
                }
                if (!CHANNEL_STEPS) any_missed = beyond_pair(largest[0], 0);
            }
            // Which token it is, only where there is one.
            if (any_missed && rows.count) {
                u32 tokens_missed = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < PAIRS; ++j) missed[i] |= beyond_pair(difference[i][j], j);
                    tokens_missed |= (u32)missed[i] << i;
                }
                list_repairs(stage.small, t0, t0 + 4 > tokens ? tokens_missed & 15 >> (t0 + 4 - tokens) : tokens_missed, lane);
            }
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                packed[k] = __byte_perm(__byte_perm(byte[0][k], byte[1][k], 0x0040), __byte_perm(byte[2][k], byte[3][k], 0x0040), 0x5410);
        } else {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
#if KVF_ITEM == 2 && KVF_EXPONENT == 8
                // Two exponents at once: 255 minus each, in the halves of a word.
                u32 pair[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) pair[i] = ~(row[i][k / 2] >> 7) & 0x00ff00ffu;
                const int halves = k & 1 ? 0x0062 : 0x0040;
                packed[k] = __byte_perm(__byte_perm(pair[0], pair[1], halves), __byte_perm(pair[2], pair[3], halves), 0x5410);
#else
                u32 byte[4], rest;
#pragma unroll
                for (int i = 0; i < 4; ++i) byte[i] = (u32)(split(Rows<CPL>::value(row[i], k), rest) + ORIGIN);
                packed[k] = __byte_perm(__byte_perm(byte[0], byte[1], 0x0040), __byte_perm(byte[2], byte[3], 0x0040), 0x5410);
#endif
            }
        }
        if (t0 + 4 > tokens) {
            const u32 keep = FULL >> (8 * (t0 + 4 - tokens));
#pragma unroll
            for (int k = 0; k < CPL; ++k) packed[k] &= keep;
        }
        store_shared_words<CPL>(stage.codes + (t0 / 4 * 32 + lane) * CPL * 4, packed);
        if constexpr (BOUNDED && ANS && !DELTA) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                sum[k] = dot4(packed[k], 0x01010101u, sum[k]);
                squares[k] = dot4(packed[k], packed[k], squares[k]);
            }
        }
    }
    __syncwarp();
    if constexpr (BOUNDED) {
        if (WHOLE_STEPS && whole && !(from_half(max(largest_value & 0xffff, largest_value >> 16)) * quantiser[0].inverse < 127.5f)) beyond = 256;
        if (CENTRED) gathered.wide = __any_sync(FULL, beyond >= 256);
        else gathered.fast &= beyond < 256;
        gathered.fast &= !specials.any() && !(gathered.wide && load_shared(stage.small_at(REPAIRS)));
        gathered.fast = __all_sync(FULL, gathered.fast);
        if (gathered.fast && load_shared(stage.small_at(REPAIRS))) {
            bool any = false;
            Quantisers<CHANNEL_STEPS ? CPL : 1> needed;
#pragma unroll
            for (int k = 0; k < (CHANNEL_STEPS ? CPL : 1); ++k) needed.each[k] = quantiser[k];
            gathered.fast = __all_sync(FULL, repair<CPL>(tile.index, needed, stage, lane, any));
            gathered.any_exact = __any_sync(FULL, any);
        }
    }
    if constexpr (CENTRED) {
        choice.apart = 0;
        int origin = 0;
        if (gathered.wide && gathered.fast) {
            const WideSums<CPL> sums = wide_sums<CPL>(tile.index, quantisers, stage, lane);
            gathered.fast = __all_sync(FULL, sums.good);
            origin = -WIDE_BELOW;
#pragma unroll
            for (int k = 0; k < CPL; ++k) sum[k] = sums.sum[k], squares[k] = sums.squares[k];
        }
#pragma unroll
        for (int k = 0; k < CPL; ++k) choice.centre_of_bytes(0, k, (u32)tokens, origin + stage.origin(lane * CPL + k), sum[k], squares[k]);
    } else {
        summarise<CPL>(tokens, radius, stage, lane, choice);
    }
}

// The slow way: codes of a token's values through the whole quantiser, and which of them are to be stored in their own bits.
template <int CPL>
__device__ __forceinline__ void slow_codes(const Rows<CPL> &rows, int t, const Quantiser (&quantiser)[CPL], int (&code)[CPL], u32 &exact) {
    u32 row[Rows<CPL>::PACKED];
    rows.load_row(t, row);
    exact = 0;
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        bool e = false;
        if constexpr (BOUNDED) {
            code[k] = quantise(Rows<CPL>::value(row, k), quantiser[k], e);
        } else {
            u32 rest;
            code[k] = split(Rows<CPL>::value(row, k), rest);
        }
        exact |= (u32)(e && k < rows.count) << k;
    }
}
