// Pages to transform coefficients and back (docs/format.md, `transform`; truth: codecs/transform/reference.py).
//
// An item is 64 tokens of one group of heads. A block of threads takes its rows, turns keys by RoPE, takes the mean off, rounds each
// row to 16-bit integers under a power of two of its own, and multiplies by the basis on tensor cores. 16-bit integers are
// two 8-bit halves, so that a product is four products of 8 bits with exact 32-bit sums; a float is made of the sum of all
// four, rounded once. Hence the same bits as the reference's.
//
// The host defines: KVF_INVERSE, KVF_MANTISSA (7 bfloat16, 10 float16), KVF_N (channels of a group), KVF_HEAD (channels of a head),
// KVF_ROTARY (of them in RoPE pairs, 0 none), KVF_INTERLEAVED (pairs are neighbours). Behind intrinsics.cu.

constexpr int N = KVF_N, HEAD = KVF_HEAD, ROTARY = KVF_ROTARY, HALF = ROTARY / 2;
constexpr int DEPTH = (N + 31) / 32 * 32, STEPS = DEPTH / 32, TILES = N / 8;  // of the product: its inner size, steps of 32, columns by 8
constexpr int TOKENS = 64, THREADS = 256, WARPS = THREADS / 32;
constexpr int VECTORS = N / 8;  // a row's values by 8: 16 bytes
// A row in shared memory: N values of 16 bits, then in their place DEPTH high and DEPTH low halves. 16 bytes more: no bank conflicts.
constexpr int ROW_BYTES = 2 * DEPTH + 16, BUFFER_BYTES = TOKENS * ROW_BYTES;
constexpr int BUFFERS = DEPTH <= 512 ? 2 : 1;  // with two, the next item's rows come while this one is multiplied
// What is delivered is gathered in shared memory, where there is room for that, and leaves it in whole rows.
constexpr bool GATHERED = DEPTH <= 512;
constexpr int OUT_ROW_BYTES = 2 * N + 16, OUT_BYTES = GATHERED ? TOKENS * OUT_ROW_BYTES : 0;
constexpr float MARK = 30000.0f, MARKED_ABOVE = 15000.0f, EXACT_BOUND = 7.52316384526264e-37f;  // 2**-120
constexpr int GOOD = 0;
constexpr u64 NOWHERE = 1ull << 63;
__device__ __forceinline__ bool somewhere(u64 place) { return (i64)place >= 0; }

// Line l is {address of page 0, bytes from page to page, bytes from token to token | channels << 32}, as in common.cu.
struct Job {
    const i64 *lines, *coded_lines;  // of the cache; of the coefficients, a part's being pieces of one row, marks last
    const int *pages;                // of the cache, a row a chunk; of the coefficients, page j of chunk c is c*chunk_pages + j
    const int *positions;            // of each chunk's first token
    // Cosine and sine of pairs, [num_positions][HALF]; forward, and unless pairs are neighbours, [num_positions][4][HALF/8][2]: pairs 2i and 2i+1 of
    // each eight side by side, so that lanes of neighbouring eights read neighbouring words.
    const float2 *angles;
    const uint4 *basis;              // [parts][TILES][STEPS][32], see host
    const float *mean;               // [parts][N]; forward [parts][2][N/8][4], likewise
    const float *scale;              // [parts]: 1/step (forward), step (inverse)
    float *bounds;                   // forward: of each tile
    const int *status;               // inverse: of each chunk
    float bound;
    int num_chunks, chunk_pages, page_tokens, num_positions;
    int parts, groups, part_lines, coded_part_lines, coded, mark_width;  // groups: of a layer's K, or V; coded: lines of coefficients and marks
    int vectors;  // whether every row of the cache begins at a multiple of 16 (those of coefficients do)
};

// Which line, and which channel of it, a column of 8 begins.
struct Column {
    short line, channel;
};

// What a block works on: tokens of a chunk, of one part.
struct Item {
    int part, chunk, block, first_token, tokens;
    int turned;  // keys, with RoPE
    int mark_line, mark_channel;
    __device__ __forceinline__ const i64 *marks(const Job &job) const { return job.coded_lines + 3 * mark_line; }
};

// A block's items: a run of all keys', then one of all values'. Its basis changes rarely, and all blocks have as much to turn.
struct Share {
    int blocks, tokens_of_chunk, of_side, begin, each;

    __device__ __forceinline__ explicit Share(const Job &job) {
        tokens_of_chunk = job.chunk_pages * job.page_tokens;
        blocks = (tokens_of_chunk + TOKENS - 1) / TOKENS;
        of_side = job.parts / 2 * job.num_chunks * blocks;
        begin = (int)((i64)of_side * blockIdx.x / gridDim.x);
        each = (int)((i64)of_side * (blockIdx.x + 1) / gridDim.x) - begin;
    }
    __device__ __forceinline__ int size() const { return 2 * each; }
    // The k-th of them.
    __device__ __noinline__ static void find(const Job &job, const Share &share, int k, Item &item) {
        const bool value = k >= share.each;
        const int within = share.begin + (value ? k - share.each : k), of_part = job.num_chunks * share.blocks;
        const int nth = within / of_part, rest = within - nth * of_part, layer = nth / job.groups;
        item.part = (2 * layer + value) * job.groups + nth - layer * job.groups;
        item.chunk = rest / share.blocks;
        item.block = rest - item.chunk * share.blocks;
        item.first_token = item.block * TOKENS;
        item.tokens = min(TOKENS, share.tokens_of_chunk - item.first_token);
        item.turned = ROTARY > 0 && !value;
        item.mark_line = job.parts * job.coded_part_lines + item.part / job.mark_width;
        item.mark_channel = item.part % job.mark_width;
    }
    // The k-th, from the one before it.
    __device__ __forceinline__ void find_next(const Job &job, int k, const Item &before, Item &item) const {
        const bool wraps = before.block + 1 == blocks;
        const int block = wraps ? 0 : before.block + 1, chunk = before.chunk + wraps;
        if (k == each || chunk == job.num_chunks) return find(job, *this, k, item);
        item = before;
        item.chunk = chunk;
        item.block = block;
        item.first_token = block * TOKENS;
        item.tokens = min(TOKENS, tokens_of_chunk - item.first_token);
    }
};

constexpr int MOST_LINES = N / 16;

// What is looked up of it before its rows.
struct Place {
    u64 row_from[TOKENS];  // where each row lies in the source, from its line's start on; NOWHERE if its page is missing
    u64 line_start[MOST_LINES], coded_start;
    int position, status, bad;
};

// Where a thread's token of an item lies in its chunk; kept, for it changes with the block only.
struct Token {
    int block, page, slot;
    __device__ __forceinline__ void find(const Job &job, const Item &item, int i) {
        if (block == item.block) return;
        const int number = item.first_token + i;
        block = item.block;
        page = number / job.page_tokens;
        slot = number - page * job.page_tokens;
    }
};

// A thread's share of that, on its way from memory.
struct Asked {
    u64 word;
    int first, second;
};

__device__ __forceinline__ Asked ask(const Job &job, const Item &item, Token *tokens) {
    Asked asked = {NOWHERE, -1, 0};
    const int i = threadIdx.x;
    if (i < TOKENS) {
        Token &token = tokens[i];
        token.find(job, item, i);
        if (i < item.tokens) {
            const i64 *coded = job.coded_lines + 3 * item.part * job.coded_part_lines;
            const i64 page = (i64)item.chunk * job.chunk_pages + token.page;
            asked.first = job.pages[page];
            asked.second = token.slot;
            asked.word = page * coded[1] + token.slot * (i64)(u32)coded[2];
        }
    } else if (i - TOKENS < job.part_lines) {
        asked.word = job.lines[3 * (item.part * job.part_lines + i - TOKENS)];
    } else if (i == THREADS - 1) {
        asked.first = job.positions[item.chunk];
#if KVF_INVERSE
        const int p = item.first_token / job.page_tokens, r = item.first_token - p * job.page_tokens;
        const i64 *marks = item.marks(job);
        const u16 *mark = (const u16 *)(marks[0] + ((i64)item.chunk * job.chunk_pages + p) * marks[1] + r * (i64)(u32)marks[2]);
        asked.word = mark[item.mark_channel];
        asked.second = job.status[item.chunk];
#endif
    }
    return asked;
}

// `rows_to`: likewise, in the destination; in shared memory.
__device__ __forceinline__ u64 load_place(u32 rows_to, int t) {
    u32 word[2];
    load_shared_words<2>(rows_to + 8 * t, word);
    return word[0] | (u64)word[1] << 32;
}
__device__ __forceinline__ void note(const Job &job, const Item &item, const Asked &asked, Place &place, u32 rows_to) {
    const int i = threadIdx.x;
    if (i < TOKENS) {
        const i64 *line = job.lines + 3 * item.part * job.part_lines;
        const u64 there = asked.first < 0 ? NOWHERE : asked.first * line[1] + asked.second * (i64)(u32)line[2], here = asked.word;
        place.row_from[i] = KVF_INVERSE ? here : there;
        const u64 to = KVF_INVERSE ? there : here;
        const u32 words[2] = {(u32)to, (u32)(to >> 32)};
        store_shared_words<2>(rows_to + 8 * i, words);
    } else if (i - TOKENS < job.part_lines) {
        place.line_start[i - TOKENS] = asked.word;
    }
    if (i == THREADS - 1) {
        place.coded_start = job.coded_lines[3 * item.part * job.coded_part_lines];
        place.position = asked.first + item.first_token;
        place.status = KVF_INVERSE ? asked.second : GOOD;
        place.bad = KVF_INVERSE && from_half((u32)asked.word) > MARKED_ABOVE;
    }
}

// Where a row's vector c lies in the cache or among the coefficients, from the row's place on.
__device__ __forceinline__ u64 start_of(const Place &place, const Column *column, int c, bool coded) {
    return coded ? place.coded_start + 16 * c : place.line_start[column[c].line] + 2 * column[c].channel;
}

// Calls `at(t, c, start, offset)` for this thread's vectors: c of row t, which begins at `start` from the row's place on; `offset` of it among
// rows of `pitch` bytes.
template <typename Visit>
__device__ __forceinline__ void each_vector(const Place &place, const Column *column, bool coded, int pitch, Visit visit) {
    constexpr bool SAME = THREADS % VECTORS == 0;  // a thread's vectors lie below one another
    constexpr int COUNT = (TOKENS * VECTORS + THREADS - 1) / THREADS;
    const u64 own = SAME ? start_of(place, column, threadIdx.x % VECTORS, coded) : 0;
    const u32 own_offset = threadIdx.x / VECTORS * pitch + threadIdx.x % VECTORS * 16;
#pragma unroll(COUNT <= 8 ? COUNT : 4)
    for (int b = 0; b < COUNT; ++b) {
        const int i = threadIdx.x + b * THREADS;
        if (TOKENS * VECTORS % THREADS != 0 && i >= TOKENS * VECTORS) break;
        if (SAME) visit(threadIdx.x / VECTORS + b * (THREADS / VECTORS), own, own_offset + b * (THREADS / VECTORS) * pitch);
        else visit(i / VECTORS, start_of(place, column, i % VECTORS, coded), i / VECTORS * pitch + i % VECTORS * 16);
    }
}

// Rows that begin anywhere, at once.
__device__ __noinline__ void read_rows(const Place &place, const Column *column, u32 rows) {
    each_vector(place, column, false, ROW_BYTES, [&](int t, u64 start, u32 offset) {
        const u64 from = place.row_from[t];
        const u16 *q = (const u16 *)(start + from);
        u32 v[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (somewhere(from)) v[k] = q[2 * k] | (u32)q[2 * k + 1] << 16;
        store_shared_words<4>(rows + offset, v);
    });
}
// Ask for the rows of an item, as they are; zeros where there is none.
__device__ __forceinline__ void copy_rows(const Job &job, const Place &place, const Column *column, u32 rows) {
    if (!KVF_INVERSE && !job.vectors) return read_rows(place, column, rows);
    each_vector(place, column, KVF_INVERSE, ROW_BYTES, [&](int t, u64 start, u32 offset) {
        const u64 from = place.row_from[t];
        copy_behind(rows + offset, somewhere(from) ? start + from : start, somewhere(from));
    });
}

// A vector of a row that may begin anywhere.
__device__ __noinline__ void store_anywhere(u64 address, u32 a, u32 b, u32 c, u32 d) {
    store_pair(address, a);
    store_pair(address + 4, b);
    store_pair(address + 8, c);
    store_pair(address + 12, d);
}
// Store what was gathered at `out`, of rows that `rows_to` says the places of.
__device__ __forceinline__ void send_rows(const Job &job, const Place &place, const Column *column, u32 out, u32 rows_to) {
    const bool vectors = !KVF_INVERSE || job.vectors;
    each_vector(place, column, !KVF_INVERSE, OUT_ROW_BYTES, [&](int t, u64 start, u32 offset) {
        u32 v[4];
        load_shared_words<4>(out + offset, v);
        const u64 to = load_place(rows_to, t);
        if (!somewhere(to)) return;
        if (vectors) store_global<16>((u8 *)(start + to), v);
        else store_anywhere(start + to, v[0], v[1], v[2], v[3]);
    });
}

// Copy an item's values as they are, 2 bytes at a time: between pages and coefficients, either way.
__device__ __noinline__ void copy_block(const Job &job, const Item &item, bool to_pages) {
    const int part = item.part, chunk = item.chunk, first_token = item.first_token, tokens = item.tokens;
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

// Forward, once it is known whether all have coefficients: the item's bounds and its mark.
__device__ __forceinline__ void mark(const Job &job, const Item &item, const Place &place, Token *tokens, int blocks) {
    const bool bad = place.bad;
    float *bounds = job.bounds + ((i64)item.chunk * blocks + item.block) * job.coded;
    const int i = (int)threadIdx.x - 2 * TOKENS;  // not those who look things up
    if (i >= 0 && i < job.coded_part_lines) bounds[item.part * job.coded_part_lines + i] = bad ? EXACT_BOUND : job.bound;
    if (i == 0) bounds[item.mark_line] = job.bound;
    if (i >= 0 && i < item.tokens) {
        Token &token = tokens[TOKENS + i];
        token.find(job, item, i);
        const i64 *marks = item.marks(job);
        u16 *to = (u16 *)(marks[0] + ((i64)item.chunk * job.chunk_pages + token.page) * marks[1] + token.slot * (i64)(u32)marks[2]);
        to[item.mark_channel] = (u16)half_bits(bad ? MARK : 0.0f);
    }
}
