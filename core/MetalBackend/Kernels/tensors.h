// How tensors lie in memory.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// How elements lie in memory: the numbers of mfa.h.
constant constexpr int FP32 = 0;
constant constexpr int FP16 = 1;
constant constexpr int BF16 = 2;
constant constexpr int INT4 = 4;
constant constexpr int INT8 = 8;
constant constexpr int BOOL = 16;

// A tensor [batch, head, token, channel]; strides in elements (codes of INT4).
struct TensorView {
    long strides[4];
    long scale_strides[4];
    long mean_strides[2];
    int scale_tokens;    // that share a scale
    int scale_channels;
    int has_zero_points;
    int has_means;
};

// Where the rows of a sequence stand among its keys, and how many of these there are.
struct Sequence {
    long offset;
    long length;
};

// An element as it lies in memory: a float, or a code.
METAL_FUNC float load_plain(const device uchar* data, long index, int type)
{
    if (type == FP16) { return float(((const device half*)data)[index]); }
    if (type == BF16) { return float(((const device bfloat*)data)[index]); }
    return ((const device float*)data)[index];
}

METAL_FUNC int load_code(const device uchar* data, long row, long stride, int channel, int type)
{
    if (type == INT8) { return ((const device char*)data)[row + channel * stride]; }
    const uchar pair = data[(row + (channel - (channel & 1)) * stride) / 2];
    const int nibble = (channel & 1) ? pair >> 4 : pair & 15;
    return nibble >= 8 ? nibble - 16 : nibble;
}

// Where the first channel of a token lies.
METAL_FUNC long row_of(constant TensorView& view, int batch, int head, int token)
{
    return batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
}

// Where the scale of an element lies.
METAL_FUNC long scale_of(constant TensorView& view, int batch, int head, int token, int channel)
{
    return batch * view.scale_strides[0] + head * view.scale_strides[1] + (token / view.scale_tokens) * view.scale_strides[2]
        + (channel / view.scale_channels) * view.scale_strides[3];
}

METAL_FUNC void store(device uchar* data, long index, float value, int type)
{
    if (type == FP32) {
        ((device float*)data)[index] = value;
    } else if (type == FP16) {
        ((device half*)data)[index] = half(value);
    } else {
        ((device bfloat*)data)[index] = bfloat(value);
    }
}
