// Pages to transform coefficients and back (docs/format.md, `transform`; truth: codecs/transform/reference.py).
//
// An item is 64 tokens of one group of heads. A block of threads takes its rows, turns keys by RoPE, takes the mean off, rounds each
// row to 16-bit integers under a power of two of its own, and multiplies by the basis on tensor cores. 16-bit integers are
// two 8-bit halves, so that a product is four products of 8 bits with exact 32-bit sums; a float is made of the sum of all
// four, rounded once. Hence the same bits as the reference's.
//
// The host defines: KVF_INVERSE, KVF_MANTISSA (7 bfloat16, 10 float16), KVF_N (channels of a group), KVF_HEAD (channels of a head),
// KVF_ROTARY (of them in RoPE pairs, 0 none), KVF_INTERLEAVED (pairs are neighbours), KVF_ROOMY (shared memory has room for two items and
// for what is delivered). Behind intrinsics.cu.

constexpr int N = KVF_N, HEAD = KVF_HEAD, ROTARY = KVF_ROTARY, HALF = ROTARY / 2;
constexpr int DEPTH = (N + 31) / 32 * 32, STEPS = DEPTH / 32, TILES = N / 8;  // of the product: its inner size, steps of 32, columns by 8
constexpr int TOKENS = 64, THREADS = 256, WARPS = THREADS / 32;
constexpr int VECTORS = N / 8;  // a row's values by 8: 16 bytes
// A row in shared memory: N values of 16 bits, then in their place DEPTH high and DEPTH low halves. 16 bytes more: no bank conflicts.
constexpr int ROW_BYTES = 2 * DEPTH + 16, BUFFER_BYTES = TOKENS * ROW_BYTES;
constexpr int BUFFERS = KVF_ROOMY ? 2 : 1;  // with two, the next item's rows come while this one is multiplied
constexpr bool GATHERED = KVF_ROOMY;        // what is delivered is gathered in shared memory, and leaves it in whole rows
constexpr int OUT_ROW_BYTES = 2 * N + 16, OUT_BYTES = GATHERED ? TOKENS * OUT_ROW_BYTES : 0;
constexpr float MARK = 30000.0f, MARKED_ABOVE = 15000.0f, EXACT_BOUND = 7.52316384526264e-37f;  // 2**-120
constexpr int GOOD = 0;
constexpr u64 NOWHERE = 1ull << 63;
__device__ __forceinline__ bool somewhere(u64 place) { return (i64)place >= 0; }

// Line l is {address of page 0, bytes from page to page, bytes from token to token | channels << 32}, as in common.cu. A chunk's tokens follow one
// another in the coefficients, and chunks likewise.
struct Job {
    const i64 *lines, *coded_lines;  // of the cache; of the coefficients, a part's being pieces of one row, marks last
    const int *pages;                // of the cache, a row a chunk
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
    int part, chunk, block, first_token, tokens, first_row;  // first_row: among those of coefficients
    int turned;                                              // keys, with RoPE
    int bad;                                                 // kept, or to be kept, as it is
    int lower;                                               // whether some low half of its integers is not 0
    int mark_line, mark_bytes;                               // from mark to mark
    u64 marks, coded;                                        // of the part, at row 0
    i64 page_bytes;                                          // of the cache's lines, from page to page, and
    int token_bytes;                                         // from token to token
    __device__ __forceinline__ u16 *mark(int t) const { return (u16 *)(marks + (i64)(first_row + t) * mark_bytes); }
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
    __device__ __forceinline__ void set_tokens(Item &item) const {
        item.first_token = item.block * TOKENS;
        item.tokens = min(TOKENS, tokens_of_chunk - item.first_token);
        item.first_row = item.chunk * tokens_of_chunk + item.first_token;
        item.bad = 0;
        item.lower = !KVF_INVERSE;
    }
    // The k-th of them.
    __device__ __noinline__ static void find(const Job &job, const Share &share, int k, Item &item) {
        const bool value = k >= share.each;
        const int within = share.begin + (value ? k - share.each : k), of_part = job.num_chunks * share.blocks;
        const int nth = within / of_part, rest = within - nth * of_part, layer = nth / job.groups;
        item.part = (2 * layer + value) * job.groups + nth - layer * job.groups;
        item.chunk = rest / share.blocks;
        item.block = rest - item.chunk * share.blocks;
        item.turned = ROTARY > 0 && !value;
        item.mark_line = job.parts * job.coded_part_lines + item.part / job.mark_width;
        const i64 *line = job.lines + 3 * item.part * job.part_lines, *marks = job.coded_lines + 3 * item.mark_line;
        item.page_bytes = line[1];
        item.token_bytes = (int)line[2];
        item.coded = job.coded_lines[3 * item.part * job.coded_part_lines];
        item.marks = marks[0] + 2 * (item.part % job.mark_width);
        item.mark_bytes = (int)marks[2];
        share.set_tokens(item);
    }
    // The k-th, from the one before it.
    __device__ __forceinline__ void find_next(const Job &job, int k, const Item &before, Item &item) const {
        const bool wraps = before.block + 1 == blocks;
        if (k == each || before.chunk + wraps == job.num_chunks) return find(job, *this, k, item);
        item = before;
        item.block = wraps ? 0 : before.block + 1;
        item.chunk += wraps;
        set_tokens(item);
    }
};

constexpr int MOST_LINES = N / 16;

// What is looked up of it before its rows.
struct Place {
    u64 line_start[MOST_LINES], coded_start;  // of the cache's lines; of the item's coefficients
    int position, status;
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

// A thread's share of what is looked up, on its way from memory.
struct Asked {
    u64 word;
    int first, second;
};

__device__ __forceinline__ Asked ask(const Job &job, const Item &item, Token *tokens) {
    Asked asked = {0, -1, 0};
    const int i = threadIdx.x;
    if (i < TOKENS) {
        if (i < item.tokens) {
            Token &token = tokens[i];
            token.find(job, item, i);
            asked.first = job.pages[(i64)item.chunk * job.chunk_pages + token.page];
            asked.second = token.slot;
            // All of an item have the same, but those of pages that are missing: looked at once a page.
            if (KVF_INVERSE && (i == 0 || token.slot == 0)) asked.word = *item.mark(i);
        }
    } else if (i - TOKENS < job.part_lines) {
        asked.word = job.lines[3 * (item.part * job.part_lines + i - TOKENS)];
    } else if (i == THREADS - 1) {
        asked.first = job.positions[item.chunk];
        if (KVF_INVERSE) asked.second = job.status[item.chunk];
    }
    return asked;
}

// `rows_at`: in shared memory, where each row lies in the cache from its line's start on; NOWHERE if its page is missing.
__device__ __forceinline__ u64 load_place(u32 rows_at, int t) {
    u32 word[2];
    load_shared_words<2>(rows_at + 8 * t, word);
    return word[0] | (u64)word[1] << 32;
}
__device__ __forceinline__ void note(const Job &job, Item &item, const Asked &asked, Place &place, u32 rows_at) {
    const int i = threadIdx.x;
    if (i < TOKENS) {
        const u64 there = asked.first < 0 ? NOWHERE : asked.first * item.page_bytes + asked.second * (i64)item.token_bytes;
        const u32 words[2] = {(u32)there, (u32)(there >> 32)};
        store_shared_words<2>(rows_at + 8 * i, words);
        if (KVF_INVERSE && asked.first >= 0 && from_half((u32)asked.word) > MARKED_ABOVE) item.bad = 1;
    } else if (i - TOKENS < job.part_lines) {
        place.line_start[i - TOKENS] = asked.word;
    } else if (i == THREADS - 1) {
        place.coded_start = item.coded + (i64)item.first_row * (2 * N);
        place.position = asked.first + item.first_token;
        place.status = KVF_INVERSE ? asked.second : GOOD;
    }
}

// Where a row's vector c lies in the cache, from the row's place on.
__device__ __forceinline__ u64 start_of(const Place &place, const Column *column, int c) { return place.line_start[column[c].line] + 2 * column[c].channel; }

constexpr bool BELOW = THREADS % VECTORS == 0;
// Where rows' vectors lie in the cache; looked up once where a thread's lie below one another (BELOW).
struct Starts {
    const Place &place;
    const Column *column;
    u64 own;
    __device__ __forceinline__ Starts(const Place &place, const Column *column, Column own) : place(place), column(column), own(place.line_start[own.line] + 2 * own.channel) {}
    __device__ __forceinline__ u64 operator[](int c) const { return BELOW ? own : start_of(place, column, c); }
};

// A thread's vectors of an item's rows of `pitch` bytes, BATCH at a time: first `ask(b, t, c, offset)` for each of a batch, then `use` likewise.
// c is a vector of row t, `offset` where it lies.
constexpr int COUNT = (TOKENS * VECTORS + THREADS - 1) / THREADS, BATCH = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
template <typename Ask, typename Use>
__device__ __forceinline__ void each_vector(int pitch, Ask ask, Use use) {
    const u32 own = threadIdx.x / VECTORS * pitch + threadIdx.x % VECTORS * 16;
    const auto visit = [&](int b, int at, const auto &what) {
        const int i = threadIdx.x + at * THREADS;
        if (TOKENS * VECTORS % THREADS != 0 && i >= TOKENS * VECTORS) return;
        if (BELOW) what(b, threadIdx.x / VECTORS + at * (THREADS / VECTORS), threadIdx.x % VECTORS, own + at * (THREADS / VECTORS) * pitch);
        else what(b, i / VECTORS, i % VECTORS, i / VECTORS * pitch + i % VECTORS * 16);
    };
#pragma unroll(COUNT <= 4 ? COUNT : 1)
    for (int first = 0; first < COUNT; first += BATCH) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) visit(b, first + b, ask);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) visit(b, first + b, use);
    }
}

template <typename Visit>
__device__ __forceinline__ void each_vector(int pitch, Visit visit) {
    each_vector(pitch, visit, [](int, int, int, u32) {});
}

// Rows that begin anywhere, at once.
__device__ __noinline__ void read_rows(const Place &place, const Column *column, u32 rows, u32 rows_at) {
    const auto read = [&](int, int t, int c, u32 offset) {
        const u64 there = load_place(rows_at, t);
        const u16 *q = (const u16 *)(start_of(place, column, c) + there);
        u32 v[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (somewhere(there)) v[k] = q[2 * k] | (u32)q[2 * k + 1] << 16;
        store_shared_words<4>(rows + offset, v);
    };
    each_vector(ROW_BYTES, read);
}
// Ask for the rows of an item, as they are; zeros where there is none.
__device__ __forceinline__ void copy_rows(const Job &job, const Item &item, const Place &place, const Column *column, Column own, u32 rows, u32 rows_at) {
#if KVF_INVERSE
    const u64 start = place.coded_start;
    const int tokens = item.tokens;
    const auto copy = [&](int, int t, int c, u32 offset) { copy_behind(rows + offset, start + (t * VECTORS + c) * 16, t < tokens); };
    each_vector(ROW_BYTES, copy);
#else
    if (!job.vectors) return read_rows(place, column, rows, rows_at);
    u64 there[BATCH];
    const Starts starts(place, column, own);
    const auto look = [&](int b, int t, int, u32) { there[b] = load_place(rows_at, t); };
    const auto copy = [&](int b, int, int c, u32 offset) {
        const u64 start = starts[c];
        copy_behind(rows + offset, somewhere(there[b]) ? start + there[b] : start, somewhere(there[b]));
    };
    each_vector(ROW_BYTES, look, copy);
#endif
}

// A vector of a row that may begin anywhere.
__device__ __noinline__ void store_anywhere(u64 address, u32 a, u32 b, u32 c, u32 d) {
    store_pair(address, a);
    store_pair(address + 4, b);
    store_pair(address + 8, c);
    store_pair(address + 12, d);
}
// Store what was gathered at `out`.
__device__ __forceinline__ void send_rows(const Job &job, const Item &item, const Place &place, const Column *column, Column own, u32 out, u32 rows_at) {
    u32 v[BATCH][4];
#if KVF_INVERSE
    const bool vectors = job.vectors;
    const Starts starts(place, column, own);
    u64 there[BATCH];
    const auto take = [&](int b, int t, int, u32 offset) {
        load_shared_words<4>(out + offset, v[b]);
        there[b] = load_place(rows_at, t);
    };
    const auto store = [&](int b, int, int c, u32) {
        const u64 to = starts[c] + there[b];
        if (!somewhere(there[b])) return;
        if (vectors) store_global<16>((u8 *)to, v[b]);
        else store_anywhere(to, v[b][0], v[b][1], v[b][2], v[b][3]);
    };
#else
    const u64 start = place.coded_start;
    const int tokens = item.tokens;
    const auto take = [&](int b, int, int, u32 offset) { load_shared_words<4>(out + offset, v[b]); };
    const auto store = [&](int b, int t, int c, u32) {
        if (t < tokens) store_global<16>((u8 *)(start + (t * VECTORS + c) * 16), v[b]);
    };
#endif
    each_vector(OUT_ROW_BYTES, take, store);
}

// Copy an item's values as they are, 2 bytes at a time: between pages and coefficients, either way.
__device__ __noinline__ void copy_block(const Job &job, const Item &item, const Place &place, bool to_pages) {
    for (int l = 0, channels, before = 0; l < job.part_lines; ++l, before += channels) {
        const i64 *line = job.lines + 3 * (item.part * job.part_lines + l);
        channels = (int)(line[2] >> 32);
        for (int i = threadIdx.x; i < item.tokens * channels; i += THREADS) {
            const int t = i / channels, c = i - t * channels, token = item.first_token + t, p = token / job.page_tokens, r = token - p * job.page_tokens;
            const int page = job.pages[(i64)item.chunk * job.chunk_pages + p];
            u16 *there = (u16 *)(line[0] + page * line[1] + r * (i64)(u32)line[2]) + c;
            u16 *here = (u16 *)place.coded_start + t * N + before + c;
            if (!to_pages) *here = page < 0 ? (u16)0 : *there;
            else if (page >= 0) *there = *here;
        }
    }
}

// Forward, once it is known whether all have coefficients: the item's bounds, and the mark (there are zeros) of tokens that have a page if it has one.
__device__ __forceinline__ void mark(const Job &job, const Item &item, int blocks, u32 rows_at) {
    const bool bad = item.bad;
    float *bounds = job.bounds + ((i64)item.chunk * blocks + item.block) * job.coded;
    const int i = (int)threadIdx.x - 2 * TOKENS;  // not those who look things up
    if (i >= 0 && i < job.coded_part_lines) bounds[item.part * job.coded_part_lines + i] = bad ? EXACT_BOUND : job.bound;
    if (i == 0) bounds[item.mark_line] = job.bound;
    if (bad && i >= 0 && i < item.tokens && somewhere(load_place(rows_at, i))) *item.mark(i) = (u16)half_bits(MARK);
}
