// The kernel of transform_items.cu's job. Behind transform_rows.cu.

constexpr int PAIRS = TILES / 2;      // of column tiles of the product: a warp takes one at a time
constexpr bool HELD = DEPTH <= 128;   // the basis of its pair stays in a warp's registers
constexpr int AT_ONCE = HELD ? 1 : 2;  // tiles of 16 rows
constexpr int SHARE = PAIRS >= WARPS - 3 ? 1 : PAIRS > 2 ? 2 : 4;  // warps that take a pair's rows between them
constexpr int AHEAD = STEPS < 2 ? STEPS : 2;
constexpr float LARGEST = 65504.0f;

// Two coefficients as float16, the first in the low half; denormals and negative zeros become zeros.
__device__ __forceinline__ u32 coefficient_pair(float first, float second) { return flushed_pair(half_pair(first, second)); }
// Two values. Those of bfloat16 are far below its largest: coefficients below 2**16, steps and means at most 2**100.
__device__ __forceinline__ u32 value_pair(float first, float second) {
    if (KVF_MANTISSA == 7) return bfloat_pair(first, second);
    return half_pair(fminf(fmaxf(first, -LARGEST), LARGEST), fminf(fmaxf(second, -LARGEST), LARGEST));
}

// The first columns of pair p of column tiles: partners under RoPE where there is a rotation, else neighbours.
__device__ __forceinline__ int first_tile(int p, bool turned) {
#if KVF_ROTARY > 0 && !KVF_INTERLEAVED
    if (turned) {
        constexpr int EACH_HEAD = HEAD / 16, PAIRED = HALF / 8;  // pairs a head has; of them such that RoPE turns
        const int head = p / EACH_HEAD, i = p % EACH_HEAD;
        return head * (HEAD / 8) + (i < PAIRED ? i : 2 * PAIRED + 2 * (i - PAIRED));
    }
#endif
    return 2 * p;
}
__device__ __forceinline__ int second_tile(int p, int first, bool turned) {
#if KVF_ROTARY > 0 && !KVF_INTERLEAVED
    if (turned && p % (HEAD / 16) < HALF / 8) return first + HALF / 8;
#endif
    return first + 1;
}

// Whether all pairs of an item are to be turned: known (0, 1), or to be looked up for each (LOOK).
constexpr int LOOK = 2;
template <int HOW>
struct Turned {
    static constexpr int value = HOW;
};
constexpr bool ALL_TURN = KVF_INVERSE && ROTARY > 0 && !KVF_INTERLEAVED && ROTARY == HEAD;

// What a lane has of the sums: rows `lane / 4` and 8 further, columns `2 * (lane % 4)` and next, of a pair of column tiles.
struct Sums {
    int high[2][4], middle[2][4], low[2][4];
};

// Products of rows' fragments at `at`. LOWER: not all of their low halves are 0.
template <bool LOWER>
__device__ __forceinline__ void multiply(Sums &sums, u32 at, const uint4 (&b)[2]) {
    u32 upper[4], lower[4];
    load_fragments(upper, at);
    if (LOWER) load_fragments(lower, at + DEPTH);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        multiply_high(sums.high[j], upper, b[j].x, b[j].y);
        multiply_high_low(sums.middle[j], upper, b[j].z, b[j].w);
        if (LOWER) multiply_low(sums.low[j], lower, b[j].z, b[j].w);
        if (LOWER) multiply_low_high(sums.middle[j], lower, b[j].x, b[j].y);
    }
}

// high * 2**16 + middle * 2**8 + low over 2**8, rounded down: below 2**27 in magnitude, since rows of a basis have length 1. What exceeds
// 32 bits on the way wraps and comes back.
struct Whole {
    int of[2][4];
    __device__ __forceinline__ Whole() {}
    __device__ __forceinline__ explicit Whole(const Sums &sums) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) of[j][i] = sums.high[j][i] * 256 + sums.middle[j][i] + (sums.low[j][i] >> 8);
    }
};

// Where a pair's columns go, and what their values need.
struct Target {
    u32 give;      // GATHERED: of this lane's row (as load_fragments takes them) of its tile
    u64 start[2];  // else of this lane's values of both tiles, from a row's place on
    float2 mean[2];
    const float2 *angles;  // at position 0
    int position, last_position, in_head;
    bool turned;
};

template <int TURNED>
__device__ __forceinline__ Target target_of(const Job &job, const Item &item, const Place &place, const Column *column, const int (&tile)[2], u32 out) {
    const int lane = threadIdx.x & 31, column_of = lane & 3;
    Target target;
    if (GATHERED) {
        target.give = out + (8 * (lane >> 4) + (lane & 7)) * OUT_ROW_BYTES + 16 * (lane & 8 ? tile[1] : tile[0]);
    } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) target.start[j] = (KVF_INVERSE ? start_of(place, column, tile[j]) : place.coded_start + 16 * tile[j]) + 4 * column_of;
    }
#if KVF_INVERSE
#pragma unroll
    for (int j = 0; j < 2; ++j) target.mean[j] = __ldg((const float2 *)(job.mean + item.part * N + 8 * tile[j] + 2 * column_of));
    target.in_head = (8 * tile[0] + 2 * column_of) % HEAD;
    target.turned = TURNED == LOOK ? item.turned && (KVF_INTERLEAVED || target.in_head < HALF) : TURNED;
    target.angles = job.angles + (KVF_INTERLEAVED ? 0 : target.in_head);
    target.position = place.position;
    target.last_position = job.num_positions - 1;
#endif
    return target;
}
__device__ __forceinline__ const float2 *angles_of(const Target &target, int row) {
    return target.angles + (i64)min(max(target.position + row, 0), target.last_position) * HALF;
}

// Inverse: angles of a lane's two rows from `row` on.
struct TileAngles {
    float4 of[2];
    __device__ __forceinline__ void ask(const Target &target, int row) {
#pragma unroll
        for (int h = 0; h < 2; ++h) of[h] = __ldg((const float4 *)angles_of(target, row + 8 * h));
    }
};

// The delivered values, or the coefficients, of 16 rows from `first_row` on: to where they belong.
__device__ __forceinline__ void deliver(const Target &target, const Whole &whole, int first_row, const TileAngles &angles, u32 factor, u32 rows_at, int tokens,
                                        float &largest) {
    const int lane = threadIdx.x & 31, row_of = lane >> 2;
    u32 word[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int t = first_row + row_of + 8 * h;
        const float by = __uint_as_float(load_shared(factor + 4 * t));
        float2 y[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            y[j].x = __fmul_rn((float)whole.of[j][2 * h], by);
            y[j].y = __fmul_rn((float)whole.of[j][2 * h + 1], by);
#if KVF_INVERSE
            y[j].x = __fadd_rn(y[j].x, target.mean[j].x);
            y[j].y = __fadd_rn(y[j].y, target.mean[j].y);
#else
            largest = fmaxf(largest, fmaxf(fabsf(y[j].x), fabsf(y[j].y)));
#endif
        }
#if KVF_INVERSE && KVF_INTERLEAVED
        if (target.turned) {
            const float2 *all = angles_of(target, t);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int in_head = (target.in_head + 8 * j) % HEAD;  // neighbouring tiles
                if (in_head >= ROTARY) continue;
                const float2 a = __ldg(all + in_head / 2), pair = y[j];
                y[j].x = __fsub_rn(__fmul_rn(pair.x, a.x), __fmul_rn(pair.y, a.y));
                y[j].y = __fadd_rn(__fmul_rn(pair.y, a.x), __fmul_rn(pair.x, a.y));
            }
        }
#elif KVF_INVERSE && KVF_ROTARY > 0
        if (target.turned) {
            const float4 a = angles.of[h];
            const float2 first = y[0], second = y[1];
            y[0].x = __fsub_rn(__fmul_rn(first.x, a.x), __fmul_rn(second.x, a.y));
            y[0].y = __fsub_rn(__fmul_rn(first.y, a.z), __fmul_rn(second.y, a.w));
            y[1].x = __fadd_rn(__fmul_rn(second.x, a.x), __fmul_rn(first.x, a.y));
            y[1].y = __fadd_rn(__fmul_rn(second.y, a.z), __fmul_rn(first.y, a.w));
        }
#endif
#pragma unroll
        for (int j = 0; j < 2; ++j) word[2 * h + j] = KVF_INVERSE ? value_pair(y[j].x, y[j].y) : coefficient_pair(y[j].x, y[j].y);
    }
    if (GATHERED) {
        store_fragments(target.give + first_row * OUT_ROW_BYTES, word);
    } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = first_row + row_of + 8 * h;
            const u64 there = KVF_INVERSE ? load_place(rows_at, t) : t < tokens ? t * (2 * N) : NOWHERE;
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if (somewhere(there)) store_pair(target.start[j] + there, word[2 * h + j]);
        }
    }
}

// The basis of the pair of column tiles that a warp keeps, of one part.
struct Held {
    uint4 of[STEPS][2];
    int part;
};

template <int TURNED, bool LOWER>
__device__ __forceinline__ void multiply_rows(const Job &job, Item &item, const Place &place, const Column *column, u32 rows, u32 factor,
                                              u32 rows_at, u32 out, Held &held) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const bool turned = item.turned;
    const uint4 *basis = job.basis + (i64)item.part * TILES * STEPS * 32 + lane;
    const u32 fragments = rows + (lane & 15) * ROW_BYTES + 16 * (lane >> 4);
    float largest = 0.0f;
#pragma unroll 1
    for (int unit = warp; unit < PAIRS * SHARE; unit += WARPS) {
        const int p = unit / SHARE, begin = unit % SHARE * (TOKENS / SHARE), end = begin + TOKENS / SHARE;
        const int first = first_tile(p, turned), tile[2] = {first, second_tile(p, first, turned)};
        const auto fetch_basis = [&](int k, uint4(&to)[2]) {
#pragma unroll
            for (int j = 0; j < 2; ++j) to[j] = __ldg(basis + (tile[j] * STEPS + k) * 32);
        };
        if (HELD && held.part != item.part) {
            held.part = item.part;
#pragma unroll
            for (int k = 0; k < STEPS; ++k) fetch_basis(k, held.of[k]);
            // Wait for it here: products would wait, each time, for all that is on its way. (Nothing, which the compiler does not know.)
            const u32 nothing = (u32)item.part >> 31;
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    uint4 &b = held.of[k][j];
                    b.x ^= nothing, b.y ^= nothing, b.z ^= nothing, b.w ^= nothing;
                }
        }
        Target target;
        TileAngles angles[AT_ONCE];
        Whole whole[AT_ONCE];
        const auto ask_angles = [&](int row) {
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m)
                if (KVF_INVERSE && ROTARY > 0 && !KVF_INTERLEAVED && target.turned) angles[m].ask(target, row + 16 * m + (lane >> 2));
        };
        const auto product = [&](int row, Sums(&sums)[AT_ONCE]) {
            uint4 next[AHEAD][2];
            if (!HELD) {
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) fetch_basis(k, next[k]);
            }
#pragma unroll(STEPS <= 8 ? STEPS : 2)
            for (int k = 0; k < STEPS; ++k) {
                uint4 b[2];
                if constexpr (HELD) {
                    b[0] = held.of[k][0], b[1] = held.of[k][1];
                } else {  // from the second-level cache: asked for two steps ahead
                    b[0] = next[0][0], b[1] = next[0][1];
#pragma unroll
                    for (int i = 0; i + 1 < AHEAD; ++i) next[i][0] = next[i + 1][0], next[i][1] = next[i + 1][1];
                    if (k + AHEAD < STEPS) fetch_basis(k + AHEAD, next[AHEAD - 1]);
                }
#pragma unroll
                for (int m = 0; m < AT_ONCE; ++m) multiply<LOWER>(sums[m], fragments + (row + 16 * m) * ROW_BYTES + 32 * k, b);
            }
        };
        const auto add_up = [&](const Sums(&sums)[AT_ONCE]) {
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) whole[m] = Whole(sums[m]);
        };
        const auto deliver_all = [&](int row) {
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) deliver(target, whole[m], row + 16 * m, angles[m], factor, rows_at, item.tokens, largest);
        };
        constexpr int STEP = 16 * AT_ONCE;
        if (HELD) {  // rows are delivered while the next ones are multiplied
            Sums sums[AT_ONCE] = {};
            product(begin, sums);
            target = target_of<TURNED>(job, item, place, column, tile, out);  // not before: products would wait for what it loads
            ask_angles(begin);
            add_up(sums);
#pragma unroll 1
            for (int row = begin + STEP; row < end; row += STEP) {
                Sums sums[AT_ONCE] = {};
                product(row, sums);
                deliver_all(row - STEP);
                ask_angles(row);
                add_up(sums);
            }
            deliver_all(end - STEP);
        } else {
            target = target_of<TURNED>(job, item, place, column, tile, out);
#pragma unroll 1
            for (int row = begin; row < end; row += STEP) {
                Sums sums[AT_ONCE] = {};
                ask_angles(row);
                product(row, sums);
                add_up(sums);
                deliver_all(row);
            }
        }
    }
    if (!KVF_INVERSE && !(largest <= LARGEST)) item.bad = 1;
}

extern "C" __global__ void __launch_bounds__(THREADS, DEPTH <= 256 ? 2 : 1) kvf_transform(const __grid_constant__ Job job) {
    // Rows of BUFFERS items; what is delivered; what each row is multiplied by; and where rows of three items lie in the cache.
    extern __shared__ uint4 shared[];
    __shared__ Item items[8];    // by number: of the last, this, and three more
    __shared__ Place places[3];  // of this item, the next and the one behind it (or before)
    __shared__ Column column[TILES];
    __shared__ Token tokens[TOKENS];
    const u32 buffers = shared_address(shared), out = buffers + BUFFERS * BUFFER_BYTES, factor = out + OUT_BYTES, rows_at = factor + 4 * TOKENS;
    if (threadIdx.x == 0) {
        int line = 0, channel = 0;
        for (int i = 0; i < TILES; ++i) {
            column[i] = {(short)line, (short)channel};
            channel += 8;
            if (channel >= (int)(job.lines[3 * line + 2] >> 32)) ++line, channel = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x < TOKENS) tokens[threadIdx.x].block = -1;
    const Share share(job);
    const int size = share.size();
    if (size == 0) return;
    if (threadIdx.x < 3 && (int)threadIdx.x < size) Share::find(job, share, threadIdx.x, items[threadIdx.x]);
    __syncthreads();
    for (int k = 0; k < 2; ++k) note(job, items[k], ask(job, items[k], tokens), places[k], rows_at + k * 8 * TOKENS);
    __syncthreads();
    const Column own = column[threadIdx.x % VECTORS];  // where this thread's vectors begin, BELOW
    if (BUFFERS == 2) copy_rows(job, items[0], places[0], column, own, buffers, rows_at);
    Held held;
    held.part = -1;
    bool good = false;
    int here = 0, behind = 2;  // among places
    // What is left to do of item k once all of it has been multiplied.
    const auto complete = [&](int k) {
        const Item &item = items[k & 7];
        const Place &place = places[behind];
        if (!KVF_INVERSE) mark(job, item, share.blocks, rows_at + behind * 8 * TOKENS);
        if (!KVF_INVERSE && item.bad) copy_block(job, item, place, false);
        else if (GATHERED && good) send_rows(job, item, place, column, own, out, rows_at + behind * 8 * TOKENS);
    };
#pragma unroll 1
    for (int k = 0; k < size; ++k) {
        Item &item = items[k & 7];
        const Place &place = places[here];
        const int ahead = here == 2 ? 0 : here + 1;
        const u32 rows = buffers + (BUFFERS == 2 ? (k & 1) * BUFFER_BYTES : 0);
        RowAngles angles;
        if (!KVF_INVERSE && ALIGNED && item.turned) angles.ask(job, place, 0);
        if (BUFFERS == 1) {
            __syncthreads();
            copy_rows(job, item, place, column, own, rows, rows_at + here * 8 * TOKENS);
        }
        await_copies();
        __syncthreads();
        if (BUFFERS == 2 && k + 1 < size) copy_rows(job, items[(k + 1) & 7], places[ahead], column, own, buffers + ((k + 1) & 1) * BUFFER_BYTES, rows_at + ahead * 8 * TOKENS);
        if (k > 0) complete(k - 1);
        if (k + 3 < size && threadIdx.x == THREADS - 64) share.find_next(job, k + 3, items[(k + 2) & 7], items[(k + 3) & 7]);
        Asked asked;
        if (k + 2 < size) asked = ask(job, items[(k + 2) & 7], tokens);
        good = !KVF_INVERSE || (place.status == GOOD && !item.bad);
        if (good) round_rows(job, item, place, rows, factor, rows_at + here * 8 * TOKENS, angles);
        else if (place.status == GOOD) copy_block(job, item, place, true);
        __syncthreads();
        if (k + 2 < size) note(job, items[(k + 2) & 7], asked, places[behind], rows_at + behind * 8 * TOKENS);
        const u32 own_rows = rows_at + here * 8 * TOKENS;
        if (good) {
            const auto multiply_as = [&](auto turned) {
                if (!KVF_INVERSE || item.lower) multiply_rows<turned.value, true>(job, item, place, column, rows, factor, own_rows, out, held);
                else multiply_rows<turned.value, !KVF_INVERSE>(job, item, place, column, rows, factor, own_rows, out, held);
            };
            if (!ALL_TURN) multiply_as(Turned<LOOK>());
            else if (item.turned) multiply_as(Turned<ALL_TURN>());
            else multiply_as(Turned<0>());
        }
        behind = here;
        here = ahead;
    }
    __syncthreads();
    complete(size - 1);
}
