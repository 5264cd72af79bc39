// Pages to transform coefficients and back (docs/format.md, `transform`; truth: codecs/transform/reference.py).
//
// A block of threads takes 64 tokens of one group of heads: loads its rows, turns keys by RoPE, takes the mean off, rounds each
// row to 16-bit integers under a power of two of its own, and multiplies by the basis on tensor cores. 16-bit integers are
// two 8-bit halves, so that a product is four products of 8 bits with exact 32-bit sums; a float is made of the sum of all
// four, rounded once. Hence the same bits as the reference's.
//
// The host defines: KVF_INVERSE, KVF_MANTISSA (7 bfloat16, 10 float16), KVF_N (channels of a group), KVF_HEAD (channels of a head),
// KVF_ROTARY (of them in RoPE pairs, 0 none), KVF_INTERLEAVED (pairs are neighbours). Compile with -fmad=false.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int N = KVF_N, HEAD = KVF_HEAD, ROTARY = KVF_ROTARY, HALF = ROTARY / 2;
constexpr int DEPTH = (N + 31) / 32 * 32, STEPS = DEPTH / 32, TILES = N / 8;  // of the product: its inner size, steps of 32, columns by 8
constexpr int TOKENS = 64, THREADS = 256, WARPS = THREADS / 32;
// A row in shared memory: N values of 16 bits, then in their place DEPTH high and DEPTH low halves. 16 bytes more: no bank conflicts.
constexpr int ROW_BYTES = 2 * DEPTH + 16, VALUES = DEPTH / 32;
constexpr u32 FULL = 0xffffffffu;
constexpr float SMALLEST = 2.44140625e-4f, LARGEST = 65504.0f;
constexpr float MARK = 30000.0f, MARKED_ABOVE = 15000.0f, EXACT_BOUND = 7.52316384526264e-37f;  // 2**-120
constexpr float DTYPE_LARGEST = KVF_MANTISSA == 7 ? 3.3895313892515355e38f : 65504.0f;
constexpr int GOOD = 0;

// Line l is {address of page 0, bytes from page to page, bytes from token to token | channels << 32}, as in common.cu.
struct Job {
    const i64 *lines, *coded_lines;  // of the cache; of the coefficients, marks last
    const int *pages;                // of the cache, a row a chunk; of the coefficients, page j of chunk c is c*chunk_pages + j
    const int *positions;            // of each chunk's first token
    const float2 *angles;            // [num_positions][HALF]: cosine, sine
    const uint4 *basis;              // [parts][TILES][STEPS][32], see host
    const float *mean, *scale;       // [parts][N]; [parts]: 1/step (forward), step (inverse)
    float *bounds;                   // forward: of each tile
    const int *status;               // inverse: of each chunk
    float bound;
    int num_chunks, chunk_pages, page_tokens, num_positions;
    int parts, groups, part_lines, num_lines, coded, mark_width;  // groups: of a layer's K, or V; coded: lines of coefficients and marks
};

__device__ __forceinline__ float to_float(u32 word) {
#if KVF_MANTISSA == 7
    return __uint_as_float(word << 16);
#else
    float f;
    u16 h = (u16)word;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
}
__device__ __forceinline__ u32 half_bits(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ float from_half(u32 word) {
    float f;
    u16 h = (u16)word;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ u32 to_dtype(float f) {
    f = fminf(fmaxf(f, -DTYPE_LARGEST), DTYPE_LARGEST);
#if KVF_MANTISSA == 7
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#else
    return half_bits(f);
#endif
}
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float((u32)(e + 127) << 23); }
__device__ __forceinline__ bool finite(float f) { return fabsf(f) < __uint_as_float(0x7f800000u); }

#define KVF_MMA(NAME, A, B)                                                                                                 \
    __device__ __forceinline__ void NAME(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {                                  \
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." A "." B ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                       \
    }
KVF_MMA(multiply_high, "s8", "s8")
KVF_MMA(multiply_high_low, "s8", "u8")
KVF_MMA(multiply_low_high, "u8", "s8")
KVF_MMA(multiply_low, "u8", "u8")

// Which line, and which channel of it, a column of 8 begins.
struct Column {
    short line, channel;
};

// The first columns of pair p of column tiles: partners under RoPE where there is a rotation, else neighbours.
__device__ __forceinline__ int first_tile(int p, bool turned) {
#if KVF_ROTARY > 0 && !KVF_INTERLEAVED
    if (turned) {
        constexpr int EACH = HEAD / 16, PAIRED = HALF / 8;  // pairs a head has; of them such that RoPE turns
        const int head = p / EACH, i = p % EACH;
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

// Copy a block's values as they are, 2 bytes at a time: between pages and coefficients, either way.
__device__ __noinline__ void copy_block(const Job &job, int part, int chunk, int first_token, int tokens, bool to_pages) {
    for (int l = 0; l < job.part_lines; ++l) {
        const i64 *line = job.lines + 3 * (part * job.part_lines + l), *coded = job.coded_lines + 3 * (part * job.part_lines + l);
        const int channels = (int)(line[2] >> 32);
        for (int i = threadIdx.x; i < tokens * channels; i += THREADS) {
            const int t = i / channels, c = i - t * channels, token = first_token + t, p = token / job.page_tokens, r = token - p * job.page_tokens;
            const int page = job.pages[(i64)chunk * job.chunk_pages + p];
            u16 *there = (u16 *)(line[0] + page * line[1] + r * (i64)(u32)line[2]) + c;
            u16 *here = (u16 *)(coded[0] + ((i64)chunk * job.chunk_pages + p) * coded[1] + r * (i64)(u32)coded[2]) + c;
            if (!to_pages) *here = page < 0 ? (u16)0 : *there;
            else if (page >= 0) *there = *here;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, DEPTH <= 256 ? 2 : 1) kvf_transform(Job given) {
    extern __shared__ uint4 shared[];
    __shared__ Job job;
    __shared__ int row_page[TOKENS], row_in[TOKENS], row_exponent[TOKENS], bad;
    __shared__ Column column[TILES];
    u8 *rows = (u8 *)shared;
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
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        // Neighbours share a part: its basis stays in the cache.
        const int part = item / (job.num_chunks * blocks), chunk = item / blocks % job.num_chunks, block = item % blocks;
        const int first_token = block * TOKENS, tokens = min(TOKENS, tokens_of_chunk - first_token);
        const bool turned = ROTARY > 0 && (part / job.groups & 1) == 0;
        // The mark of this block: channel `part` of the lines behind the others.
        const int mark_line = job.num_lines + part / job.mark_width;
        const i64 *marks = job.coded_lines + 3 * mark_line;
        __syncthreads();
        if (threadIdx.x < TOKENS) {
            const int token = first_token + threadIdx.x, p = token / job.page_tokens;
            row_in[threadIdx.x] = token - p * job.page_tokens;
            row_page[threadIdx.x] = (int)threadIdx.x < tokens ? job.pages[(i64)chunk * job.chunk_pages + p] : -1;
        }
        if (threadIdx.x == 0) {
            bad = 0;
#if KVF_INVERSE
            const int p = first_token / job.page_tokens, r = first_token - p * job.page_tokens;
            const u8 *mark = (const u8 *)(marks[0] + ((i64)chunk * job.chunk_pages + p) * marks[1] + r * (i64)(u32)marks[2]);
            bad = from_half(((const u16 *)mark)[part % job.mark_width]) > MARKED_ABOVE;
#endif
        }
        __syncthreads();
#if KVF_INVERSE
        if (job.status[chunk] != GOOD) continue;
        if (bad) {
            copy_block(job, part, chunk, first_token, tokens, true);
            continue;
        }
#endif
        // ---- rows, as they are
        for (int l = 0, at = 0; l < job.part_lines; ++l) {
            const i64 *line = (KVF_INVERSE ? job.coded_lines : job.lines) + 3 * (part * job.part_lines + l);
            const int channels = (int)(line[2] >> 32), vectors = channels / 8;
            const i64 page_bytes = line[1], token_bytes = (i64)(u32)line[2];
            const bool aligned = ((line[0] | page_bytes | token_bytes) & 15) == 0;
            for (int i = threadIdx.x; i < TOKENS * vectors; i += THREADS) {
                const int t = i / vectors, c = 8 * (i - t * vectors);
                uint4 v = {0, 0, 0, 0};
                const int page = KVF_INVERSE ? chunk * job.chunk_pages + (first_token + t) / job.page_tokens : row_page[t];
                if (t < tokens && page >= 0) {
                    const u8 *p = (const u8 *)(line[0] + page * page_bytes + row_in[t] * token_bytes) + 2 * c;
                    if (aligned) {
                        v = __ldg((const uint4 *)p);
                    } else {
                        const u16 *q = (const u16 *)p;
                        v = {q[0] | (u32)q[1] << 16, q[2] | (u32)q[3] << 16, q[4] | (u32)q[5] << 16, q[6] | (u32)q[7] << 16};
                    }
                }
                *(uint4 *)(rows + t * ROW_BYTES + 2 * (at + c)) = v;
            }
            at += channels;
        }
        __syncthreads();
        // ---- rows to integers, a warp a row
        for (int t = warp; t < TOKENS; t += WARPS) {
            u8 *row = rows + t * ROW_BYTES;
            const u16 *words = (const u16 *)row;
            float x[VALUES], most = 0.0f;
            bool good = true;
            const int position = min(max(job.positions[chunk] + first_token + t, 0), job.num_positions - 1);
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                const int c = lane + 32 * i;
                x[i] = 0.0f;
                if (N % 32 && c >= N) continue;
#if KVF_INVERSE
                x[i] = from_half(words[c]);
                if (!finite(x[i])) x[i] = 0.0f;
#else
                x[i] = to_float(words[c]);
                good &= finite(x[i]);
                if (ROTARY > 0 && turned) {
                    const int in_head = c % HEAD;
                    if (in_head < ROTARY) {
                        const bool first = KVF_INTERLEAVED ? !(in_head & 1) : in_head < HALF;
                        const int step = KVF_INTERLEAVED ? 1 : HALF;
                        const float other = to_float(words[first ? c + step : c - step]);
                        const float2 angle = job.angles[(i64)position * HALF + (KVF_INTERLEAVED ? in_head / 2 : in_head % HALF)];
                        const float along = __fmul_rn(x[i], angle.x), across = __fmul_rn(other, angle.y);
                        x[i] = first ? __fadd_rn(along, across) : __fsub_rn(along, across);
                    }
                }
                x[i] = __fsub_rn(x[i], job.mean[part * N + c]);
                good &= finite(x[i]);
#endif
                most = fmaxf(most, fabsf(x[i]));
            }
            good = __all_sync(FULL, good);
            most = __uint_as_float(__reduce_max_sync(FULL, __float_as_uint(good ? most : 0.0f)));
            // frexp's exponent, kept to where all powers of two are normal numbers.
            const int exponent = min(max((int)(__float_as_uint(most) >> 23) - 126, -60), 128);
            const float scale = power_of_two(15 - exponent);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                const int c = lane + 32 * i;
                const int whole = good ? min(max(__float2int_rn(__fmul_rn(x[i], scale)), -32767), 32767) : 0;
                row[c] = (u8)(whole >> 8);
                row[DEPTH + c] = (u8)whole;
            }
            if (lane == 0) {
                row_exponent[t] = exponent;
                if (!good && t < tokens) bad = 1;
            }
        }
        __syncthreads();
        // ---- the product: a warp has 32 rows, and every fourth pair of column tiles
        const int base = 32 * (warp & 1), row_of = lane >> 2, column_of = lane & 3;
        const uint4 *basis = job.basis + (i64)part * TILES * STEPS * 32;
        const float scale = job.scale[part];
        for (int p = warp >> 1; p < TILES / 2; p += WARPS / 2) {
            const int tile[2] = {first_tile(p, turned), second_tile(p, first_tile(p, turned), turned)};
            int high[2][2][4] = {}, middle[2][2][4] = {}, low[2][2][4] = {};
#pragma unroll 2
            for (int k = 0; k < STEPS; ++k) {
                uint4 b[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) b[j] = __ldg(basis + ((i64)tile[j] * STEPS + k) * 32 + lane);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    u32 upper[4], lower[4];
#pragma unroll
                    for (int q = 0; q < 4; ++q) {
                        const u8 *at = rows + (base + 16 * m + row_of + 8 * (q & 1)) * ROW_BYTES + 32 * k + 4 * column_of + 16 * (q >> 1);
                        upper[q] = *(const u32 *)at;
                        lower[q] = *(const u32 *)(at + DEPTH);
                    }
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        multiply_high(high[m][j], upper, b[j].x, b[j].y);
                        multiply_high_low(middle[m][j], upper, b[j].z, b[j].w);
                        multiply_low_high(middle[m][j], lower, b[j].x, b[j].y);
                        multiply_low(low[m][j], lower, b[j].z, b[j].w);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {  // the fragment's two rows
                    const int t = base + 16 * m + row_of + 8 * h;
                    if (t >= tokens) continue;
                    const float back = power_of_two(row_exponent[t] - 30);
                    float y[2][2];
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int q = 2 * h + i;
                            const i64 sum = ((i64)high[m][j][q] << 16) + ((i64)middle[m][j][q] << 8) + low[m][j][q];
                            y[j][i] = __fmul_rn(__fmul_rn(__ll2float_rn(sum), back), scale);
                        }
#if KVF_INVERSE
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int i = 0; i < 2; ++i) y[j][i] = __fadd_rn(y[j][i], job.mean[part * N + 8 * tile[j] + 2 * column_of + i]);
                    if (ROTARY > 0 && turned) {
                        const int position = min(max(job.positions[chunk] + first_token + t, 0), job.num_positions - 1);
                        const float2 *angles = job.angles + (i64)position * HALF;
#if KVF_INTERLEAVED
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const int in_head = (8 * tile[j] + 2 * column_of) % HEAD;
                            if (in_head >= ROTARY) continue;
                            const float2 angle = angles[in_head / 2];
                            const float first = y[j][0], second = y[j][1];
                            y[j][0] = __fsub_rn(__fmul_rn(first, angle.x), __fmul_rn(second, angle.y));
                            y[j][1] = __fadd_rn(__fmul_rn(second, angle.x), __fmul_rn(first, angle.y));
                        }
#else
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int in_head = (8 * tile[0] + 2 * column_of + i) % HEAD;
                            if (in_head >= HALF) continue;
                            const float2 angle = angles[in_head];
                            const float first = y[0][i], second = y[1][i];
                            y[0][i] = __fsub_rn(__fmul_rn(first, angle.x), __fmul_rn(second, angle.y));
                            y[1][i] = __fadd_rn(__fmul_rn(second, angle.x), __fmul_rn(first, angle.y));
                        }
#endif
                    }
                    const int page = row_page[t];
                    if (page < 0) continue;
#else
                    const i64 page = (i64)chunk * job.chunk_pages + (first_token + t) / job.page_tokens;
#endif
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const Column place = column[tile[j]];
                        const i64 *line = (KVF_INVERSE ? job.lines : job.coded_lines) + 3 * (part * job.part_lines + place.line);
                        u8 *out = (u8 *)(line[0] + page * line[1] + row_in[t] * (i64)(u32)line[2]) + 2 * (place.channel + 2 * column_of);
                        u32 word[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
#if KVF_INVERSE
                            word[i] = to_dtype(y[j][i]);
#else
                            const float size = fabsf(y[j][i]);
                            if (!(size <= LARGEST)) bad = 1;
                            word[i] = size < SMALLEST ? 0 : half_bits(y[j][i]);
#endif
                        }
                        if (((u64)out & 3) == 0) *(u32 *)out = word[0] | word[1] << 16;
                        else ((u16 *)out)[0] = (u16)word[0], ((u16 *)out)[1] = (u16)word[1];
                    }
                }
        }
#if !KVF_INVERSE
        __syncthreads();
        if (bad) copy_block(job, part, chunk, first_token, tokens, false);
        float *bounds = job.bounds + ((i64)chunk * blocks + block) * job.coded;
        if ((int)threadIdx.x < job.part_lines) bounds[part * job.part_lines + threadIdx.x] = bad ? EXACT_BOUND : job.bound;
        if (threadIdx.x == 0) bounds[mark_line] = job.bound;
        for (int t = threadIdx.x; t < tokens; t += THREADS) {
            const i64 page = (i64)chunk * job.chunk_pages + (first_token + t) / job.page_tokens;
            u16 *mark = (u16 *)(marks[0] + page * marks[1] + row_in[t] * (i64)(u32)marks[2]);
            mark[part % job.mark_width] = (u16)half_bits(bad ? MARK : 0.0f);
        }
#endif
    }
}
