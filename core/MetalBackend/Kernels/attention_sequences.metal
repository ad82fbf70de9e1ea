// attention_sequences_metal: where the rows of each sequence stand among its keys, and how many of these there are, from arrays that only the
// device reads. For calls that the host waits for it computes the same.
//
// Contract: lengths are clamped to 0 ... seq_len_kv, and offsets to less than 2^61 in magnitude, so that nobody reads beyond a buffer.

#include <metal_stdlib>
using namespace metal;

struct Parameters {
    long seq_len_q;
    long seq_len_kv;
    int batch_size;
    int has_lengths;
    int num_query_offsets;
    int is_lower_right;
};

struct Sequence {
    long offset;
    long length;
};

constant constexpr long FARTHEST = (1L << 61) - 1;

kernel void attention_sequences_metal(
    constant Parameters& p [[buffer(0)]],
    const device long* lengths [[buffer(1)]],
    const device long* offsets [[buffer(2)]],
    device Sequence* sequences [[buffer(3)]],
    uint batch [[thread_position_in_grid]])
{
    if (int(batch) >= p.batch_size) { return; }
    const long length = p.has_lengths ? clamp(lengths[batch], 0L, p.seq_len_kv) : p.seq_len_kv;
    long offset = 0;
    if (p.num_query_offsets > 0) {
        offset = clamp(offsets[p.num_query_offsets > 1 ? batch : 0], -FARTHEST, FARTHEST);
    } else if (p.is_lower_right) {
        offset = length - p.seq_len_q;
    }
    sequences[batch].offset = offset;
    sequences[batch].length = length;
}
