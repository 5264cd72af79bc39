// The kernel of transform_items.cu's job. Behind it.

extern "C" __global__ void __launch_bounds__(THREADS, DEPTH <= 256 ? 2 : 1) kvf_transform(Job given) {
    extern __shared__ uint4 shared[];
    __shared__ Job job;
    __shared__ Place places[2];  // of this item and the next
    __shared__ int row_exponent[TOKENS];
    __shared__ Column column[TILES];
    u8 *rows = (u8 *)shared;
    const u32 rows_address = shared_address(rows);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (threadIdx.x == 0) {
        job = given;
        int line = 0, channel = 0;
        for (int i = 0; i < TILES; ++i) {
            column[i] = {(short)line, (short)channel};
            channel += 8;
            if (channel >= (int)(given.lines[3 * line + 2] >> 32)) ++line, channel = 0;
        }
    }
    __syncthreads();
    const int tokens_of_chunk = job.chunk_pages * job.page_tokens, blocks = (tokens_of_chunk + TOKENS - 1) / TOKENS;
    const int items = job.parts * job.num_chunks * blocks;
    int which = 0;
    if ((int)blockIdx.x < items) look_up(job, Item(job, blockIdx.x, blocks, tokens_of_chunk), places[0]);
    for (int number = blockIdx.x; number < items; number += gridDim.x, which ^= 1) {
        const Item item(job, number, blocks, tokens_of_chunk);
        const int part = item.part, chunk = item.chunk, first_token = item.first_token, tokens = item.tokens;
        const bool turned = ROTARY > 0 && (part / job.groups & 1) == 0;
        Place &place = places[which];
        const auto look_ahead = [&]() {
            const int then = number + (int)gridDim.x;
            if (then < items) look_up(job, Item(job, then, blocks, tokens_of_chunk), places[which ^ 1]);
        };
        __syncthreads();
#if KVF_INVERSE
        if (place.status != GOOD || place.bad) {
            if (place.status == GOOD) copy_block(job, part, chunk, first_token, tokens, true);
            look_ahead();
            continue;
        }
#endif
        // ---- rows, as they are
        constexpr int VECTORS = N / 8, BATCH = 4;
#pragma unroll 1
        for (int first = threadIdx.x; first < TOKENS * VECTORS; first += BATCH * THREADS) {
            uint4 v[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = first + b * THREADS, t = i / VECTORS, c = i % VECTORS;
                v[b] = {0, 0, 0, 0};
                if ((TOKENS * VECTORS) % (BATCH * THREADS) != 0 && i >= TOKENS * VECTORS) continue;
                if (place.row_from[t] == NOWHERE) continue;
                const Column at = column[c];
                const u64 address = (KVF_INVERSE ? place.coded_start + 16 * c : place.line_start[at.line] + 2 * at.channel) + place.row_from[t];
                if ((address & 15) == 0) {  // not by way of the first-level cache, which has the basis
                    u32 word[4];
                    load_global<16>((const u8 *)address, word);
                    v[b] = {word[0], word[1], word[2], word[3]};
                } else {
                    const u16 *q = (const u16 *)address;
                    v[b] = {q[0] | (u32)q[1] << 16, q[2] | (u32)q[3] << 16, q[4] | (u32)q[5] << 16, q[6] | (u32)q[7] << 16};
                }
            }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = first + b * THREADS;
                if ((TOKENS * VECTORS) % (BATCH * THREADS) != 0 && i >= TOKENS * VECTORS) continue;
                *(uint4 *)(rows + i / VECTORS * ROW_BYTES + i % VECTORS * 16) = v[b];
            }
        }
        __syncthreads();
        // ---- rows to integers, a warp a row; a lane has pairs of neighbouring channels
        // Partners under RoPE are a whole number of lanes apart: in the same lane.
        constexpr bool ALIGNED = !KVF_INTERLEAVED && ROTARY > 0 && HALF % 64 == 0 && HEAD % 64 == 0;
        constexpr int APART = HALF / 64, EACH = HEAD / 64;  // pairs a lane has: between partners, and of a head
        const int chunk_position = place.position;
#if !KVF_INVERSE
        float2 mean[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int c = 2 * lane + 64 * i;
            mean[i] = N % 64 && c >= N ? float2{0.0f, 0.0f} : __ldg((const float2 *)(job.mean + part * N + c));
        }
        // Angles are asked for a row ahead.
        float4 angle_ahead[APART ? APART : 1];
        const auto fetch_angles = [&](int t) {
            const float2 *angles = job.angles + (i64)min(max(chunk_position + t, 0), job.num_positions - 1) * HALF;
#pragma unroll
            for (int i = 0; i < APART; ++i) angle_ahead[i] = __ldg((const float4 *)(angles + 2 * lane + 64 * i));
        };
        if (ALIGNED && turned) fetch_angles(warp);
#endif
#pragma unroll(PAIRS <= 4 ? 2 : 1)
        for (int t = warp; t < TOKENS; t += WARPS) {
            u8 *row = rows + t * ROW_BYTES;
            float2 x[PAIRS];
            float most = 0.0f;
            u32 top = 0;  // the largest magnitude's bits: not finite if the exponent's are all set
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                const int c = 2 * lane + 64 * i;
                const u32 word = N % 64 && c >= N ? 0 : *(const u32 *)(row + 2 * c);
                split(word, KVF_INVERSE, x[i].x, x[i].y);
#if KVF_INVERSE
                if (!finite(x[i].x)) x[i].x = 0.0f;
                if (!finite(x[i].y)) x[i].y = 0.0f;
#else
                top = max(top, max(word & 0x7fff, word >> 16 & 0x7fff));
#endif
            }
#if !KVF_INVERSE
            if (ROTARY > 0 && turned) {
                if constexpr (ALIGNED) {
                    float4 angle[APART ? APART : 1];
#pragma unroll
                    for (int i = 0; i < APART; ++i) angle[i] = angle_ahead[i];
                    if (t + WARPS < TOKENS) fetch_angles(t + WARPS);
#pragma unroll
                    for (int i = 0; i < PAIRS; ++i) {
                        if (i % EACH >= APART) continue;
                        const float4 a = angle[i % EACH];
                        const float2 first = x[i], second = x[i + APART];
                        x[i].x = __fadd_rn(__fmul_rn(first.x, a.x), __fmul_rn(second.x, a.y));
                        x[i].y = __fadd_rn(__fmul_rn(first.y, a.z), __fmul_rn(second.y, a.w));
                        x[i + APART].x = __fsub_rn(__fmul_rn(second.x, a.x), __fmul_rn(first.x, a.y));
                        x[i + APART].y = __fsub_rn(__fmul_rn(second.y, a.z), __fmul_rn(first.y, a.w));
                    }
                } else {
                    const float2 *angles = job.angles + (i64)min(max(chunk_position + t, 0), job.num_positions - 1) * HALF;
#pragma unroll
                    for (int i = 0; i < PAIRS; ++i) {
                        const int c = 2 * lane + 64 * i, in_head = c % HEAD;
                        if ((N % 64 && c >= N) || in_head >= ROTARY) continue;
                        if constexpr (KVF_INTERLEAVED) {
                            const float2 a = __ldg(angles + in_head / 2), pair = x[i];
                            x[i].x = __fadd_rn(__fmul_rn(pair.x, a.x), __fmul_rn(pair.y, a.y));
                            x[i].y = __fsub_rn(__fmul_rn(pair.y, a.x), __fmul_rn(pair.x, a.y));
                        } else {
                            const bool first = in_head < HALF;
                            float2 other;
                            split(*(const u32 *)(row + 2 * (first ? c + HALF : c - HALF)), false, other.x, other.y);
                            const float4 a = __ldg((const float4 *)(angles + (first ? in_head : in_head - HALF)));
                            const float2 along = {__fmul_rn(x[i].x, a.x), __fmul_rn(x[i].y, a.z)};
                            const float2 across = {__fmul_rn(other.x, a.y), __fmul_rn(other.y, a.w)};
                            x[i].x = first ? __fadd_rn(along.x, across.x) : __fsub_rn(along.x, across.x);
                            x[i].y = first ? __fadd_rn(along.y, across.y) : __fsub_rn(along.y, across.y);
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                x[i].x = __fsub_rn(x[i].x, mean[i].x);
                x[i].y = __fsub_rn(x[i].y, mean[i].y);
            }
#endif
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) most = fmaxf(most, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
            constexpr u32 NOT_FINITE = KVF_MANTISSA == 7 ? 0x7f80 : 0x7c00;
            const bool good = __all_sync(FULL, top < NOT_FINITE && finite(most));
            most = __uint_as_float(__reduce_max_sync(FULL, __float_as_uint(good ? most : 0.0f)));
            // frexp's exponent, kept to where all powers of two are normal numbers; one more where rounding would take 17 bits.
            int exponent = min(max((int)(__float_as_uint(most) >> 23) - 126, -60), 128);
            exponent += __fmul_rn(most, power_of_two(15 - exponent)) >= 32767.5f;
            const float scale = good ? power_of_two(15 - exponent) : 0.0f;
            __syncwarp();
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                const int c = 2 * lane + 64 * i;
                // 1.5 * 2**23: adding it leaves the rounded integer in the low bits.
                const u32 first = __float_as_uint(__fmul_rn(good ? x[i].x : 0.0f, scale) + 12582912.0f);
                const u32 second = __float_as_uint(__fmul_rn(good ? x[i].y : 0.0f, scale) + 12582912.0f);
                if (DEPTH % 64 && c >= DEPTH) continue;
                *(u16 *)(row + c) = (u16)__byte_perm(first, second, 0x0051);
                *(u16 *)(row + DEPTH + c) = (u16)__byte_perm(first, second, 0x0040);
            }
            if (lane == 0) {
                row_exponent[t] = exponent;
                if (!good && t < tokens) place.bad = 1;
            }
        }
        __syncthreads();
        look_ahead();
        // ---- the product: a warp has 32 rows, and every fourth pair of column tiles
        const int base = 32 * (warp & 1), row_of = lane >> 2, column_of = lane & 3;
        const u32 fragments = rows_address + (base + (lane & 15)) * ROW_BYTES + 16 * (lane >> 4);
        const uint4 *basis = job.basis + (i64)part * TILES * STEPS * 32 + lane;
        const float scale = job.scale[part];
        float largest = 0.0f;
        // The basis comes from the second-level cache: two steps ahead, and over the end of a pair to the next one's first.
        constexpr int EVERY = WARPS / 2, AHEAD = STEPS < 2 ? STEPS : 2;
        uint4 next[AHEAD][2];
        const auto fetch = [&](int first, int second, int k, uint4(&to)[2]) {
            to[0] = __ldg(basis + (first * STEPS + k) * 32);
            to[1] = __ldg(basis + (second * STEPS + k) * 32);
        };
        if (warp >> 1 < TILES / 2) {
            const int first = first_tile(warp >> 1, turned);
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) fetch(first, second_tile(warp >> 1, first, turned), k, next[k]);
        }
#pragma unroll 1
        for (int p = warp >> 1; p < TILES / 2; p += EVERY) {
            const int tile[2] = {first_tile(p, turned), second_tile(p, first_tile(p, turned), turned)};
            const int then = p + EVERY < TILES / 2 ? p + EVERY : p, first_then = first_tile(then, turned), second_then = second_tile(then, first_then, turned);
            int high[2][2][4] = {}, middle[2][2][4] = {}, low[2][2][4] = {};
#pragma unroll(STEPS <= 8 ? STEPS : 2)
            for (int k = 0; k < STEPS; ++k) {
                const uint4 b[2] = {next[0][0], next[0][1]};
#pragma unroll
                for (int i = 0; i + 1 < AHEAD; ++i) {
                    next[i][0] = next[i + 1][0];
                    next[i][1] = next[i + 1][1];
                }
                const bool over = k + AHEAD >= STEPS;
                fetch(over ? first_then : tile[0], over ? second_then : tile[1], over ? k + AHEAD - STEPS : k + AHEAD, next[AHEAD - 1]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    u32 upper[4], lower[4];
                    load_fragments(upper, fragments + 16 * m * ROW_BYTES + 32 * k);
                    load_fragments(lower, fragments + 16 * m * ROW_BYTES + 32 * k + DEPTH);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        multiply_high(high[m][j], upper, b[j].x, b[j].y);
                        multiply_high_low(middle[m][j], upper, b[j].z, b[j].w);
                        multiply_low(low[m][j], lower, b[j].z, b[j].w);
                        multiply_low_high(middle[m][j], lower, b[j].x, b[j].y);
                    }
                }
            }
            u64 start[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Column at = column[tile[j]];
                start[j] = (KVF_INVERSE ? place.line_start[at.line] + 2 * at.channel : place.coded_start + 16 * tile[j]) + 4 * column_of;
            }
#if KVF_INVERSE
            float2 mean[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) mean[j] = __ldg((const float2 *)(job.mean + part * N + 8 * tile[j] + 2 * column_of));
#endif
#if KVF_INVERSE && !KVF_INTERLEAVED
            // Of all rows at once: one latency.
            const int in_head = (8 * tile[0] + 2 * column_of) % HEAD;
            float4 angle[2][2] = {};
            if (ROTARY > 0 && turned && in_head < HALF) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int position = chunk_position + base + 16 * (i / 2) + row_of + 8 * (i % 2);
                    const float2 *angles = job.angles + (i64)min(max(position, 0), job.num_positions - 1) * HALF;
                    angle[i / 2][i % 2] = __ldg((const float4 *)(angles + in_head));
                }
            }
#endif
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {  // the fragment's two rows
                    const int t = base + 16 * m + row_of + 8 * h;
                    const u64 there = place.row_to[t];
                    if (there == NOWHERE) continue;
                    const float factor = __fmul_rn(power_of_two(row_exponent[t] - 22), scale);  // exact
                    float2 y[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        y[j].x = __fmul_rn(upper_sum(high[m][j][2 * h], middle[m][j][2 * h], low[m][j][2 * h]), factor);
                        y[j].y = __fmul_rn(upper_sum(high[m][j][2 * h + 1], middle[m][j][2 * h + 1], low[m][j][2 * h + 1]), factor);
#if KVF_INVERSE
                        y[j].x = __fadd_rn(y[j].x, mean[j].x);
                        y[j].y = __fadd_rn(y[j].y, mean[j].y);
#endif
                    }
#if KVF_INVERSE
                    if (ROTARY > 0 && turned) {
#if KVF_INTERLEAVED
                        const float2 *angles = job.angles + (i64)min(max(chunk_position + t, 0), job.num_positions - 1) * HALF;
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const int in_head = (8 * tile[j] + 2 * column_of) % HEAD;
                            if (in_head >= ROTARY) continue;
                            const float2 a = __ldg(angles + in_head / 2), pair = y[j];
                            y[j].x = __fsub_rn(__fmul_rn(pair.x, a.x), __fmul_rn(pair.y, a.y));
                            y[j].y = __fadd_rn(__fmul_rn(pair.y, a.x), __fmul_rn(pair.x, a.y));
                        }
#else
                        if (in_head < HALF) {
                            const float4 a = angle[m][h];
                            const float2 first = y[0], second = y[1];
                            y[0].x = __fsub_rn(__fmul_rn(first.x, a.x), __fmul_rn(second.x, a.y));
                            y[0].y = __fsub_rn(__fmul_rn(first.y, a.z), __fmul_rn(second.y, a.w));
                            y[1].x = __fadd_rn(__fmul_rn(second.x, a.x), __fmul_rn(first.x, a.y));
                            y[1].y = __fadd_rn(__fmul_rn(second.y, a.z), __fmul_rn(first.y, a.w));
                        }
#endif
                    }
#endif
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
#if KVF_INVERSE
                        const u32 pair[1] = {value_pair(y[j].x, y[j].y)};
                        if (job.words) store_global<4>((u8 *)(start[j] + there), pair);
                        else store_pair(start[j] + there, pair[0]);
#else
                        largest = fmaxf(largest, fmaxf(fabsf(y[j].x), fabsf(y[j].y)));
                        const u32 pair[1] = {coefficient_pair(y[j].x, y[j].y)};
                        store_global<4>((u8 *)(start[j] + there), pair);
#endif
                    }
                }
        }
#if !KVF_INVERSE
        if (!(largest <= LARGEST)) place.bad = 1;
        __syncthreads();
        const bool bad = place.bad;
        if (bad) copy_block(job, part, chunk, first_token, tokens, false);
        float *bounds = job.bounds + ((i64)chunk * blocks + item.block) * job.coded;
        if ((int)threadIdx.x < job.coded_part_lines) bounds[part * job.coded_part_lines + threadIdx.x] = bad ? EXACT_BOUND : job.bound;
        if (threadIdx.x == 0) bounds[item.mark_line] = job.bound;
        if ((int)threadIdx.x < tokens) {
            const int token = first_token + threadIdx.x, p = token / job.page_tokens, r = token - p * job.page_tokens;
            u16 *mark = (u16 *)(item.marks[0] + ((i64)chunk * job.chunk_pages + p) * item.marks[1] + r * (i64)(u32)item.marks[2]);
            mark[part % job.mark_width] = (u16)half_bits(bad ? MARK : 0.0f);
        }
#endif
    }
}
