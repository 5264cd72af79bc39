// Pages to transform coefficients and back (docs/format.md, `transform`; truth: codecs/transform/reference.py).
//
// A block of threads takes 64 tokens of one group of heads: loads its rows, turns keys by RoPE, takes the mean off, rounds each
// row to 16-bit integers under a power of two of its own, and multiplies by the basis on tensor cores. 16-bit integers are
// two 8-bit halves, so that a product is four products of 8 bits with exact 32-bit sums; a float is made of the sum of all
// four, rounded once. Hence the same bits as the reference's.
//
// The host defines: KVF_INVERSE, KVF_MANTISSA (7 bfloat16, 10 float16), KVF_N (channels of a group), KVF_HEAD (channels of a head),
// KVF_ROTARY (of them in RoPE pairs, 0 none), KVF_INTERLEAVED (pairs are neighbours). Behind intrinsics.cu.

constexpr int N = KVF_N, HEAD = KVF_HEAD, ROTARY = KVF_ROTARY, HALF = ROTARY / 2;
constexpr int DEPTH = (N + 31) / 32 * 32, STEPS = DEPTH / 32, TILES = N / 8;  // of the product: its inner size, steps of 32, columns by 8
constexpr int TOKENS = 64, THREADS = 256, WARPS = THREADS / 32;
// A row in shared memory: N values of 16 bits, then in their place DEPTH high and DEPTH low halves. 16 bytes more: no bank conflicts.
constexpr int ROW_BYTES = 2 * DEPTH + 16, PAIRS = (DEPTH + 63) / 64;
constexpr float LARGEST = 65504.0f;
constexpr float MARK = 30000.0f, MARKED_ABOVE = 15000.0f, EXACT_BOUND = 7.52316384526264e-37f;  // 2**-120
constexpr float DTYPE_LARGEST = KVF_MANTISSA == 7 ? 3.3895313892515355e38f : 65504.0f;
constexpr int GOOD = 0;

// Line l is {address of page 0, bytes from page to page, bytes from token to token | channels << 32}, as in common.cu.
struct Job {
    const i64 *lines, *coded_lines;  // of the cache; of the coefficients, a part's being pieces of one row, marks last
    const int *pages;                // of the cache, a row a chunk; of the coefficients, page j of chunk c is c*chunk_pages + j
    const int *positions;            // of each chunk's first token
    const float2 *angles;            // [num_positions][HALF]: cosine, sine
    const uint4 *basis;              // [parts][TILES][STEPS][32], see host
    const float *mean, *scale;       // [parts][N]; [parts]: 1/step (forward), step (inverse)
    float *bounds;                   // forward: of each tile
    const int *status;               // inverse: of each chunk
    float bound;
    int num_chunks, chunk_pages, page_tokens, num_positions;
    int parts, groups, part_lines, coded_part_lines, coded, mark_width;  // groups: of a layer's K, or V; coded: lines of coefficients and marks
    int words;  // whether every row of the cache begins at a multiple of 4 (those of coefficients do)
};

__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float((u32)(e + 127) << 23); }
__device__ __forceinline__ bool finite(float f) { return fabsf(f) < __uint_as_float(0x7f800000u); }

// Which line, and which channel of it, a column of 8 begins.
struct Column {
    short line, channel;
};

constexpr int MOST_LINES = N / 16;

// high * 2**16 + middle * 2**8 + low over 2**8, rounded down: below 2**27 in magnitude, since rows of a basis have length 1. What exceeds
// 32 bits on the way wraps and comes back.
__device__ __forceinline__ float upper_sum(int high, int middle, int low) { return (float)(high * 256 + middle + (low >> 8)); }

// Two coefficients as float16, the first in the low half; denormals and negative zeros become zeros.
__device__ __forceinline__ u32 coefficient_pair(float first, float second) { return flushed_pair(half_pair(first, second)); }
__device__ __forceinline__ u32 value_pair(float first, float second) {
    first = fminf(fmaxf(first, -DTYPE_LARGEST), DTYPE_LARGEST);
    second = fminf(fmaxf(second, -DTYPE_LARGEST), DTYPE_LARGEST);
    return KVF_MANTISSA == 7 ? bfloat_pair(first, second) : half_pair(first, second);
}
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

constexpr u64 NOWHERE = ~0ull;

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
    const i64 *coded = job.coded_lines + 3 * part * job.coded_part_lines;
    for (int l = 0, channels, before = 0; l < job.part_lines; ++l, before += channels) {
        const i64 *line = job.lines + 3 * (part * job.part_lines + l);
        channels = (int)(line[2] >> 32);
        for (int i = threadIdx.x; i < tokens * channels; i += THREADS) {
            const int t = i / channels, c = i - t * channels, token = first_token + t, p = token / job.page_tokens, r = token - p * job.page_tokens;
            const int page = job.pages[(i64)chunk * job.chunk_pages + p];
            u16 *there = (u16 *)(line[0] + page * line[1] + r * (i64)(u32)line[2]) + c;
            u16 *here = (u16 *)(coded[0] + ((i64)chunk * job.chunk_pages + p) * coded[1] + r * (i64)(u32)coded[2]) + before + c;
            if (!to_pages) *here = page < 0 ? (u16)0 : *there;
            else if (page >= 0) *there = *here;
        }
    }
}

// What a block works on: tokens of a chunk, of one part.
struct Item {
    int part, chunk, block, first_token, tokens, mark_line;
    const i64 *marks;  // where this block's mark lies: channel `part` of the lines behind the others

    __device__ __forceinline__ Item(const Job &job, int number, int blocks, int tokens_of_chunk) {
        // Neighbours share a part: its basis stays in the cache.
        part = number / (job.num_chunks * blocks);
        chunk = number / blocks % job.num_chunks;
        block = number % blocks;
        first_token = block * TOKENS;
        tokens = min(TOKENS, tokens_of_chunk - first_token);
        mark_line = job.parts * job.coded_part_lines + part / job.mark_width;
        marks = job.coded_lines + 3 * mark_line;
    }
};

// What is looked up of it before its rows.
struct Place {
    // Of each row: where it lies from its line's start on, in the source and in the destination; NOWHERE if its page is missing.
    u64 row_from[TOKENS], row_to[TOKENS];
    u64 line_start[MOST_LINES], coded_start;
    int position, status, bad;
};

__device__ __forceinline__ void look_up(const Job &job, const Item &item, Place &place) {
    if (threadIdx.x < TOKENS) {
        const int token = item.first_token + threadIdx.x, p = token / job.page_tokens, r = token - p * job.page_tokens;
        const i64 *line = job.lines + 3 * item.part * job.part_lines, *coded = job.coded_lines + 3 * item.part * job.coded_part_lines;
        u64 there = NOWHERE, here = NOWHERE;
        if ((int)threadIdx.x < item.tokens) {
            const int page = job.pages[(i64)item.chunk * job.chunk_pages + p];
            if (page >= 0) there = page * line[1] + r * (i64)(u32)line[2];
            here = ((i64)item.chunk * job.chunk_pages + p) * coded[1] + r * (i64)(u32)coded[2];
        }
        place.row_from[threadIdx.x] = KVF_INVERSE ? here : there;
        place.row_to[threadIdx.x] = KVF_INVERSE ? there : here;
    } else if ((int)threadIdx.x - TOKENS < job.part_lines) {
        const int l = threadIdx.x - TOKENS;
        place.line_start[l] = job.lines[3 * (item.part * job.part_lines + l)];
    }
    if (threadIdx.x == THREADS - 1) {
        place.coded_start = job.coded_lines[3 * item.part * job.coded_part_lines];
        place.position = job.positions[item.chunk] + item.first_token;
        place.bad = 0;
#if KVF_INVERSE
        const int p = item.first_token / job.page_tokens, r = item.first_token - p * job.page_tokens;
        const u8 *mark = (const u8 *)(item.marks[0] + ((i64)item.chunk * job.chunk_pages + p) * item.marks[1] + r * (i64)(u32)item.marks[2]);
        place.status = job.status[item.chunk];
        place.bad = from_half(((const u16 *)mark)[item.part % job.mark_width]) > MARKED_ABOVE;
#endif
    }
}
