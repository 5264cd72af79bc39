// A tile's place in its slot or payload. Behind ans_encode.cu or bitpack_encode.cu.
//
// A tile's place is known once all before it in its chunk know their sizes: each warp publishes its size, then looks back (D.
// Merrill and M. Garland, "Single-pass parallel prefix scan with decoupled look-back", NVIDIA NVR-2016-002, section 4.1). Warps take tiles in
// order, so whatever a warp waits for is already being worked on.

// Which bounds a chunk may be tried at (codecs/fitting.py, Ladder); `retries`: how often after the first time.
struct Ladder {
    int levels, searches, first, retries;
};

// What is known of a chunk while it is being coded. `bound`: the largest of its tiles. In retries, `settled`: tiles that are where they
// belong; `payload`: what all take. In searches `around`: 1 + the largest level that does not fit, the number of levels minus the
// smallest that does, tries, a byte each; and what those two took.
struct Chunk {
    u32 bound, settled, payload, around, low_bytes, high_bytes;
};

struct Tickets {
    u32 first, again;      // that were drawn
    u32 listed, open;      // chunks (once for each retry) on the list of those to be tried again; of them, not yet done
    u32 overflowed;        // chunks that the first try was not the last of
};

// Where tiles go. Slots: chunk c to `slots + slot_index[c] * slot_bytes`. One payload: to `slots`, at most `slot_bytes`, with the
// directory beside it. `work`: zeroed; {Tickets, Chunk[chunks], list[chunks * retries], status[tiles], and as many again for retries}.
struct Sink {
    u8 *slots;
    i64 slot_bytes;
    const int *slot_index;
    const u64 *identities;
    u32 *directory;
    u32 *work;
    u8 *scratch;  // SCRATCH_BYTES for each warp
    SlotFacts facts;
    int num_chunks;
    Ladder ladder;
    int status_at;  // of this launch

    __device__ __forceinline__ Tickets &tickets() const { return *(Tickets *)work; }
    __device__ __forceinline__ Chunk &chunk(int number) const { return ((Chunk *)(work + sizeof(Tickets) / 4))[number]; }
    __device__ __forceinline__ u32 *list() const { return (u32 *)&chunk(num_chunks); }
    __device__ __forceinline__ u32 *status(int tile) const { return list() + num_chunks * ladder.retries + status_at + tile; }
    __device__ __forceinline__ u8 *slot(int chunk) const { return slots + (SLOTS ? slot_index[chunk] * slot_bytes : 0); }
    __device__ __forceinline__ i64 payload_at(int tiles) const { return SLOTS ? SLOT_HEADER + 8 * (i64)tiles : 0; }
};

__shared__ Sink the_sink;

constexpr u32 SIZE_KNOWN = 1, PLACE_KNOWN = 2;  // status: words << 2 | one of these

// A tile's bound goes before its size: whoever has seen the sizes of a chunk has seen the bounds.
__device__ __forceinline__ void publish(const Sink &sink, const Tile &tile, float bound, int size, int lane) {
    if (lane) return;
    const u32 status = (u32)size / 4 << 2 | (tile.local ? SIZE_KNOWN : PLACE_KNOWN);
    if (BOUNDED && !the_bounds.foreseen()) {
        atomicMax(&sink.chunk(tile.chunk).bound, __float_as_uint(bound));
        poke_behind(sink.status(tile.index), status);
    } else {
        poke(sink.status(tile.index), status);
    }
}

// Words of the chunk before a tile whose size is published.
__device__ __forceinline__ u32 look_back(const Sink &sink, int tile, int local, u32 words, int lane) {
    u32 before = 0;
    for (int at = local - 1; at >= 0; at -= 32) {
        const int mine = at - lane;
        u32 status;
        do status = mine >= 0 ? peek(sink.status(tile - local + mine)) : PLACE_KNOWN;
        while (__any_sync(FULL, (status & 3) == 0));
        const u32 placed = __ballot_sync(FULL, (status & 3) == PLACE_KNOWN);
        const int last = placed ? __ffs(placed) - 1 : 31;
        before += (u32)warp_sum(lane <= last ? (int)(status >> 2) : 0);
        if (placed) break;
    }
    if (local && lane == 0) poke(sink.status(tile), (before + words) << 2 | PLACE_KNOWN);
    return before;
}

