// From a warp's scratch to a tile's place; and what a chunk's last tile has to do. Behind write.cu.

// The place of a tile of `size` bytes; null if the chunk has no room for it.
__device__ __forceinline__ u8 *place(const Source &s, const Sink &sink, const Tile &tile, int size, i64 &end, int lane) {
    const i64 before = 4 * (i64)look_back(sink, tile.index, tile.local, (u32)size / 4, lane);
    end = before + size;
    const i64 at = sink.payload_at(s.tiles_per_chunk);
    return at + end <= sink.slot_bytes ? sink.slot(tile.chunk) + at + before : nullptr;
}

__device__ __forceinline__ void write_directory(const Source &s, const Sink &sink, const Tile &tile, const Writer &writer, int size, i64 end, int lane) {
    const u64 sum = warp_sum64(writer.sum);
    u32 *directory = SLOTS ? (u32 *)(sink.slot(tile.chunk) + SLOT_HEADER) : sink.directory;
    const u32 checksum = SLOTS ? hash_end(sum + tile_seed(sink.identities + 2 * tile.chunk, tile.local, size)) : 0;
    if (lane < 2) directory[2 * tile.local + lane] = lane ? checksum : (u32)end;
}

// A chunk that was tried at `level` and takes `payload` bytes: its header, or it is tried again.
__device__ __noinline__ void finish_chunk(int chunk, u32 payload, int level, int lane) {
    const Sink &sink = the_sink;
    const int tiles = the_source.tiles_per_chunk;
    const i64 room = sink.slot_bytes - sink.payload_at(tiles);
    const bool fits = (i64)payload <= room;
    Chunk &known = sink.chunk(chunk);
    int next = -1;
    if (sink.ladder.retries && lane == 0) next = next_level(known, level, payload, room);
    next = __shfl_sync(FULL, next, 0);
    if (next >= 0) {
        // Whoever works on the chunk next finds it as if it were new. (A first try's tiles may still look at their own words.)
        if (RETRY)
            for (int i = lane; i < tiles; i += 32) poke(sink.status(chunk * tiles + i), 0);
        if (lane == 0) {
            poke(&known.bound, 0);
            poke(&known.settled, 0);
        }
        __threadfence();
        __syncwarp();
        if (lane == 0) list_again(chunk, next);
        return;
    }
    level &= FINAL - 1;
    const u64 *identity = sink.identities + 2 * chunk;
    const bool foreseen = BOUNDED && the_bounds.foreseen();
    const float bound = foreseen ? loosened(largest_bound(the_bounds, the_source.num_lines, lane), looser_at(level)) : 0.0f;
    u32 v = 0;
    if (lane == 0) v = SLOT_MAGIC;
    else if (lane == 1) v = SLOT_VERSION | SLOT_HEADER << 16;
    else if (lane == 2) v = sink.facts.kind;
    else if (lane == 3) v = (fits ? USABLE : REJECTED) | (sink.ladder.searches ? 0 : level) << 8 | sink.facts.relative_to << 16;
    else if (lane == 4) v = tiles;
    else if (lane == 5) v = payload;
    else if (lane == 6) v = foreseen ? __float_as_uint(bound) : peek(&known.bound);
    else if (lane == 7) v = sink.facts.layout_digest;
    else if (lane < 12) v = (u32)(identity[(lane - 8) / 2] >> (lane & 1 ? 32 : 0));
    else if (lane == 12) v = sink.facts.tokens;
    const u64 sum = warp_sum64(lane < 15 ? hash_term(v, lane) : 0);
    if (lane == 15) v = hash_end(sum);
    if (lane < 16) ((u32 *)sink.slot(chunk))[lane] = v;
    if (RETRY && lane == 0) atomicSub(&sink.tickets().open, 1u);
}

// A tile that is where it belongs, and ends at `end`. In a first try a chunk is finished by its last tile, the others' bytes being on
// their way. Who tries it again must not overtake those of the last try: then it is finished by whichever tile is the last to settle.
__device__ __forceinline__ void settled(int chunk, int local, i64 end, int level, int lane) {
    if constexpr (!SLOTS) return;
    const Sink &sink = the_sink;
    const int tiles = the_source.tiles_per_chunk;
    const bool last = local + 1 == tiles;
    u32 payload = (u32)end;
    if constexpr (RETRY) {
        Chunk &known = sink.chunk(chunk);
        if (last && lane == 0) poke(&known.payload, payload);
        __threadfence();
        __syncwarp();
        u32 before = 0;
        if (lane == 0) before = atomicAdd(&known.settled, 1u);
        if (__shfl_sync(FULL, before, 0) + 1 != (u32)tiles) return;
        __threadfence();
        payload = peek(&known.payload);
    } else if (!last) {
        return;
    }
    finish_chunk(chunk, payload, level, lane);
}

__device__ __forceinline__ u64 planes_of(const Tile &tile, u8 *out, int planes_at, int lane) {
#define KVF_PLANES(CPL) \
    case CPL:           \
        return write_planes<CPL>(tile.index, out, planes_at, lane)
    switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_PLANES) }
    return 0;
}

// A warp's tile on its way: coded, its size published, its bytes (but for the planes, which are as they are in the source) in the warp's
// scratch. It goes to its place one tile later, when those before it have long said how long they are: a warp hardly ever waits. In shared
// memory: registers are dear, and the first-level cache, which holds what there are too few of, is small beside that.
struct Pending {
    int tile, size, planes_at, gap;  // tile -1: none; gap: bytes of the planes; -1: a raw tile
    int level;                       // that it was tried at
    u64 sum[32];                     // of each lane

    // By all lanes; seen by all behind the next __syncwarp.
    __device__ __forceinline__ void set(const Pending &fields, u64 my_sum, int lane) {
        if (lane == 0) {
            tile = fields.tile;
            size = fields.size;
            planes_at = fields.planes_at;
            gap = fields.gap;
            if (RETRY) level = fields.level;
        }
        sum[lane] = my_sum;
    }
    __device__ __forceinline__ void clear(int lane) {
        if (lane == 0) tile = -1;
        __syncwarp();
    }
};

__shared__ Pending the_pending[KVF_THREADS / 32];
__shared__ int the_layouts[KVF_THREADS / 32][LAYOUT_WORDS];  // of the tiles that warps are coding

constexpr int SCRATCH_BYTES = 8192;

__device__ __forceinline__ int level_of_round() { return RETRY ? the_round.level : the_sink.ladder.first; }

// The warp's scratch. Made when it is needed, like much else here.
__device__ __forceinline__ u8 *own_scratch() {
    return the_sink.scratch + ((i64)blockIdx.x * (KVF_THREADS / 32) + (threadIdx.x >> 5)) * SCRATCH_BYTES;
}

// To its place, if there is one.
__device__ __noinline__ void settle(int lane) {
    const Pending &pending = the_pending[threadIdx.x >> 5];
    const int index = pending.tile;
    __syncwarp();  // all lanes have seen it before one of them sets the next
    if (index < 0) return;
    const Source &s = the_source;
    const Sink &sink = the_sink;
    const Tile tile(s, index);
    i64 end;
    Writer writer = {place(s, sink, tile, pending.size, end, lane), pending.sum[lane]};
    if (writer.out) {
        if (pending.gap < 0) {
            writer.sum = write_raw(tile.index, writer.out, lane);
        } else {
            // All loads of a batch before its stores: one latency for 2 KiB. A lane's words lie apart: a place is a multiple of 4, and stores
            // of more would not fill the sectors of memory that they touch.
            const u32 *words = (const u32 *)own_scratch();
            u32 *out = (u32 *)writer.out;
            const int before = pending.planes_at / 4, gap = pending.gap / 4, count = pending.size / 4 - gap;
            for (int first = lane; first < count; first += 32 * 16) {
                u32 batch[16];
#pragma unroll
                for (int j = 0; j < 16; ++j)
                    if (first + 32 * j < count) batch[j] = words[first + 32 * j];
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const int i = first + 32 * j;
                    if (i < count) out[PLANES && i >= before ? i + gap : i] = batch[j];
                }
            }
            if constexpr (PLANES > 0) writer.sum += planes_of(tile, writer.out, pending.planes_at, lane);
        }
        write_directory(s, sink, tile, writer, pending.size, end, lane);
    }
    settled(tile.chunk, tile.local, end, RETRY ? pending.level : sink.ladder.first, lane);
    __syncwarp();
}

