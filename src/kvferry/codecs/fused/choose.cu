// Bases and classes of a tile's groups, and where its sections lie. Behind quantise.cu.

constexpr int NUM_GROUPS = TILE_TOKENS / GROUP;  // of a channel, at most

// max(1, floor(1.5 * (log2(variance) + 7))), from the float's bits; 0 where nothing varies.
__device__ __forceinline__ int variance_class(float variance) {
    const u32 bits = __float_as_uint(variance);
    int octave = (int)(bits >> 23) - 127 + 7;
    u32 threshold = octave & 1 ? 2180376u : 4927478u;
    int c = ((3 * octave) >> 1) + ((bits & 0x7fffffu) >= threshold);
    return max(1, min(c, MAX_CLASS));
}
__device__ int spread_class(i64 spread, int tokens) {
    return spread == 0 ? 0 : variance_class(__fdiv_rn(__ll2float_rn(spread), (float)(tokens * tokens)));
}

__device__ int reach_class(int c, int largest, const int *radius) {
    while (radius[c] < largest) ++c;
    return c;
}

__device__ __forceinline__ int bit_width(u32 v) { return 32 - __clz(v); }
__device__ __forceinline__ u32 zigzag(int v) { return (u32)(v << 1) ^ (u32)(v >> 31); }

__device__ __forceinline__ int small_code(u32 largest) {
    return largest == 0 ? 0 : largest < 16 ? 1 : largest < 256 ? 2 : largest < 65536 ? 3 : 4;
}

constexpr int SPARING_TOKENS = 32;

// Of a tile's classes and bases.
struct Ranges {
    int least_class, most_class, least_base, most_base;
};

// Base and class (ans) or width (bitpack) of each group of a lane's channels, by the rules of packing/.
template <int CPL>
struct Choice {
    int base[NUM_GROUPS][CPL], klass[NUM_GROUPS][CPL];
    u32 apart;  // bit CPL*b + k: group b of channel k is kept apart
    float variance[CPL], mean[CPL];  // CENTRED

    __device__ __forceinline__ bool has_base(int b, int k) const { return KVF_BASES == ALL || (KVF_BASES == APART && apart >> (CPL * b + k) & 1); }
    __device__ __forceinline__ int stored(int b, int k) const {
        return KVF_BASES == APART ? 2 * klass[b][k] + (apart >> (CPL * b + k) & 1) : klass[b][k];
    }
    // Raw bits a value has in the group's dense stream.
    __device__ __forceinline__ int width(int b, int k) const {
        if constexpr (!ANS) return klass[b][k];
        int table, shift;
        table_and_shift(klass[b][k], table, shift);
        return shift;
    }

    // Of what is stored, by all lanes, in `blocks` blocks.
    __device__ __forceinline__ Ranges ranges(int count, int blocks) const {
        int least_class = 0x7fffffff, most_class = 0, least_base = 0x7fffffff, most_base = -0x7fffffff - 1;
#pragma unroll
        for (int b = 0; b < NUM_GROUPS; ++b)
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                if (b >= blocks || k >= count) continue;
                least_class = min(least_class, stored(b, k));
                most_class = max(most_class, stored(b, k));
                if (!has_base(b, k)) continue;
                least_base = min(least_base, base[b][k]);
                most_base = max(most_base, base[b][k]);
            }
        return {warp_min(least_class), warp_max(most_class), warp_min(least_base), warp_max(most_base)};
    }

    // ---- the rules, from sums over a group's `length` tokens ----
    __device__ __forceinline__ void centre(int b, int k, int length, i64 sum, i64 squares) {
        const i64 numerator = 2 * sum + length;
        base[b][k] = (int)(numerator / (2 * length)) - (numerator % (2 * length) < 0);
        const i64 spread = length * squares - sum * sum;
        centred(b, k, spread == 0, __fdiv_rn(__ll2float_rn(spread), (float)(length * length)), __fdiv_rn(__ll2float_rn(sum), (float)length));
    }
    __device__ __forceinline__ void centred(int b, int k, bool constant, float of_variance, float of_mean) {
        klass[b][k] = constant ? 0 : variance_class(of_variance);
        variance[k] = of_variance;
        mean[k] = of_mean;
    }
    // The same of bytes, in 32 bits; values: origin + what was summed.
    __device__ __forceinline__ void centre_of_bytes(int b, int k, u32 length, int origin, u32 sum, u32 squares) {
        const u32 spread = length * squares - sum * sum;
        const bool whole = length == TILE_TOKENS;  // divisions by powers of two
        base[b][k] = origin + (int)(whole ? (2 * sum + TILE_TOKENS) / (2 * TILE_TOKENS) : (2 * sum + length) / (2 * length));
        const float variance = whole ? __fmul_rn(__uint2float_rn(spread), 1.0f / (TILE_TOKENS * TILE_TOKENS))
                                     : __fdiv_rn(__uint2float_rn(spread), (float)(length * length));
        const float total = __int2float_rn((int)sum + origin * (int)length);
        centred(b, k, spread == 0, variance, whole ? __fmul_rn(total, 1.0f / TILE_TOKENS) : __fdiv_rn(total, (float)length));
    }
    // In tiles of SPARING_TOKENS and more: no bases of 4 bits where they take more than they spare, at a third of a bit a token for a class; and no
    // classes so small that all take 8 bits instead of 4, if raising them is cheaper. (At small classes, a class is half of that at most.)
    __device__ __forceinline__ Ranges spare(int tokens, int channels, int count) {
        Ranges found = ranges(count, 1);
        if (tokens < SPARING_TOKENS) return found;
        if (small_code((u32)found.most_base - (u32)found.least_base) == 1) {
            int around_zero[CPL], wider = 0;
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                around_zero[k] = base[0][k] ? variance_class(__fadd_rn(variance[k], __fmul_rn(mean[k], mean[k]))) : klass[0][k];
                if (k < count) wider += around_zero[k] - klass[0][k];
            }
            if (warp_sum(wider) * tokens <= 3 * 4 * channels) {
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    base[0][k] = 0;
                    klass[0][k] = around_zero[k];
                }
                found = ranges(count, 1);
            }
        }
        const int floor = found.most_class - 15;
        if (found.least_class < floor) {
            int raised = 0;
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                if (k < count) raised += max(floor - klass[0][k], 0);
            if (warp_sum(raised) * tokens <= 6 * 4 * channels) {
                found.least_class = floor;
#pragma unroll
                for (int k = 0; k < CPL; ++k) klass[0][k] = max(klass[0][k], floor);
            }
        }
        return found;
    }
    __device__ __forceinline__ void range(int b, int k, int least, int most) {
        base[b][k] = least;
        klass[b][k] = bit_width((u32)(most - least));
    }
    // First differences: `first`, and of the others the sum of squares and the largest magnitude (ans) or zigzag code (bitpack).
    __device__ __forceinline__ void differences(int b, int k, int length, int first, i64 squares, u32 reach, const int *radius) {
        base[b][k] = 0;
        int whole, without = 0;
        if constexpr (ANS) {
            whole = reach_class(spread_class(length * (squares + (i64)first * first), length), max((int)reach, abs(first)), radius);
            if (KVF_BASES == APART) without = reach_class(spread_class(length * squares, length), (int)reach, radius);
        } else {
            whole = bit_width(max(reach, zigzag(first)));
            without = bit_width(reach);
        }
        klass[b][k] = whole;
        // 16 bits a group kept apart; a class of `ans` is a third of a bit a token.
        if (KVF_BASES == APART && (whole - without) * length > (ANS ? 48 : 16)) {
            apart |= 1u << (CPL * b + k);
            klass[b][k] = without;
            base[b][k] = first;
        }
    }
};

// The general way: every value through the whole quantiser, codes of any size.
template <int CPL>
__device__ __noinline__ Choice<CPL> choose_slowly(const Rows<CPL> rows, int tokens, const Quantisers<CPL> quantisers, const int *radius) {
    const Quantiser(&quantiser)[CPL] = quantisers.each;
    Choice<CPL> choice;
    choice.apart = 0;
#pragma unroll
    for (int b = 0; b < NUM_GROUPS; ++b) {
        const int length = min(GROUP, tokens - b * GROUP);
        i64 sum[CPL], squares[CPL];
        int first[CPL], previous[CPL], least[CPL], most[CPL];
        u32 reach[CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            sum[k] = squares[k] = first[k] = previous[k] = reach[k] = choice.base[b][k] = choice.klass[b][k] = 0;
            least[k] = 0x7fffffff;
            most[k] = -0x7fffffff - 1;
        }
        if (length <= 0) continue;
#pragma unroll 1
        for (int t = b * GROUP; t < b * GROUP + length; ++t) {
            u32 row[Rows<CPL>::PACKED];
            rows.load_row(t, row);
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const u32 word = Rows<CPL>::value(row, k);
                bool exact;
                // The centre comes from first guesses, everything else from the codes that are written.
                const int q = ANS && !DELTA ? first_guess(word, quantiser[k]) : quantise(word, quantiser[k], exact);
                if (DELTA) {
                    const int r = t == b * GROUP ? 0 : q - previous[k];
                    if (t == b * GROUP) first[k] = q;
                    previous[k] = q;
                    squares[k] += (i64)r * r;
                    reach[k] = max(reach[k], ANS ? (u32)abs(r) : zigzag(r));
                } else if (ANS) {
                    sum[k] += q;
                    squares[k] += (i64)q * q;
                } else {
                    least[k] = min(least[k], q);
                    most[k] = max(most[k], q);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            if (DELTA) choice.differences(b, k, length, first[k], squares[k], reach[k], radius);
            else if (ANS) choice.centre(b, k, length, sum[k], squares[k]);
            else choice.range(b, k, least[k], most[k]);
        }
    }
    return choice;
}

// Where the sections of a tile lie, as far as it does not depend on the coder.
constexpr int LAYOUT_WORDS = 13;  // that all lanes have in common
template <int CPL>
struct Layout {
    int least_class, least_base, num_groups, num_bases, low_words;
    int class_code, base_code;
    int planes_at, steps_at, classes_at, bases_at, low_at, words_at;
    int bases_before[NUM_GROUPS], low_before[NUM_GROUPS];  // of this lane's groups

    __device__ __forceinline__ Layout(const Choice<CPL> &choice, const Ranges &ranges, int tokens, int channels, int count, int lane) {
        num_bases = low_words = 0;
        const int blocks = (tokens + GROUP - 1) / GROUP;
        num_groups = blocks * channels;
#pragma unroll
        for (int b = 0; b < NUM_GROUPS; ++b) {
            int my_bases = 0, my_words = 0, bases, words;
            if (b >= blocks) break;
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                if (k >= count) continue;
                my_bases += choice.has_base(b, k);
                my_words += stream_words(min(GROUP, tokens - b * GROUP), choice.width(b, k));
            }
            if (KVF_BASES == ALL) {
                bases_before[b] = b * channels + lane * CPL;
                bases = channels;
            } else {
                bases_before[b] = num_bases + exclusive_sum(my_bases, lane, bases);
            }
            words = 0;
            low_before[b] = low_words;
            if (__any_sync(FULL, my_words)) low_before[b] += exclusive_sum(my_words, lane, words);
            num_bases += bases;
            low_words += words;
        }
        least_class = ranges.least_class;
        least_base = num_bases ? ranges.least_base : 0;
        class_code = small_code(ranges.most_class - ranges.least_class);
        base_code = num_bases ? small_code((u32)ranges.most_base - (u32)ranges.least_base) : 0;
        const int lanes = (channels + CPL - 1) / CPL;
        planes_at = 16 + (ANS ? 4 * lanes : 0);
        steps_at = planes_at + pad4(PLANES * tokens * channels);
        classes_at = steps_at + (CHANNEL_STEPS ? pad4(2 * channels) : 0);
        bases_at = classes_at + pad4((num_groups * small_bits(class_code) + 7) / 8);
        low_at = bases_at + pad4((num_bases * small_bits(base_code) + 7) / 8);
        words_at = low_at + 4 * low_words;
    }

    // Through shared memory, while registers are dear.
    __device__ __forceinline__ void keep(int (&kept)[LAYOUT_WORDS], int lane) const {
        const int all[LAYOUT_WORDS] = {least_class, least_base, num_groups, num_bases, low_words, class_code, base_code,
                                       planes_at, steps_at, classes_at, bases_at, low_at, words_at};
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < LAYOUT_WORDS; ++i) kept[i] = all[i];
        }
        __syncwarp();
    }
    __device__ __forceinline__ void fetch(const int (&kept)[LAYOUT_WORDS]) {
        int *const all[LAYOUT_WORDS] = {&least_class, &least_base, &num_groups, &num_bases, &low_words, &class_code, &base_code,
                                        &planes_at, &steps_at, &classes_at, &bases_at, &low_at, &words_at};
#pragma unroll
        for (int i = 0; i < LAYOUT_WORDS; ++i) *all[i] = kept[i];
    }
};
