// MFABridge: exact and quantised Flash Attention on buffers and command buffers of Metal, for Objective-C and Swift.
//
//     MFABridge* bridge = [[MFABridge alloc] initWithDevice:MTLCreateSystemDefaultDevice()];
//     NSTimeInterval seconds = [bridge runAttentionWithQ:q K:k V:v O:output seqLength:512 headDim:64 scale:0.125f causal:YES];
//
// docs/objc.md is a guide; docs/numerics.md defines what is computed. Arrays stay in the caller's buffers and are never copied. What is
// refused, such as a buffer that is nil, too short or another device's, has written nothing. The bridge compiles with and without ARC.

#ifndef MFABRIDGE_H
#define MFABRIDGE_H

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

NS_ASSUME_NONNULL_BEGIN

/// The domain of the errors of this library. Their descriptions name the argument, what was expected and what came.
FOUNDATION_EXPORT NSErrorDomain const MFAErrorDomain;

/// The codes of `MFAErrorDomain`. After any but `MFAErrorExecutionFailed` no result has been written.
typedef NS_ERROR_ENUM(MFAErrorDomain, MFAError){
    /// A context is none or was destroyed; a bridge's own never is.
    MFAErrorInvalidContext = 1,
    /// Memory for workspace could not be had.
    MFAErrorAllocationFailed = 2,
    /// A size is illegal, sizes disagree, or a buffer is too short.
    MFAErrorInvalidDimensions = 3,
    /// A kernel failed. Results are undefined; the bridge stays usable.
    MFAErrorExecutionFailed = 4,
    /// An argument is nil, not finite, out of range or another device's, or a result overlaps something.
    MFAErrorInvalidArgument = 5,
    /// Legal, but not served by this device or method; the description names the feature.
    MFAErrorUnsupported = 6,
    /// There is no such device here, or this is a child process after `fork()`.
    MFAErrorDeviceUnavailable = 7,
};

/// How the elements of a tensor lie in memory.
typedef NS_ENUM(NSInteger, MFAPrecision) {
    MFAPrecisionFP32 = 0,
    MFAPrecisionFP16 = 1,
    MFAPrecisionBF16 = 2,
    /// For checks of gradients; computed on the CPU, and not to be encoded.
    MFAPrecisionFP64 = 3,
    /// Two codes a byte along the channels, the even channel in the low nibble; a row is half as many bytes, rounded up.
    MFAPrecisionINT4 = 4,
    MFAPrecisionINT8 = 8,
    /// One byte, for masks: not 0 is "attend".
    MFAPrecisionBool = 16,
};

/// Which elements share a scale, and so the shape of arrays of scales and zero points, whatever the layout of the codes is.
typedef NS_ENUM(NSInteger, MFAGranularity) {
    /// One scale.
    MFAGranularityTensor = 0,
    /// `[batch, heads]`.
    MFAGranularityHead = 1,
    /// `[batch, heads, tokens]`.
    MFAGranularityToken = 2,
    /// `[batch, heads, tokens / blockSize, rounded up]`.
    MFAGranularityBlock = 3,
    /// `[batch, heads, channels]`.
    MFAGranularityChannel = 4,
    /// `[batch, heads, tokens, channels / groupSize, rounded up]`.
    MFAGranularityGroup = 5,
};

/// Where the first query stands among the keys.
typedef NS_ENUM(NSInteger, MFAAlignment) {
    /// At the first key.
    MFAAlignmentUpperLeft = 0,
    /// So that the last query stands at the last key.
    MFAAlignmentLowerRight = 1,
};

/// The order of a contiguous tensor's axes in memory.
typedef NS_ENUM(NSInteger, MFALayout) {
    /// `[batch, heads, tokens, channels]`.
    MFALayoutHeadsFirst = 0,
    /// `[batch, tokens, heads, channels]`.
    MFALayoutTokensFirst = 1,
};

/// Four numbers, one for each axis of a tensor, in this order whatever the layout in memory is: a shape in elements, or strides. A mask has
/// query rows as tokens and key columns as channels.
typedef struct MFAShape {
    int64_t batch;
    int64_t heads;
    int64_t tokens;
    int64_t channels;
} MFAShape;

static inline MFAShape MFAShapeMake(int64_t batch, int64_t heads, int64_t tokens, int64_t channels) {
    MFAShape shape = {batch, heads, tokens, channels};
    return shape;
}

/// An array of plain numbers in a buffer: where it begins. How long it is follows from what it is for.
@interface MFABufferView : NSObject <NSCopying> {
  @private
    id<MTLBuffer> _buffer;
    NSUInteger _offset;
}

@property (readonly) id<MTLBuffer> buffer;
/// In bytes; a multiple of the size of what lies there.
@property (readonly) NSUInteger offset;

- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset NS_DESIGNATED_INITIALIZER;
/// A view of the whole buffer.
+ (instancetype)viewWithBuffer:(id<MTLBuffer>)buffer;
- (instancetype)init NS_UNAVAILABLE;

@end

/// How the codes of an INT8 or INT4 tensor stand for real numbers: scale * (code - zero point) [+ channel mean] [then the rotation undone].
@interface MFAQuantization : NSObject <NSCopying> {
  @private
    MFAGranularity _granularity;
    NSUInteger _blockSize;
    NSUInteger _groupSize;
    BOOL _rotated;
    MFABufferView* _scales;
    MFABufferView* _zeroPoints;
    MFABufferView* _channelMeans;
}

@property (readonly) MFAGranularity granularity;
/// Tokens that share a scale, for `MFAGranularityBlock`.
@property NSUInteger blockSize;
/// Channels that share a scale, for `MFAGranularityGroup`.
@property NSUInteger groupSize;
/// Whether the codes are those of the Walsh-Hadamard transform of each row. Queries and keys are rotated alike, values never.
@property (getter=isRotated) BOOL rotated;
/// `float`, finite and positive; see `MFAGranularity` for the shape.
@property (readonly) MFABufferView* scales;
/// `int32_t`, in the shape of the scales; nil: all are 0.
@property (nullable, copy) MFABufferView* zeroPoints;
/// `float`, `[batch, heads, channels]`, added to every token of a head; for keys only. nil: none.
@property (nullable, copy) MFABufferView* channelMeans;

- (instancetype)initWithGranularity:(MFAGranularity)granularity scales:(MFABufferView*)scales NS_DESIGNATED_INITIALIZER;
- (instancetype)init NS_UNAVAILABLE;

/// How many scales a tensor of this shape has; 0 for an illegal shape, block size or group size.
- (NSUInteger)scaleCountForShape:(MFAShape)shape;

@end

/// A view of a four-dimensional tensor in a buffer.
@interface MFATensor : NSObject <NSCopying> {
  @private
    id<MTLBuffer> _buffer;
    NSUInteger _offset;
    MFAPrecision _precision;
    MFAShape _shape;
    MFAShape _strides;
    MFAQuantization* _quantization;
}

@property (readonly) id<MTLBuffer> buffer;
/// Of element (0, 0, 0, 0), in bytes.
@property (readonly) NSUInteger offset;
@property (readonly) MFAPrecision precision;
@property (readonly) MFAShape shape;
/// In elements, for INT4 in codes. Those of inputs may be 0, which repeats elements, or negative.
@property (readonly) MFAShape strides;
/// For INT8 and INT4; nil: one scale of 1. Ignored for other precisions.
@property (nullable, copy) MFAQuantization* quantization;

/// Any strides. Those of INT4 are even but for the channels'.
- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer
                        offset:(NSUInteger)offset
                     precision:(MFAPrecision)precision
                         shape:(MFAShape)shape
                       strides:(MFAShape)strides NS_DESIGNATED_INITIALIZER;
/// A contiguous tensor.
- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer
                        offset:(NSUInteger)offset
                     precision:(MFAPrecision)precision
                         shape:(MFAShape)shape
                        layout:(MFALayout)layout;
/// A contiguous tensor at the begin of a buffer, `[batch, heads, tokens, channels]`.
- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer precision:(MFAPrecision)precision shape:(MFAShape)shape;
- (instancetype)init NS_UNAVAILABLE;

/// The bytes that a contiguous tensor takes; 0 for an unknown precision or sizes that cannot be.
+ (NSUInteger)lengthForPrecision:(MFAPrecision)precision shape:(MFAShape)shape NS_SWIFT_NAME(length(precision:shape:));

@end

/// How to quantise a float operand on its way into attention.
@interface MFAQuantizationScheme : NSObject <NSCopying> {
  @private
    MFAPrecision _precision;
    MFAGranularity _granularity;
    NSUInteger _blockSize;
    NSUInteger _groupSize;
    BOOL _asymmetric;
    BOOL _smooth;
    BOOL _rotate;
}

/// `MFAPrecisionINT8` or `MFAPrecisionINT4`.
@property (readonly) MFAPrecision precision;
@property (readonly) MFAGranularity granularity;
/// For `MFAGranularityBlock`.
@property NSUInteger blockSize;
/// For `MFAGranularityGroup`.
@property NSUInteger groupSize;
/// Whether there are zero points.
@property (getter=isAsymmetric) BOOL asymmetric;
/// Whether each channel's mean is subtracted first; for keys only.
@property BOOL smooth;
/// Whether rows go through the Walsh-Hadamard transform first; for queries and keys alike.
@property BOOL rotate;

- (instancetype)initWithPrecision:(MFAPrecision)precision granularity:(MFAGranularity)granularity NS_DESIGNATED_INITIALIZER;
- (instancetype)init NS_UNAVAILABLE;

@end

/// What attention computes beside softmax(Q K^T) V: all options, each off at first. docs/numerics.md defines them.
///
/// The arrays of sinks, slopes and statistics are `float`; `double` if the query, key or value is FP64.
@interface MFAAttentionOptions : NSObject <NSCopying> {
  @private
    NSNumber* _softmaxScale;
    double _softcap;
    BOOL _causal;
    MFAAlignment _alignment;
    MFABufferView* _queryOffsets;
    NSUInteger _queryOffsetCount;
    int64_t _windowLeft;
    int64_t _windowRight;
    MFABufferView* _kvLengths;
    MFATensor* _mask;
    MFABufferView* _alibiSlopes;
    MFABufferView* _sinks;
    double _dropoutProbability;
    uint64_t _seed;
    uint32_t _dropoutOffset;
    MFAQuantizationScheme* _queryScheme;
    MFAQuantizationScheme* _keyScheme;
    MFAQuantizationScheme* _valueScheme;
}

/// Any finite number; nil: 1 / sqrt(channels of the query).
@property (nullable, copy) NSNumber* softmaxScale;
/// Scores become softcap * tanh(score / softcap); 0: off.
@property double softcap;
/// Whether a query attends to no key after its own position.
@property (getter=isCausal) BOOL causal;
@property MFAAlignment alignment;
/// The first query's position among the keys, in place of `alignment`: `int64_t`, one or one a sequence. nil: none.
@property (nullable, copy) MFABufferView* queryOffsets;
/// 1, or the batch size; 0 without offsets.
@property NSUInteger queryOffsetCount;
/// How far before its own position a query attends; -1: without limit.
@property int64_t windowLeft;
/// How far after its own position a query attends; -1: without limit.
@property int64_t windowRight;
/// `int64_t`, one a sequence: keys and values beyond are never read. nil: all are used.
@property (nullable, copy) MFABufferView* kvLengths;
/// Bool (not 0: attend), or floats that are added to scores. Axes of size 1 are broadcast.
@property (nullable, copy) MFATensor* mask;
/// One a query head: slope times distance is subtracted from scores.
@property (nullable, copy) MFABufferView* alibiSlopes;
/// One a query head: the score of a key without a value.
@property (nullable, copy) MFABufferView* sinks;
@property double dropoutProbability;
@property uint64_t seed;
@property uint32_t dropoutOffset;
/// Quantise the query on its way in; nil: take it as it is.
@property (nullable, copy) MFAQuantizationScheme* queryScheme;
@property (nullable, copy) MFAQuantizationScheme* keyScheme;
@property (nullable, copy) MFAQuantizationScheme* valueScheme;

@end

/// The gradients of a backward call: those that are not nil are computed. They may have any float type and strides.
@interface MFAAttentionGradients : NSObject <NSCopying> {
  @private
    MFATensor* _gradOutput;
    MFABufferView* _gradLogsumexp;
    MFABufferView* _dValues;
    BOOL _dValuesGiven;
    MFATensor* _gradQuery;
    MFATensor* _gradKey;
    MFATensor* _gradValue;
    MFATensor* _gradMask;
    MFABufferView* _gradSinks;
    MFABufferView* _gradAlibiSlopes;
}

/// Of the output: read, a float type.
@property (readonly) MFATensor* gradOutput;
/// Of the logsumexp: read, `[batch, heads, tokens]`; nil: 0.
@property (nullable, copy) MFABufferView* gradLogsumexp;
/// The sum of gradOutput * output in each row, `[batch, heads, tokens]`: written, or read if `dValuesGiven`.
@property (nullable, copy) MFABufferView* dValues;
@property BOOL dValuesGiven;
@property (nullable, copy) MFATensor* gradQuery;
@property (nullable, copy) MFATensor* gradKey;
@property (nullable, copy) MFATensor* gradValue;
/// Of an additive mask, in the mask's own shape.
@property (nullable, copy) MFATensor* gradMask;
@property (nullable, copy) MFABufferView* gradSinks;
@property (nullable, copy) MFABufferView* gradAlibiSlopes;

- (instancetype)initWithGradOutput:(MFATensor*)gradOutput NS_DESIGNATED_INITIALIZER;
- (instancetype)init NS_UNAVAILABLE;

@end

/// Attention on a device of Metal. May be used by several threads; one call runs at a time.
@interface MFABridge : NSObject {
  @private
    struct mfa_context* _context;
    id<MTLDevice> _device;
    MFAPrecision _precision;
    NSTimeInterval _executionTime;
    NSError* _lastError;
}

@property (readonly) id<MTLDevice> device;
/// Why the last call of any thread failed; nil if it did not.
@property (nullable, readonly, strong) NSError* lastError;
/// How long the last successful call that computed took, in seconds: time of the GPU, where that was at work.
@property (readonly) NSTimeInterval executionTime;

/// A bridge to the system's default device; nil, with `error` set, if there is none here, or `device` is another or nil.
- (nullable instancetype)initWithDevice:(id<MTLDevice>)device error:(NSError* _Nullable* _Nullable)error NS_DESIGNATED_INITIALIZER;
/// The same without the reason.
- (nullable instancetype)initWithDevice:(id<MTLDevice>)device NS_SWIFT_UNAVAILABLE("Use init(device:), which throws.");
- (instancetype)init NS_UNAVAILABLE;

#pragma mark One head

/// The precision of the buffers in `runAttentionWithQ:...`; at first FP32. INT8 and INT4 have a scale of 1, and their output is FP32.
@property MFAPrecision precision;

/// Attention of one sequence and one head: all four buffers hold `[seqLength, headDim]`.
///
/// - Parameter scale: what products of queries and keys are multiplied by, such as 1 / sqrt(headDim).
/// - Parameter causal: whether a query attends to no key after its own position.
/// - Returns: the execution time in seconds, as `executionTime`; a negative number if it failed: `lastError` says why.
- (NSTimeInterval)runAttentionWithQ:(id<MTLBuffer>)q
                                  K:(id<MTLBuffer>)k
                                  V:(id<MTLBuffer>)v
                                  O:(id<MTLBuffer>)o
                          seqLength:(NSUInteger)seqLength
                            headDim:(NSUInteger)headDim
                              scale:(float)scale
                             causal:(BOOL)causal NS_SWIFT_NAME(runAttention(q:k:v:o:seqLength:headDim:scale:causal:));

#pragma mark Any problem

/// Computes `output`, and `logsumexp` if it is given; returns when they are written.
///
/// The key and value may have fewer heads than the query, if that has a multiple of theirs. The output is of any float type; by convention it is
/// the query's for float operands and FP32 for quantised ones.
///
/// - Parameter logsumexp: `[batch, heads, tokens]`, natural logarithms; wanted for backward.
/// - Parameter options: nil: none.
- (BOOL)runAttentionWithQuery:(MFATensor*)query
                          key:(MFATensor*)key
                        value:(MFATensor*)value
                       output:(MFATensor*)output
                    logsumexp:(nullable MFABufferView*)logsumexp
                      options:(nullable MFAAttentionOptions*)options
                        error:(NSError* _Nullable* _Nullable)error NS_SWIFT_NAME(runAttention(query:key:value:output:logsumexp:options:));

/// Computes the gradients that are asked for, of the problem that `runAttentionWithQuery:...` got, with the logsumexp that it wrote.
///
/// Those of quantised operands are with respect to the real values that their codes stand for.
///
/// - Parameter output: what forward wrote; nil: it is not needed, and takes longer.
- (BOOL)runBackwardWithQuery:(MFATensor*)query
                         key:(MFATensor*)key
                       value:(MFATensor*)value
                      output:(nullable MFATensor*)output
                   logsumexp:(MFABufferView*)logsumexp
                   gradients:(MFAAttentionGradients*)gradients
                     options:(nullable MFAAttentionOptions*)options
                       error:(NSError* _Nullable* _Nullable)error
    NS_SWIFT_NAME(runBackward(query:key:value:output:logsumexp:gradients:options:));

#pragma mark Encoding

/// Records the same work as `runAttentionWithQuery:...` into a command buffer of the device, which is neither committed nor waited for.
///
/// Operands are read when the command buffer runs. Only the device sees them then: lengths out of range are clamped, and scales that are not
/// finite and positive, or scores beyond the range of `float`, make the rows that they reach NaN. Temporary memory is kept until the command
/// buffer has completed; with unretained references the caller keeps the buffers.
- (BOOL)encodeAttentionWithQuery:(MFATensor*)query
                             key:(MFATensor*)key
                           value:(MFATensor*)value
                          output:(MFATensor*)output
                       logsumexp:(nullable MFABufferView*)logsumexp
                         options:(nullable MFAAttentionOptions*)options
               intoCommandBuffer:(id<MTLCommandBuffer>)commandBuffer
                           error:(NSError* _Nullable* _Nullable)error
    NS_SWIFT_NAME(encodeAttention(query:key:value:output:logsumexp:options:into:));

/// Records the same work as `runBackwardWithQuery:...`, as above.
- (BOOL)encodeBackwardWithQuery:(MFATensor*)query
                            key:(MFATensor*)key
                          value:(MFATensor*)value
                         output:(nullable MFATensor*)output
                      logsumexp:(MFABufferView*)logsumexp
                      gradients:(MFAAttentionGradients*)gradients
                        options:(nullable MFAAttentionOptions*)options
              intoCommandBuffer:(id<MTLCommandBuffer>)commandBuffer
                          error:(NSError* _Nullable* _Nullable)error
    NS_SWIFT_NAME(encodeBackward(query:key:value:output:logsumexp:gradients:options:into:));

#pragma mark Quantising and merging

/// Quantises `input`, of a float type, into the codes, scales, zero points (if there is an array for them: asymmetric) and channel means (if
/// there is one: smoothing) of `output`.
- (BOOL)quantizeTensor:(MFATensor*)input
                  into:(MFATensor*)output
                 error:(NSError* _Nullable* _Nullable)error NS_SWIFT_NAME(quantize(_:into:));

/// Writes the real values that the codes of `input` stand for.
- (BOOL)dequantizeTensor:(MFATensor*)input
                    into:(MFATensor*)output
                   error:(NSError* _Nullable* _Nullable)error NS_SWIFT_NAME(dequantize(_:into:));

/// Merges two results of the same queries over disjoint sets of keys into that over all of them.
- (BOOL)mergeOutput:(MFATensor*)first
          logsumexp:(MFABufferView*)firstLogsumexp
         withOutput:(MFATensor*)second
          logsumexp:(MFABufferView*)secondLogsumexp
         intoOutput:(MFATensor*)output
          logsumexp:(MFABufferView*)logsumexp
              error:(NSError* _Nullable* _Nullable)error NS_SWIFT_NAME(merge(_:_:with:_:into:_:));

@end

NS_ASSUME_NONNULL_END

#endif // MFABRIDGE_H
