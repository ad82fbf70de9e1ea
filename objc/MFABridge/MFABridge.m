#import "MFABridge.h"

#include <math.h>
#include <time.h>

#include "mfa.h"

// With ARC and without.
#if __has_feature(objc_arc)
#define MFA_RETAIN(object) (object)
#define MFA_AUTORELEASE(object) (object)
#define MFA_RELEASE(object) ((void)0)
#define MFA_DEALLOC_SUPER() ((void)0)
#else
#define MFA_RETAIN(object) [(object) retain]
#define MFA_AUTORELEASE(object) [(object) autorelease]
#define MFA_RELEASE(object) [(object) release]
#define MFA_DEALLOC_SUPER() [super dealloc]
#endif

// The codes of the interface are those of mfa.h, so that none is translated.
_Static_assert(MFAErrorInvalidContext == MFA_ERROR_INVALID_CONTEXT && MFAErrorAllocationFailed == MFA_ERROR_ALLOCATION_FAILED, "status");
_Static_assert(MFAErrorInvalidDimensions == MFA_ERROR_INVALID_DIMENSIONS && MFAErrorExecutionFailed == MFA_ERROR_EXECUTION_FAILED,
               "status");
_Static_assert(MFAErrorInvalidArgument == MFA_ERROR_INVALID_ARGUMENT && MFAErrorUnsupported == MFA_ERROR_UNSUPPORTED, "status");
_Static_assert(MFAErrorDeviceUnavailable == MFA_ERROR_DEVICE_UNAVAILABLE, "status");
_Static_assert(MFAPrecisionFP32 == MFA_PRECISION_FP32 && MFAPrecisionFP16 == MFA_PRECISION_FP16, "precision");
_Static_assert(MFAPrecisionBF16 == MFA_PRECISION_BF16 && MFAPrecisionFP64 == MFA_PRECISION_FP64, "precision");
_Static_assert(MFAPrecisionINT4 == MFA_PRECISION_INT4 && MFAPrecisionINT8 == MFA_PRECISION_INT8, "precision");
_Static_assert(MFAPrecisionBool == MFA_PRECISION_BOOL, "precision");
_Static_assert(MFAGranularityTensor == MFA_GRANULARITY_TENSOR && MFAGranularityHead == MFA_GRANULARITY_HEAD, "granularity");
_Static_assert(MFAGranularityToken == MFA_GRANULARITY_TOKEN && MFAGranularityBlock == MFA_GRANULARITY_BLOCK, "granularity");
_Static_assert(MFAGranularityChannel == MFA_GRANULARITY_CHANNEL && MFAGranularityGroup == MFA_GRANULARITY_GROUP, "granularity");
_Static_assert(MFAAlignmentUpperLeft == MFA_ALIGNMENT_UPPER_LEFT && MFAAlignmentLowerRight == MFA_ALIGNMENT_LOWER_RIGHT, "alignment");

NSErrorDomain const MFAErrorDomain = @"MFAErrorDomain";

// What the framework Metal stands for here.
#ifdef __APPLE__
static const int32_t device_code = MFA_DEVICE_METAL;
#else
static const int32_t device_code = MFA_DEVICE_SOFTMETAL;
#endif

static NSError* make_error(int32_t status, NSString* description) {
    return [NSError errorWithDomain:MFAErrorDomain code:status userInfo:@{NSLocalizedDescriptionKey : description}];
}

// What libmfa says of its last error, without the name of the function in C.
static NSString* last_error(mfa_context_t* context) {
    NSString* words = [NSString stringWithUTF8String:mfa_last_error(context) ?: ""];
    const NSRange colon = [words rangeOfString:@": "];
    return [words hasPrefix:@"mfa_"] && colon.length > 0 ? [words substringFromIndex:NSMaxRange(colon)] : words;
}

// Sizes that cannot be make a product 0, for which no memory is looked at: libmfa then refuses them in its own words.
static uint64_t product(uint64_t a, int64_t b) {
    uint64_t result;
    return b < 0 || __builtin_mul_overflow(a, (uint64_t)b, &result) ? 0 : result;
}

static int64_t quotient_rounded_up(int64_t elements, NSUInteger size) {
    if (size == 0 || size > INT64_MAX || elements < 0) return 0;
    return elements / (int64_t)size + (elements % (int64_t)size != 0);
}

static uint64_t element_count(MFAShape shape) {
    return product(product(product(product(1, shape.batch), shape.heads), shape.tokens), shape.channels);
}

static uint64_t row_count(MFAShape shape) {
    return product(product(product(1, shape.batch), shape.heads), shape.tokens);
}

// Bytes of an element; of two codes for INT4; 0 if there is no such precision.
static uint64_t unit_size(MFAPrecision precision) {
    switch (precision) {
    case MFAPrecisionFP64: return 8;
    case MFAPrecisionFP32: return 4;
    case MFAPrecisionFP16: return 2;
    case MFAPrecisionBF16: return 2;
    case MFAPrecisionINT8: return 1;
    case MFAPrecisionINT4: return 1;
    case MFAPrecisionBool: return 1;
    }
    return 0;
}

// Channels of a row, a pad code of INT4 included.
static int64_t padded(int64_t channels, MFAPrecision precision) {
    return precision == MFAPrecisionINT4 ? 2 * quotient_rounded_up(channels, 2) : channels;
}

static NSTimeInterval now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

@implementation MFABufferView

@synthesize buffer = _buffer;
@synthesize offset = _offset;

- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset {
    if ((self = [super init])) {
        _buffer = MFA_RETAIN(buffer);
        _offset = offset;
    }
    return self;
}

+ (instancetype)viewWithBuffer:(id<MTLBuffer>)buffer {
    return MFA_AUTORELEASE([[self alloc] initWithBuffer:buffer offset:0]);
}

- (id)copyWithZone:(NSZone*)zone {
    return MFA_RETAIN(self);
}

- (void)dealloc {
    MFA_RELEASE(_buffer);
    MFA_DEALLOC_SUPER();
}

@end

@implementation MFAQuantization

@synthesize granularity = _granularity;
@synthesize blockSize = _blockSize;
@synthesize groupSize = _groupSize;
@synthesize rotated = _rotated;
@synthesize scales = _scales;
@synthesize zeroPoints = _zeroPoints;
@synthesize channelMeans = _channelMeans;

- (instancetype)initWithGranularity:(MFAGranularity)granularity scales:(MFABufferView*)scales {
    if ((self = [super init])) {
        _granularity = granularity;
        _scales = [scales copy];
    }
    return self;
}

- (NSUInteger)scaleCountForShape:(MFAShape)shape {
    const uint64_t heads = product(product(1, shape.batch), shape.heads);
    switch (_granularity) {
    case MFAGranularityTensor: return 1;
    case MFAGranularityHead: return heads;
    case MFAGranularityToken: return product(heads, shape.tokens);
    case MFAGranularityBlock: return product(heads, quotient_rounded_up(shape.tokens, _blockSize));
    case MFAGranularityChannel: return product(heads, shape.channels);
    case MFAGranularityGroup: return product(product(heads, shape.tokens), quotient_rounded_up(shape.channels, _groupSize));
    }
    return 0;
}

- (id)copyWithZone:(NSZone*)zone {
    MFAQuantization* made = [[[self class] allocWithZone:zone] initWithGranularity:_granularity scales:_scales];
    made.blockSize = _blockSize;
    made.groupSize = _groupSize;
    made.rotated = _rotated;
    made.zeroPoints = _zeroPoints;
    made.channelMeans = _channelMeans;
    return made;
}

- (void)dealloc {
    MFA_RELEASE(_scales);
    MFA_RELEASE(_zeroPoints);
    MFA_RELEASE(_channelMeans);
    MFA_DEALLOC_SUPER();
}

@end

@implementation MFATensor

@synthesize buffer = _buffer;
@synthesize offset = _offset;
@synthesize precision = _precision;
@synthesize shape = _shape;
@synthesize strides = _strides;
@synthesize quantization = _quantization;

- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer
                        offset:(NSUInteger)offset
                     precision:(MFAPrecision)precision
                         shape:(MFAShape)shape
                       strides:(MFAShape)strides {
    if ((self = [super init])) {
        _buffer = MFA_RETAIN(buffer);
        _offset = offset;
        _precision = precision;
        _shape = shape;
        _strides = strides;
    }
    return self;
}

- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer
                        offset:(NSUInteger)offset
                     precision:(MFAPrecision)precision
                         shape:(MFAShape)shape
                        layout:(MFALayout)layout {
    const int64_t row = padded(shape.channels, precision);
    MFAShape strides = {0, row, row, 1};
    if (layout == MFALayoutTokensFirst)
        strides.tokens = (int64_t)product((uint64_t)row, shape.heads);
    else
        strides.heads = (int64_t)product((uint64_t)row, shape.tokens);
    strides.batch = (int64_t)product(product((uint64_t)row, shape.heads), shape.tokens);
    return [self initWithBuffer:buffer offset:offset precision:precision shape:shape strides:strides];
}

- (instancetype)initWithBuffer:(id<MTLBuffer>)buffer precision:(MFAPrecision)precision shape:(MFAShape)shape {
    return [self initWithBuffer:buffer offset:0 precision:precision shape:shape layout:MFALayoutHeadsFirst];
}

+ (NSUInteger)lengthForPrecision:(MFAPrecision)precision shape:(MFAShape)shape {
    if (precision == MFAPrecisionINT4) shape.channels = quotient_rounded_up(shape.channels, 2);
    return product(element_count(shape), (int64_t)unit_size(precision));
}

- (id)copyWithZone:(NSZone*)zone {
    MFATensor* made = [[[self class] allocWithZone:zone] initWithBuffer:_buffer
                                                                 offset:_offset
                                                              precision:_precision
                                                                  shape:_shape
                                                                strides:_strides];
    made.quantization = _quantization;
    return made;
}

- (void)dealloc {
    MFA_RELEASE(_buffer);
    MFA_RELEASE(_quantization);
    MFA_DEALLOC_SUPER();
}

@end

@implementation MFAQuantizationScheme

@synthesize precision = _precision;
@synthesize granularity = _granularity;
@synthesize blockSize = _blockSize;
@synthesize groupSize = _groupSize;
@synthesize asymmetric = _asymmetric;
@synthesize smooth = _smooth;
@synthesize rotate = _rotate;

- (instancetype)initWithPrecision:(MFAPrecision)precision granularity:(MFAGranularity)granularity {
    if ((self = [super init])) {
        _precision = precision;
        _granularity = granularity;
    }
    return self;
}

- (id)copyWithZone:(NSZone*)zone {
    MFAQuantizationScheme* made = [[[self class] allocWithZone:zone] initWithPrecision:_precision granularity:_granularity];
    made.blockSize = _blockSize;
    made.groupSize = _groupSize;
    made.asymmetric = _asymmetric;
    made.smooth = _smooth;
    made.rotate = _rotate;
    return made;
}

@end

@implementation MFAAttentionOptions

@synthesize softmaxScale = _softmaxScale;
@synthesize softcap = _softcap;
@synthesize causal = _causal;
@synthesize alignment = _alignment;
@synthesize queryOffsets = _queryOffsets;
@synthesize queryOffsetCount = _queryOffsetCount;
@synthesize windowLeft = _windowLeft;
@synthesize windowRight = _windowRight;
@synthesize kvLengths = _kvLengths;
@synthesize mask = _mask;
@synthesize alibiSlopes = _alibiSlopes;
@synthesize sinks = _sinks;
@synthesize dropoutProbability = _dropoutProbability;
@synthesize seed = _seed;
@synthesize dropoutOffset = _dropoutOffset;
@synthesize queryScheme = _queryScheme;
@synthesize keyScheme = _keyScheme;
@synthesize valueScheme = _valueScheme;

- (instancetype)init {
    if ((self = [super init])) {
        _windowLeft = -1;
        _windowRight = -1;
    }
    return self;
}

- (id)copyWithZone:(NSZone*)zone {
    MFAAttentionOptions* made = [[[self class] allocWithZone:zone] init];
    made.softmaxScale = _softmaxScale;
    made.softcap = _softcap;
    made.causal = _causal;
    made.alignment = _alignment;
    made.queryOffsets = _queryOffsets;
    made.queryOffsetCount = _queryOffsetCount;
    made.windowLeft = _windowLeft;
    made.windowRight = _windowRight;
    made.kvLengths = _kvLengths;
    made.mask = _mask;
    made.alibiSlopes = _alibiSlopes;
    made.sinks = _sinks;
    made.dropoutProbability = _dropoutProbability;
    made.seed = _seed;
    made.dropoutOffset = _dropoutOffset;
    made.queryScheme = _queryScheme;
    made.keyScheme = _keyScheme;
    made.valueScheme = _valueScheme;
    return made;
}

- (void)dealloc {
    MFA_RELEASE(_softmaxScale);
    MFA_RELEASE(_queryOffsets);
    MFA_RELEASE(_kvLengths);
    MFA_RELEASE(_mask);
    MFA_RELEASE(_alibiSlopes);
    MFA_RELEASE(_sinks);
    MFA_RELEASE(_queryScheme);
    MFA_RELEASE(_keyScheme);
    MFA_RELEASE(_valueScheme);
    MFA_DEALLOC_SUPER();
}

@end

@implementation MFAAttentionGradients

@synthesize gradOutput = _gradOutput;
@synthesize gradLogsumexp = _gradLogsumexp;
@synthesize dValues = _dValues;
@synthesize dValuesGiven = _dValuesGiven;
@synthesize gradQuery = _gradQuery;
@synthesize gradKey = _gradKey;
@synthesize gradValue = _gradValue;
@synthesize gradMask = _gradMask;
@synthesize gradSinks = _gradSinks;
@synthesize gradAlibiSlopes = _gradAlibiSlopes;

- (instancetype)initWithGradOutput:(MFATensor*)gradOutput {
    if ((self = [super init])) _gradOutput = [gradOutput copy];
    return self;
}

- (id)copyWithZone:(NSZone*)zone {
    MFAAttentionGradients* made = [[[self class] allocWithZone:zone] initWithGradOutput:_gradOutput];
    made.gradLogsumexp = _gradLogsumexp;
    made.dValues = _dValues;
    made.dValuesGiven = _dValuesGiven;
    made.gradQuery = _gradQuery;
    made.gradKey = _gradKey;
    made.gradValue = _gradValue;
    made.gradMask = _gradMask;
    made.gradSinks = _gradSinks;
    made.gradAlibiSlopes = _gradAlibiSlopes;
    return made;
}

- (void)dealloc {
    MFA_RELEASE(_gradOutput);
    MFA_RELEASE(_gradLogsumexp);
    MFA_RELEASE(_dValues);
    MFA_RELEASE(_gradQuery);
    MFA_RELEASE(_gradKey);
    MFA_RELEASE(_gradValue);
    MFA_RELEASE(_gradMask);
    MFA_RELEASE(_gradSinks);
    MFA_RELEASE(_gradAlibiSlopes);
    MFA_DEALLOC_SUPER();
}

@end

// Of a row's logsumexp, and whatever else is computed as precisely as that.
static int64_t statistic_size(MFATensor* query, MFATensor* key, MFATensor* value) {
    const BOOL is_double = query.precision == MFAPrecisionFP64 || key.precision == MFAPrecisionFP64 || value.precision == MFAPrecisionFP64;
    return is_double ? sizeof(double) : sizeof(float);
}

// More than any call has: ten tensors with three arrays each, and nine arrays of their own.
enum { MOST_TENSORS = 10, MOST_BUFFERS = 49 };

// One call of libmfa: its descriptors, and libmfa's buffers around those of Metal. The first thing that is wrong is kept and told at the end.
@interface MFACall : NSObject {
  @public
    mfa_attention_t attention;
    mfa_attention_gradients_t gradients;

  @private
    mfa_context_t* _context;
    NSError* _error;
    mfa_tensor_t _tensors[MOST_TENSORS];
    mfa_quantization_t _quantizations[MOST_TENSORS];
    mfa_quantization_scheme_t _schemes[3];
    mfa_buffer_t* _buffers[MOST_BUFFERS];
    int _tensorCount;
    int _schemeCount;
    int _bufferCount;
}
@end

@implementation MFACall

- (instancetype)initWithContext:(mfa_context_t*)context {
    if ((self = [super init])) {
        _context = context;
        mfa_attention_initialize(&attention, sizeof(attention));
        gradients.struct_size = sizeof(gradients);
    }
    return self;
}

- (void)dealloc {
    for (int index = 0; index < _bufferCount; index++) mfa_destroy_buffer(_buffers[index]);
    MFA_RELEASE(_error);
    MFA_DEALLOC_SUPER();
}

- (void)fail:(int32_t)status description:(NSString*)description {
    if (!_error) _error = MFA_RETAIN(make_error(status, description));
}

// libmfa's buffer around one of Metal's.
- (mfa_buffer_t*)wrap:(id<MTLBuffer>)buffer named:(NSString*)name {
    mfa_buffer_t* wrapped = NULL;
    const int32_t status = mfa_create_buffer_from_metal(_context, (__bridge void*)buffer, &wrapped);
    if (status == MFA_SUCCESS)
        _buffers[_bufferCount++] = wrapped;
    else
        [self fail:status description:[NSString stringWithFormat:@"the buffer of `%@`: %@", name, last_error(_context)]];
    return wrapped;
}

// The address of an array of plain numbers; NULL for none. Nobody but its buffer knows whether it is long enough.
- (void*)array:(MFABufferView*)view named:(NSString*)name count:(uint64_t)count size:(int64_t)size {
    if (!view) return NULL;
    mfa_buffer_t* wrapped = [self wrap:view.buffer named:name];
    if (!wrapped) return NULL;
    const uint64_t length = mfa_buffer_size(wrapped);
    const uint64_t needed = product(count, size);
    if (view.offset > length || needed > length - view.offset) {
        [self fail:MFA_ERROR_INVALID_DIMENSIONS
            description:[NSString stringWithFormat:@"`%@` must lie within its buffer of %llu bytes (got %llu bytes at offset %llu)", name,
                                                   (unsigned long long)length, (unsigned long long)needed,
                                                   (unsigned long long)view.offset]];
        return NULL;
    }
    return (char*)mfa_buffer_contents(wrapped) + view.offset;
}

- (const mfa_tensor_t*)tensor:(MFATensor*)tensor named:(NSString*)name {
    if (!tensor) return NULL;
    const MFAShape shape = tensor.shape, strides = tensor.strides;
    mfa_quantization_t* quantization = &_quantizations[_tensorCount];
    mfa_tensor_t* made = &_tensors[_tensorCount++];
    *made = (mfa_tensor_t){.struct_size = sizeof(*made),
                           .precision = (int32_t)tensor.precision,
                           .shape = {shape.batch, shape.heads, shape.tokens, shape.channels},
                           .strides = {strides.batch, strides.heads, strides.tokens, strides.channels}};
    // A tensor without elements needs no buffer; any other without one is refused.
    if (tensor.buffer || element_count(shape) > 0) {
        made->buffer = [self wrap:tensor.buffer named:name];
        made->buffer_offset = tensor.offset;
    }
    MFAQuantization* given = tensor.quantization;
    if (!given) return made;
    const uint64_t count = [given scaleCountForShape:shape];
    const uint64_t means = product(product(product(1, shape.batch), shape.heads), shape.channels);
    *quantization = (mfa_quantization_t){.struct_size = sizeof(*quantization),
                                         .granularity = (int32_t)given.granularity,
                                         .block_size = (uint32_t)MIN(given.blockSize, UINT32_MAX),
                                         .group_size = (uint32_t)MIN(given.groupSize, UINT32_MAX),
                                         .rotated = given.rotated};
    quantization->scales = [self array:given.scales named:[name stringByAppendingString:@".scales"] count:count size:sizeof(float)];
    quantization->zero_points = [self array:given.zeroPoints
                                      named:[name stringByAppendingString:@".zero_points"]
                                      count:count
                                       size:sizeof(int32_t)];
    quantization->channel_means = [self array:given.channelMeans
                                        named:[name stringByAppendingString:@".channel_means"]
                                        count:means
                                         size:sizeof(float)];
    made->quantization = quantization;
    return made;
}

- (const mfa_quantization_scheme_t*)scheme:(MFAQuantizationScheme*)scheme {
    if (!scheme) return NULL;
    mfa_quantization_scheme_t* made = &_schemes[_schemeCount++];
    *made = (mfa_quantization_scheme_t){.struct_size = sizeof(*made),
                                        .precision = (int32_t)scheme.precision,
                                        .granularity = (int32_t)scheme.granularity,
                                        .block_size = (uint32_t)MIN(scheme.blockSize, UINT32_MAX),
                                        .group_size = (uint32_t)MIN(scheme.groupSize, UINT32_MAX),
                                        .asymmetric = scheme.asymmetric,
                                        .smooth = scheme.smooth,
                                        .rotate = scheme.rotate};
    return made;
}

- (void)setQuery:(MFATensor*)query
             key:(MFATensor*)key
           value:(MFATensor*)value
          output:(MFATensor*)output
       logsumexp:(MFABufferView*)logsumexp
       gradients:(MFAAttentionGradients*)wanted
         options:(MFAAttentionOptions*)options {
    const MFAShape shape = query ? query.shape : MFAShapeMake(0, 0, 0, 0);
    const uint64_t heads = product(1, shape.heads);
    const uint64_t rows = row_count(shape);
    const int64_t size = statistic_size(query, key, value);
    attention.query = [self tensor:query named:@"query"];
    attention.key = [self tensor:key named:@"key"];
    attention.value = [self tensor:value named:@"value"];
    attention.output = [self tensor:output named:@"output"];
    attention.logsumexp = [self array:logsumexp named:@"logsumexp" count:rows size:size];
    attention.softmax_scale = shape.channels > 0 ? 1 / sqrt((double)shape.channels) : 1;
    if (options) {
        if (options.softmaxScale) attention.softmax_scale = [options.softmaxScale doubleValue];
        attention.softcap = options.softcap;
        attention.causal = options.causal;
        attention.alignment = (int32_t)options.alignment;
        attention.window_left = options.windowLeft;
        attention.window_right = options.windowRight;
        attention.dropout_p = options.dropoutProbability;
        attention.seed = options.seed;
        attention.dropout_offset = options.dropoutOffset;
        const NSUInteger offsets = options.queryOffsetCount;
        attention.num_query_offsets = (uint32_t)MIN(offsets, UINT32_MAX);
        attention.query_offsets = [self array:options.queryOffsets named:@"query_offsets" count:offsets size:sizeof(int64_t)];
        attention.kv_lengths = [self array:options.kvLengths named:@"kv_lengths" count:product(1, shape.batch) size:sizeof(int64_t)];
        attention.mask = [self tensor:options.mask named:@"mask"];
        attention.alibi_slopes = [self array:options.alibiSlopes named:@"alibi_slopes" count:heads size:size];
        attention.sinks = [self array:options.sinks named:@"sinks" count:heads size:size];
        attention.quantize_query = [self scheme:options.queryScheme];
        attention.quantize_key = [self scheme:options.keyScheme];
        attention.quantize_value = [self scheme:options.valueScheme];
    }
    if (wanted) {
        gradients.d_values_given = wanted.dValuesGiven;
        gradients.grad_output = [self tensor:wanted.gradOutput named:@"grad_output"];
        gradients.grad_logsumexp = [self array:wanted.gradLogsumexp named:@"grad_logsumexp" count:rows size:size];
        gradients.d_values = [self array:wanted.dValues named:@"d_values" count:rows size:size];
        gradients.grad_query = [self tensor:wanted.gradQuery named:@"grad_query"];
        gradients.grad_key = [self tensor:wanted.gradKey named:@"grad_key"];
        gradients.grad_value = [self tensor:wanted.gradValue named:@"grad_value"];
        gradients.grad_mask = [self tensor:wanted.gradMask named:@"grad_mask"];
        gradients.grad_sinks = [self array:wanted.gradSinks named:@"grad_sinks" count:heads size:size];
        gradients.grad_alibi_slopes = [self array:wanted.gradAlibiSlopes named:@"grad_alibi_slopes" count:heads size:size];
    }
}

// What libmfa says when it is called.
- (void)note:(int32_t)status {
    if (status != MFA_SUCCESS) [self fail:status description:last_error(_context)];
}

- (void)runForward {
    if (!_error) [self note:mfa_attention_run_forward(_context, &attention)];
}

- (void)runBackward {
    if (!_error) [self note:mfa_attention_run_backward(_context, &attention, &gradients)];
}

- (void)encodeForwardInto:(id<MTLCommandBuffer>)commands {
    if (!_error) [self note:mfa_attention_encode_forward(_context, (__bridge void*)commands, &attention)];
}

- (void)encodeBackwardInto:(id<MTLCommandBuffer>)commands {
    if (!_error) [self note:mfa_attention_encode_backward(_context, (__bridge void*)commands, &attention, &gradients)];
}

- (void)quantize:(MFATensor*)input into:(MFATensor*)output {
    const mfa_tensor_t *from = [self tensor:input named:@"input"], *to = [self tensor:output named:@"output"];
    if (!_error) [self note:mfa_quantize(_context, from, to)];
}

- (void)dequantize:(MFATensor*)input into:(MFATensor*)output {
    const mfa_tensor_t *from = [self tensor:input named:@"input"], *to = [self tensor:output named:@"output"];
    if (!_error) [self note:mfa_dequantize(_context, from, to)];
}

- (void)merge:(MFATensor*)first
    logsumexp:(MFABufferView*)firstLogsumexp
         with:(MFATensor*)second
    logsumexp:(MFABufferView*)secondLogsumexp
         into:(MFATensor*)output
    logsumexp:(MFABufferView*)logsumexp {
    const uint64_t rows = row_count(output ? output.shape : MFAShapeMake(0, 0, 0, 0));
    const mfa_tensor_t* a = [self tensor:first named:@"output_a"];
    const void* statistics_a = [self array:firstLogsumexp named:@"logsumexp_a" count:rows size:sizeof(float)];
    const mfa_tensor_t* b = [self tensor:second named:@"output_b"];
    const void* statistics_b = [self array:secondLogsumexp named:@"logsumexp_b" count:rows size:sizeof(float)];
    const mfa_tensor_t* merged = [self tensor:output named:@"output"];
    void* statistics = [self array:logsumexp named:@"logsumexp" count:rows size:sizeof(float)];
    if (!_error) [self note:mfa_attention_merge(_context, a, statistics_a, b, statistics_b, merged, statistics, MFA_PRECISION_FP32)];
}

- (NSError*)error {
    return _error;
}

@end

@interface MFABridge ()
@property (nullable, readwrite, strong) NSError* lastError;
@end

@implementation MFABridge

@synthesize device = _device;
@synthesize precision = _precision;
@synthesize executionTime = _executionTime;
@synthesize lastError = _lastError;

- (instancetype)initWithDevice:(id<MTLDevice>)device error:(NSError**)error {
    if (!(self = [super init])) return nil;
    NSError* failure = nil;
    const mfa_context_options_t options = {.struct_size = sizeof(options), .device = device_code};
    int32_t status = mfa_create_context_with_options(&options, &_context);
    if (!device)
        failure = make_error(MFA_ERROR_INVALID_ARGUMENT, @"`device` must not be nil");
    else if (status != MFA_SUCCESS)
        failure = make_error(status, last_error(NULL));
    else {
        // Whether it is libmfa's device shows in what libmfa says to a buffer of it.
        id<MTLBuffer> probe = [device newBufferWithLength:sizeof(float) options:MTLResourceStorageModeShared];
        mfa_buffer_t* wrapped = NULL;
        status = mfa_create_buffer_from_metal(_context, (__bridge void*)probe, &wrapped);
        if (status != MFA_SUCCESS) failure = make_error(status, [@"`device`: " stringByAppendingString:last_error(_context)]);
        mfa_destroy_buffer(wrapped);
        MFA_RELEASE(probe);
    }
    if (failure) {
        if (error) *error = failure;
        MFA_RELEASE(self);
        return nil;
    }
    _device = MFA_RETAIN(device);
    return self;
}

- (instancetype)initWithDevice:(id<MTLDevice>)device {
    return [self initWithDevice:device error:NULL];
}

- (void)dealloc {
    mfa_destroy_context(_context);
    MFA_RELEASE(_device);
    MFA_RELEASE(_lastError);
    MFA_DEALLOC_SUPER();
}

- (MFACall*)newCall {
    return [[MFACall alloc] initWithContext:_context];
}

// How a call went.
- (BOOL)finish:(MFACall*)call error:(NSError**)error {
    NSError* failure = [call error];
    self.lastError = failure;
    if (failure && error) *error = MFA_AUTORELEASE(MFA_RETAIN(failure));
    return failure == nil;
}

// How a call went that computed, and how long it took.
- (BOOL)finish:(MFACall*)call startedAt:(NSTimeInterval)start error:(NSError**)error {
    const NSTimeInterval elapsed = now() - start;
    if (![self finish:call error:error]) return NO;
    mfa_context_info_t info = {.struct_size = sizeof(info)};
    mfa_context_get_info(_context, &info);
    _executionTime = info.gpu_seconds > 0 ? info.gpu_seconds : elapsed;
    return YES;
}

- (NSTimeInterval)runAttentionWithQ:(id<MTLBuffer>)q
                                  K:(id<MTLBuffer>)k
                                  V:(id<MTLBuffer>)v
                                  O:(id<MTLBuffer>)o
                          seqLength:(NSUInteger)seqLength
                            headDim:(NSUInteger)headDim
                              scale:(float)scale
                             causal:(BOOL)causal {
    const MFAPrecision precision = self.precision;
    const BOOL is_quantized = precision == MFAPrecisionINT8 || precision == MFAPrecisionINT4;
    const MFAShape shape = MFAShapeMake(1, 1, (int64_t)MIN(seqLength, INT64_MAX), (int64_t)MIN(headDim, INT64_MAX));
    NSTimeInterval seconds = -1;
    @autoreleasepool {
        MFATensor* tensors[4];
        id<MTLBuffer> buffers[4] = {q, k, v, o};
        for (int index = 0; index < 4; index++)
            tensors[index] = MFA_AUTORELEASE([[MFATensor alloc] initWithBuffer:buffers[index]
                                                                     precision:index == 3 && is_quantized ? MFAPrecisionFP32 : precision
                                                                         shape:shape]);
        MFAAttentionOptions* options = MFA_AUTORELEASE([[MFAAttentionOptions alloc] init]);
        options.softmaxScale = @(scale);
        options.causal = causal;
        @synchronized(self) {
            if ([self runAttentionWithQuery:tensors[0]
                                        key:tensors[1]
                                      value:tensors[2]
                                     output:tensors[3]
                                  logsumexp:nil
                                    options:options
                                      error:NULL])
                seconds = _executionTime;
        }
    }
    return seconds;
}

- (BOOL)runAttentionWithQuery:(MFATensor*)query
                          key:(MFATensor*)key
                        value:(MFATensor*)value
                       output:(MFATensor*)output
                    logsumexp:(MFABufferView*)logsumexp
                      options:(MFAAttentionOptions*)options
                        error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        [call setQuery:query key:key value:value output:output logsumexp:logsumexp gradients:nil options:options];
        const NSTimeInterval start = now();
        [call runForward];
        const BOOL done = [self finish:call startedAt:start error:error];
        MFA_RELEASE(call);
        return done;
    }
}

- (BOOL)runBackwardWithQuery:(MFATensor*)query
                         key:(MFATensor*)key
                       value:(MFATensor*)value
                      output:(MFATensor*)output
                   logsumexp:(MFABufferView*)logsumexp
                   gradients:(MFAAttentionGradients*)gradients
                     options:(MFAAttentionOptions*)options
                       error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        [call setQuery:query key:key value:value output:output logsumexp:logsumexp gradients:gradients options:options];
        const NSTimeInterval start = now();
        [call runBackward];
        const BOOL done = [self finish:call startedAt:start error:error];
        MFA_RELEASE(call);
        return done;
    }
}

- (BOOL)encodeAttentionWithQuery:(MFATensor*)query
                             key:(MFATensor*)key
                           value:(MFATensor*)value
                          output:(MFATensor*)output
                       logsumexp:(MFABufferView*)logsumexp
                         options:(MFAAttentionOptions*)options
               intoCommandBuffer:(id<MTLCommandBuffer>)commandBuffer
                           error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        [call setQuery:query key:key value:value output:output logsumexp:logsumexp gradients:nil options:options];
        [call encodeForwardInto:commandBuffer];
        const BOOL done = [self finish:call error:error];
        MFA_RELEASE(call);
        return done;
    }
}

- (BOOL)encodeBackwardWithQuery:(MFATensor*)query
                            key:(MFATensor*)key
                          value:(MFATensor*)value
                         output:(MFATensor*)output
                      logsumexp:(MFABufferView*)logsumexp
                      gradients:(MFAAttentionGradients*)gradients
                        options:(MFAAttentionOptions*)options
              intoCommandBuffer:(id<MTLCommandBuffer>)commandBuffer
                          error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        [call setQuery:query key:key value:value output:output logsumexp:logsumexp gradients:gradients options:options];
        [call encodeBackwardInto:commandBuffer];
        const BOOL done = [self finish:call error:error];
        MFA_RELEASE(call);
        return done;
    }
}

- (BOOL)quantizeTensor:(MFATensor*)input into:(MFATensor*)output error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        const NSTimeInterval start = now();
        [call quantize:input into:output];
        const BOOL done = [self finish:call startedAt:start error:error];
        MFA_RELEASE(call);
        return done;
    }
}

- (BOOL)dequantizeTensor:(MFATensor*)input into:(MFATensor*)output error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        const NSTimeInterval start = now();
        [call dequantize:input into:output];
        const BOOL done = [self finish:call startedAt:start error:error];
        MFA_RELEASE(call);
        return done;
    }
}

- (BOOL)mergeOutput:(MFATensor*)first
          logsumexp:(MFABufferView*)firstLogsumexp
         withOutput:(MFATensor*)second
          logsumexp:(MFABufferView*)secondLogsumexp
         intoOutput:(MFATensor*)output
          logsumexp:(MFABufferView*)logsumexp
              error:(NSError**)error {
    @synchronized(self) {
        MFACall* call = [self newCall];
        const NSTimeInterval start = now();
        [call merge:first logsumexp:firstLogsumexp with:second logsumexp:secondLogsumexp into:output logsumexp:logsumexp];
        const BOOL done = [self finish:call startedAt:start error:error];
        MFA_RELEASE(call);
        return done;
    }
}

@end
