// Rows to integers of 16 bits under a power of two each, in place. Behind transform_items.cu.

// LANES neighbouring lanes share a row; lane j has its vectors j, j + LANES, and on.
constexpr int INNER_VECTORS = DEPTH / 8, MOST_EACH = DEPTH <= 256 ? 4 : 8;
constexpr int lanes_of_a_row() {
    int lanes = DEPTH % 64 == 0 && HALF % 64 == 0 ? 8 : 4;
    while (INNER_VECTORS > MOST_EACH * lanes) lanes *= 2;
    return lanes;
}
constexpr int LANES = lanes_of_a_row(), EACH = (INNER_VECTORS + LANES - 1) / LANES, ROWS = THREADS / LANES, ROUNDS = TOKENS / ROWS;
// Whether partners under RoPE are in the same lane, PARTNER of its vectors apart, in heads of HEAD_EACH.
constexpr bool ALIGNED = !KVF_INTERLEAVED && ROTARY > 0 && HALF / 8 % LANES == 0 && HEAD / 8 % LANES == 0;
constexpr int PARTNER = ALIGNED ? HALF / 8 / LANES : 1, HEAD_EACH = ALIGNED ? HEAD / 8 / LANES : 1;

// A thread's row in a round. Where 8 lanes share one, those of half a warp are 4 apart: 64 bytes, in terms of banks.
__device__ __forceinline__ int row_of_thread(int round) {
    const int t = threadIdx.x / LANES;
    return round * ROWS + (LANES == 8 ? (t & ~7) | (t & 1) << 2 | (t >> 1 & 3) : t);
}

__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float((u32)(e + 127) << 23); }

// The two values of a word.
__device__ __forceinline__ void split(u32 word, bool half, float &first, float &second) {
    if (KVF_MANTISSA == 7 && !half) {
        first = __uint_as_float(word << 16);
        second = __uint_as_float(word & 0xffff0000u);
    } else {
        first = from_half(word & 0xffff);
        second = from_half(word >> 16);
    }
}
__device__ __forceinline__ void split(const u32 (&word)[4], bool half, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(word[i], half, x[2 * i], x[2 * i + 1]);
}
// Cosines and sines of a token.
__device__ __forceinline__ const float2 *angles_of(const Job &job, int position) {
    return job.angles + (i64)min(max(position, 0), job.num_positions - 1) * HALF;
}
// Those of 8 pairs.
struct Angles {
    float4 of[4];
    // Of the v-th eight.
    __device__ __forceinline__ void fetch(const float2 *angles, int v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of[i] = __ldg((const float4 *)angles + i * (HALF / 8) + v);
    }
    __device__ __forceinline__ float cosine(int i) const { return i % 2 ? of[i / 2].z : of[i / 2].x; }
    __device__ __forceinline__ float sine(int i) const { return i % 2 ? of[i / 2].w : of[i / 2].y; }
};

// Back to position 0: partners side by side.
__device__ __forceinline__ void turn_back(float &first, float &second, float cosine, float sine) {
    const float before = first;
    first = __fadd_rn(__fmul_rn(before, cosine), __fmul_rn(second, sine));
    second = __fsub_rn(__fmul_rn(second, cosine), __fmul_rn(before, sine));
}
// Vector v of a row, where its partners are not in the same lane.
__device__ __forceinline__ void turn_back_alone(const float2 *angles, u32 row, int v, float (&x)[8]) {
    const int in_head = 8 * v % HEAD;
    if (in_head >= ROTARY) return;
    Angles angle;
    if (KVF_INTERLEAVED) {
#pragma unroll
        for (int i = 0; i < 2; ++i) angle.of[i] = __ldg((const float4 *)(angles + in_head / 2) + i);
#pragma unroll
        for (int i = 0; i < 4; ++i) turn_back(x[2 * i], x[2 * i + 1], angle.cosine(i), angle.sine(i));
    } else {
        const bool first = in_head < HALF;
        u32 word[4];
        float other[8];
        load_shared_words<4>(first ? row + 16 * v + 2 * HALF : row + 16 * v - 2 * HALF, word);
        split(word, false, other);
        angle.fetch(angles, (first ? in_head : in_head - HALF) / 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (first) turn_back(x[i], other[i], angle.cosine(i), angle.sine(i));
            else turn_back(other[i], x[i], angle.cosine(i), angle.sine(i));
        }
    }
}

constexpr u32 INFINITE_HALF = 0x7c00, INFINITE = 0x7f800000;

// Halves of a word that are not finite become zeros.
__device__ __forceinline__ u32 finite_halves(u32 word) {
    if ((word & 0x7c00) == 0x7c00) word &= 0xffff0000u;
    if ((word & 0x7c000000) == 0x7c000000) word &= 0xffffu;
    return word;
}

template <int COUNT>
__device__ __forceinline__ u32 largest_half(const u32 (&word)[COUNT][4]) {
    u32 top = 0;
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) top = max_halves(top, word[k][i] & 0x7fff7fffu);
    return max(top & 0xffff, top >> 16);
}

// Angles of this thread's row of a round, asked for ahead.
struct RowAngles {
    Angles of[PARTNER];
    __device__ __forceinline__ void ask(const Job &job, const Place &place, int round) {
        const float2 *angles = angles_of(job, place.position + row_of_thread(round));
#pragma unroll
        for (int k = 0; k < PARTNER; ++k) of[k].fetch(angles, (int)threadIdx.x % LANES + LANES * k);
    }
};

// The rows of an item at `rows`, and by what a row's products are to be multiplied: forward, by 0 where `rows_at` says that there is no page.
// `ahead`: of round 0, where ALIGNED and turned.
__device__ __forceinline__ void round_rows(const Job &job, Item &item, const Place &place, u32 rows, u32 factor, u32 rows_at, RowAngles &ahead) {
    constexpr int TOGETHER = EACH <= 2 && ROUNDS % 2 == 0 ? 2 : 1;  // rounds that hide each other's latencies
    const int j = threadIdx.x % LANES;
    const float scale = job.scale[item.part];
    const float4 *mean = (const float4 *)(job.mean + item.part * N);
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round += TOGETHER) {
        u32 row[TOGETHER], most[TOGETHER], word[TOGETHER][EACH][4];
        float x[TOGETHER][EACH][8];
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            row[r] = rows + row_of_thread(round + r) * ROW_BYTES;
#pragma unroll
            for (int k = 0; k < EACH; ++k) {
                const int v = j + LANES * k;
                word[r][k][0] = word[r][k][1] = word[r][k][2] = word[r][k][3] = 0;
                if (VECTORS % LANES == 0 || v < VECTORS) load_shared_words<4>(row[r] + 16 * v, word[r][k]);
            }
        }
#if KVF_INVERSE
        u32 top = 0;
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) top = max(top, most[r] = largest_half(word[r]));
        if (top >= INFINITE_HALF) {
#pragma unroll
            for (int r = 0; r < TOGETHER; ++r) {
#pragma unroll
                for (int k = 0; k < EACH; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i) word[r][k][i] = finite_halves(word[r][k][i]);
                most[r] = largest_half(word[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r)
#pragma unroll
            for (int k = 0; k < EACH; ++k) split(word[r][k], true, x[r][k]);
#else
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
#pragma unroll
            for (int k = 0; k < EACH; ++k) split(word[r][k], false, x[r][k]);
            if (ROTARY > 0 && item.turned) {
                if constexpr (ALIGNED) {
#pragma unroll
                    for (int k = 0; k + PARTNER < EACH; ++k) {
                        if (k % HEAD_EACH >= PARTNER) continue;
                        const Angles &angle = ahead.of[k % HEAD_EACH];
#pragma unroll
                        for (int i = 0; i < 8; ++i) turn_back(x[r][k][i], x[r][k + PARTNER][i], angle.cosine(i), angle.sine(i));
                    }
                    if (round + r + 1 < ROUNDS) ahead.ask(job, place, round + r + 1);
                } else {
                    const float2 *angles = angles_of(job, place.position + row_of_thread(round + r));
#pragma unroll
                    for (int k = 0; k < EACH; ++k)
                        if (VECTORS % LANES == 0 || j + LANES * k < VECTORS) turn_back_alone(angles, row[r], j + LANES * k, x[r][k]);
                }
            }
        }
        float largest[TOGETHER][4] = {};
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const int v = j + LANES * k;
            if (VECTORS % LANES != 0 && v >= VECTORS) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float4 of = __ldg(mean + i * VECTORS + v);
#pragma unroll
                for (int r = 0; r < TOGETHER; ++r) {
                    x[r][k][4 * i] = __fsub_rn(x[r][k][4 * i], of.x);
                    x[r][k][4 * i + 1] = __fsub_rn(x[r][k][4 * i + 1], of.y);
                    x[r][k][4 * i + 2] = __fsub_rn(x[r][k][4 * i + 2], of.z);
                    x[r][k][4 * i + 3] = __fsub_rn(x[r][k][4 * i + 3], of.w);
#pragma unroll
                    for (int b = 0; b < 4; ++b) largest[r][b] = larger_or_nan(largest[r][b], fabsf(x[r][k][4 * i + b]));
                }
            }
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r)  // the larger number, the larger as an integer; NaN above all
            most[r] = __float_as_uint(larger_or_nan(larger_or_nan(largest[r][0], largest[r][1]), larger_or_nan(largest[r][2], largest[r][3])));
#endif
#pragma unroll
        for (int apart = 1; apart < LANES; apart *= 2)
#pragma unroll
            for (int r = 0; r < TOGETHER; ++r) most[r] = max(most[r], __shfl_xor_sync(FULL, most[r], apart));
        __syncwarp();  // the rows have been read
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
#if KVF_INVERSE
            most[r] = __float_as_uint(from_half(most[r]));
#endif
            // frexp's exponent, kept to where all powers of two are normal numbers; one more where rounding would take 17 bits.
            int exponent = min(max((int)(most[r] >> 23) - 126, -60), 128);
            exponent += __fmul_rn(__uint_as_float(most[r]), power_of_two(15 - exponent)) >= 32767.5f;
            const float up = power_of_two(15 - exponent);
            const int t = row_of_thread(round + r);
            u32 any_lower = 0;
#pragma unroll
            for (int k = 0; k < EACH; ++k) {
                const int v = j + LANES * k;
                if (INNER_VECTORS % LANES != 0 && v >= INNER_VECTORS) continue;
                u32 upper[2], lower[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    // 1.5 * 2**23: adding it leaves the rounded integer in the low bits. The product is exact.
                    u32 w[4];
#pragma unroll
                    for (int b = 0; b < 4; ++b) w[b] = __float_as_uint(__fmaf_rn(x[r][k][4 * i + b], up, 12582912.0f));
                    const u32 first = __byte_perm(w[0], w[1], 0x5410), second = __byte_perm(w[2], w[3], 0x5410);
                    upper[i] = __byte_perm(first, second, 0x7531);
                    lower[i] = __byte_perm(first, second, 0x6420);
                    any_lower |= lower[i];
                }
                store_shared_words<2>(row[r] + 8 * v, upper);
                store_shared_words<2>(row[r] + DEPTH + 8 * v, lower);
            }
            if (KVF_INVERSE && any_lower) item.lower = 1;
            if (j == 0) {
                const bool there = KVF_INVERSE || somewhere(load_place(rows_at, t));
                store_shared(factor + 4 * t, there ? __float_as_uint(__fmul_rn(power_of_two(exponent - 22), scale)) : 0);  // exact
                if (!KVF_INVERSE && most[r] >= INFINITE && t < item.tokens) item.bad = 1;
            }
        }
    }
}
