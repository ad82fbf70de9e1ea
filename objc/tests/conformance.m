// Runs conformance cases through MFABridge: cases on standard input, one line each, to results on standard output, one line each.
//
//     conformance DEVICE THREADS
//
// What a case says and what a result says is in docs/conformance.md. The device is the one that <Metal/Metal.h> stands for: `metal` on a Mac,
// `softmetal` elsewhere. References are counted by hand here.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#import "MFABridge.h"

#include "../../tests/conformance/inputs.h"

#ifdef __APPLE__
static const char* const device_name = "metal";
#else
static const char* const device_name = "softmetal";
#endif

// Cases of larger tensors are there to be refused.
static const double most_elements = 1 << 22;

static MFAPrecision precisionOf(NSString* name) {
    NSDictionary* codes = @{
        @"float32" : @(MFAPrecisionFP32),
        @"float16" : @(MFAPrecisionFP16),
        @"bfloat16" : @(MFAPrecisionBF16),
        @"float64" : @(MFAPrecisionFP64),
        @"int8" : @(MFAPrecisionINT8),
        @"int4" : @(MFAPrecisionINT4),
        @"bool" : @(MFAPrecisionBool)
    };
    return [[codes objectForKey:name] integerValue];
}

static MFAGranularity granularityOf(NSString* name) {
    const NSUInteger index = [@[ @"tensor", @"head", @"token", @"block", @"channel", @"group" ] indexOfObject:name];
    return (MFAGranularity)index;
}

// A field of an operand, such as "key_granularity".
static NSString* fieldOf(NSString* operand, NSString* what) {
    return [NSString stringWithFormat:@"%@_%@", operand, what];
}

static void writeReal(void* memory, MFAPrecision precision, int64_t at, uint64_t word) {
    switch (precision) {
    case MFAPrecisionFP64: ((double*)memory)[at] = (double)input_real(word); break;
    case MFAPrecisionFP16: ((uint16_t*)memory)[at] = bits_of_half(input_short_real(word)); break;
    case MFAPrecisionBF16: ((uint16_t*)memory)[at] = bits_of_bfloat(input_short_real(word)); break;
    default: ((float*)memory)[at] = input_real(word); break;
    }
}

static void writeMinusInfinity(void* memory, MFAPrecision precision, int64_t at) {
    switch (precision) {
    case MFAPrecisionFP64: ((double*)memory)[at] = -__builtin_inf(); break;
    case MFAPrecisionFP16: ((uint16_t*)memory)[at] = 0xFC00; break;
    case MFAPrecisionBF16: ((uint16_t*)memory)[at] = 0xFF80; break;
    default: ((float*)memory)[at] = -__builtin_inff(); break;
    }
}

@interface ConformanceCase : NSObject {
  @private
    NSDictionary* _fields;
    uint64_t _seed;
    MFABridge* _bridge;
    NSMutableDictionary* _outputs;
    NSError* _error;
}
@end

@implementation ConformanceCase

- (id)initWithLine:(NSString*)line bridge:(MFABridge*)bridge {
    if ((self = [super init])) {
        NSError* error = nil;
        NSData* json = [line dataUsingEncoding:NSUTF8StringEncoding];
        _fields = [[NSJSONSerialization JSONObjectWithData:json options:0 error:&error] retain];
        if (!_fields) [NSException raise:NSInvalidArgumentException format:@"a case is not JSON: %@", [error localizedDescription]];
        // GNUstep reads numbers as `double`, which does not hold the 64 bits of this one.
        const NSRange seed = [line rangeOfString:@"\"seed\": "];
        if (seed.length > 0) _seed = strtoull([[line substringFromIndex:NSMaxRange(seed)] UTF8String], NULL, 10);
        _bridge = [bridge retain];
        _outputs = [[NSMutableDictionary alloc] init];
    }
    return self;
}

- (void)dealloc {
    [_fields release];
    [_bridge release];
    [_outputs release];
    [super dealloc];
}

#pragma mark Fields

- (int64_t)integer:(NSString*)name otherwise:(int64_t)otherwise {
    NSNumber* number = [_fields objectForKey:name];
    return number ? [number longLongValue] : otherwise;
}

- (BOOL)flag:(NSString*)name {
    return [[_fields objectForKey:name] boolValue];
}

// What JSON has no number for is a text.
- (double)real:(NSString*)name otherwise:(double)otherwise {
    id given = [_fields objectForKey:name];
    if (!given) return otherwise;
    return [given isKindOfClass:[NSString class]] ? strtod([given UTF8String], NULL) : [given doubleValue];
}

- (MFAShape)shapeOfHeads:(NSString*)heads tokens:(NSString*)tokens channels:(NSString*)channels {
    const int64_t all = [self integer:@"num_heads" otherwise:1], width = [self integer:@"head_dim" otherwise:1];
    return MFAShapeMake([self integer:@"batch_size" otherwise:1], [self integer:heads otherwise:all], [self integer:tokens otherwise:1],
                        [self integer:channels otherwise:width]);
}

- (MFAShape)queryShape {
    return [self shapeOfHeads:@"num_heads" tokens:@"seq_len_q" channels:@"head_dim"];
}

- (MFAShape)keyShape {
    return [self shapeOfHeads:@"num_kv_heads" tokens:@"seq_len_kv" channels:@"head_dim"];
}

- (MFAShape)valueShape {
    return [self shapeOfHeads:@"num_kv_heads" tokens:@"seq_len_kv" channels:@"head_dim_v"];
}

- (MFAShape)outputShape {
    return [self shapeOfHeads:@"num_heads" tokens:@"seq_len_q" channels:@"head_dim_v"];
}

// Why a case cannot be said with MFABridge; nil: it can.
- (NSString*)reason {
    if ([[_fields objectForKey:@"operation"] hasPrefix:@"flat_"]) return @"MFABridge has no flat functions";
    if ([[_fields objectForKey:@"null"] isEqual:@"key_data"]) return @"MFABridge takes buffers, not addresses";
    const MFAShape shapes[4] = {[self queryShape], [self keyShape], [self valueShape], [self outputShape]};
    for (int index = 0; index < 4; index++) {
        const MFAShape shape = shapes[index];
        if ((double)shape.batch * (double)shape.heads * (double)shape.tokens * (double)shape.channels > most_elements)
            return @"buffers of this size do not exist";
    }
    return nil;
}

#pragma mark Memory

// Filled with 0xA5. There is no buffer without bytes.
- (id<MTLBuffer>)bufferOfLength:(NSUInteger)length {
    id<MTLBuffer> buffer = [_bridge.device newBufferWithLength:MAX(length, 16) options:MTLResourceStorageModeShared];
    memset([buffer contents], 0xA5, buffer.length);
    return [buffer autorelease];
}

// A contiguous tensor in the case's layout, to be written.
- (MFATensor*)tensorOfType:(NSString*)type shape:(MFAShape)shape {
    const MFAPrecision precision = precisionOf(type);
    const MFALayout layout = [[_fields objectForKey:@"layout"] isEqual:@"bshd"] ? MFALayoutTokensFirst : MFALayoutHeadsFirst;
    id<MTLBuffer> buffer = [self bufferOfLength:[MFATensor lengthForPrecision:precision shape:shape]];
    return [[[MFATensor alloc] initWithBuffer:buffer offset:0 precision:precision shape:shape layout:layout] autorelease];
}

// The same filled from `stream`.
- (MFATensor*)tensorOfType:(NSString*)type shape:(MFAShape)shape stream:(int)stream {
    MFATensor* tensor = [self tensorOfType:type shape:shape];
    const MFAShape strides = tensor.strides;
    const MFAPrecision precision = tensor.precision;
    const uint64_t seed = (uint64_t)[self integer:@"input_seed" otherwise:0];
    void* memory = [tensor.buffer contents];
    memset(memory, 0, tensor.buffer.length);
    uint64_t place = 0;
    for (int64_t b = 0; b < shape.batch; b++)
        for (int64_t h = 0; h < shape.heads; h++)
            for (int64_t s = 0; s < shape.tokens; s++)
                for (int64_t d = 0; d < shape.channels; d++) {
                    const int64_t at = b * strides.batch + h * strides.heads + s * strides.tokens + d;
                    const uint64_t word = input_word(seed, stream, place++);
                    if (precision == MFAPrecisionINT4)
                        ((uint8_t*)memory)[at / 2] |= (uint8_t)((input_int4(word) & 15) << (at & 1) * 4);
                    else if (precision == MFAPrecisionINT8)
                        ((int8_t*)memory)[at] = input_int8(word);
                    else
                        writeReal(memory, precision, at, word);
                }
    return tensor;
}

// What the codes of an operand stand for: from the streams of operand `number`; below 0: to be written.
- (MFAQuantization*)quantizationOf:(NSString*)operand shape:(MFAShape)shape number:(int)number isInt8:(BOOL)isInt8 {
    const MFAGranularity granularity = granularityOf([_fields objectForKey:fieldOf(operand, @"granularity")]);
    const NSUInteger blockSize = (NSUInteger)[self integer:fieldOf(operand, @"block_size") otherwise:1];
    const NSUInteger groupSize = (NSUInteger)[self integer:fieldOf(operand, @"group_size") otherwise:1];
    const uint64_t seed = (uint64_t)[self integer:@"input_seed" otherwise:0];
    // The class counts the scales, by sizes that are set before there are any.
    MFAQuantization* counting =
        [[[MFAQuantization alloc] initWithGranularity:granularity
                                               scales:[MFABufferView viewWithBuffer:[self bufferOfLength:0]]] autorelease];
    counting.blockSize = blockSize;
    counting.groupSize = groupSize;
    const NSUInteger count = [counting scaleCountForShape:shape];
    const NSUInteger means = (NSUInteger)(shape.batch * shape.heads * shape.channels);
    id<MTLBuffer> scales = [self bufferOfLength:count * sizeof(float)], zeroPoints = nil, channelMeans = nil;
    if ([self flag:fieldOf(operand, @"zero_points")]) zeroPoints = [self bufferOfLength:count * sizeof(int32_t)];
    if ([self flag:fieldOf(operand, @"channel_means")]) channelMeans = [self bufferOfLength:means * sizeof(float)];
    for (NSUInteger n = 0; n < count && number >= 0; n++) {
        ((float*)[scales contents])[n] = input_scale(input_word(seed, STREAM_SCALES + number, n), isInt8);
        if (zeroPoints) ((int32_t*)[zeroPoints contents])[n] = input_zero_point(input_word(seed, STREAM_ZERO_POINTS + number, n));
    }
    for (NSUInteger n = 0; n < means && channelMeans && number >= 0; n++)
        ((float*)[channelMeans contents])[n] = input_real(input_word(seed, STREAM_CHANNEL_MEANS + number, n));
    MFAQuantization* made = [[[MFAQuantization alloc] initWithGranularity:granularity
                                                                   scales:[MFABufferView viewWithBuffer:scales]] autorelease];
    made.blockSize = blockSize;
    made.groupSize = groupSize;
    made.rotated = [self flag:fieldOf(operand, @"rotated")];
    if (zeroPoints) made.zeroPoints = [MFABufferView viewWithBuffer:zeroPoints];
    if (channelMeans) made.channelMeans = [MFABufferView viewWithBuffer:channelMeans];
    return made;
}

// The query, key or value: codes or floats.
- (MFATensor*)operand:(NSString*)name shape:(MFAShape)shape number:(int)number {
    if ([[_fields objectForKey:@"null"] isEqual:name]) return nil;
    NSString* type = [_fields objectForKey:name];
    MFATensor* tensor = [self tensorOfType:type shape:shape stream:number];
    if ([_fields objectForKey:fieldOf(name, @"granularity")])
        tensor.quantization = [self quantizationOf:name shape:shape number:number isInt8:[type isEqual:@"int8"]];
    NSNumber* code = [_fields objectForKey:fieldOf(name, @"precision_code")];
    if (!code) return tensor;
    return [[[MFATensor alloc] initWithBuffer:tensor.buffer offset:0 precision:[code integerValue] shape:shape
                                      strides:tensor.strides] autorelease];
}

// `float`, or `double`, to be written.
- (MFABufferView*)statistics:(int64_t)count {
    return [MFABufferView viewWithBuffer:[self bufferOfLength:(NSUInteger)count * [self statisticSize]]];
}

- (NSUInteger)statisticSize {
    BOOL isDouble = NO;
    for (NSString* name in @[ @"query", @"key", @"value" ]) isDouble = isDouble || [[_fields objectForKey:name] isEqual:@"float64"];
    return isDouble ? sizeof(double) : sizeof(float);
}

// The same filled from `stream`.
- (MFABufferView*)statistics:(int64_t)count stream:(int)stream {
    MFABufferView* view = [self statistics:count];
    const BOOL isDouble = [self statisticSize] == sizeof(double);
    const uint64_t seed = (uint64_t)[self integer:@"input_seed" otherwise:0];
    for (int64_t n = 0; n < count; n++) {
        const uint64_t word = input_word(seed, stream, (uint64_t)n);
        const float number = stream == STREAM_ALIBI_SLOPES ? input_slope(word) : input_real(word);
        if (isDouble)
            ((double*)[view.buffer contents])[n] = (double)number;
        else
            ((float*)[view.buffer contents])[n] = number;
    }
    return view;
}

// A list of integers; nil: there is none.
- (MFABufferView*)list:(NSString*)name {
    NSArray* numbers = [_fields objectForKey:name];
    if (!numbers) return nil;
    id<MTLBuffer> buffer = [self bufferOfLength:[numbers count] * sizeof(int64_t)];
    for (NSUInteger index = 0; index < [numbers count]; index++)
        ((int64_t*)[buffer contents])[index] = [[numbers objectAtIndex:index] longLongValue];
    return [MFABufferView viewWithBuffer:buffer];
}

- (MFAShape)maskShape {
    NSArray* sizes = [_fields objectForKey:@"mask_shape"];
    return MFAShapeMake([[sizes objectAtIndex:0] longLongValue], [[sizes objectAtIndex:1] longLongValue],
                        [[sizes objectAtIndex:2] longLongValue], [[sizes objectAtIndex:3] longLongValue]);
}

// Contiguous in its own shape, or for its gradient to be written.
- (MFATensor*)emptyMask {
    const MFAPrecision precision = precisionOf([_fields objectForKey:@"mask"]);
    const MFAShape shape = [self maskShape];
    id<MTLBuffer> buffer = [self bufferOfLength:[MFATensor lengthForPrecision:precision shape:shape]];
    return [[[MFATensor alloc] initWithBuffer:buffer precision:precision shape:shape] autorelease];
}

- (MFATensor*)mask {
    MFATensor* mask = [self emptyMask];
    const MFAShape shape = mask.shape;
    const int64_t count = shape.batch * shape.heads * shape.tokens * shape.channels;
    void* memory = [mask.buffer contents];
    for (int64_t n = 0; n < count; n++) {
        const uint64_t word = input_word((uint64_t)[self integer:@"input_seed" otherwise:0], STREAM_MASK, (uint64_t)n);
        if (mask.precision == MFAPrecisionBool)
            ((uint8_t*)memory)[n] = input_bool(word);
        else if (word >> 61 == 0)
            writeMinusInfinity(memory, mask.precision, n);
        else
            writeReal(memory, mask.precision, n, word);
    }
    return mask;
}

#pragma mark Results

- (void)keep:(NSString*)name buffer:(id<MTLBuffer>)buffer length:(NSUInteger)length {
    NSString* hash = [NSString stringWithFormat:@"%016llx", (unsigned long long)hash_of([buffer contents], length)];
    [_outputs setObject:hash forKey:name];
}

- (void)keep:(NSString*)name tensor:(MFATensor*)tensor {
    if (tensor) [self keep:name buffer:tensor.buffer length:[MFATensor lengthForPrecision:tensor.precision shape:tensor.shape]];
}

- (void)keep:(NSString*)name statistics:(MFABufferView*)view count:(int64_t)count {
    if (view) [self keep:name buffer:view.buffer length:(NSUInteger)count * [self statisticSize]];
}

#pragma mark Calls

// How a float operand is to be quantised; nil: it is not.
- (MFAQuantizationScheme*)scheme:(NSString*)name {
    NSString* operand = [@"quantize_" stringByAppendingString:name];
    NSString* type = [_fields objectForKey:operand];
    if (!type) return nil;
    const MFAGranularity granularity = granularityOf([_fields objectForKey:fieldOf(operand, @"granularity")]);
    MFAQuantizationScheme* made = [[[MFAQuantizationScheme alloc] initWithPrecision:precisionOf(type) granularity:granularity] autorelease];
    made.blockSize = (NSUInteger)[self integer:fieldOf(operand, @"block_size") otherwise:0];
    made.groupSize = (NSUInteger)[self integer:fieldOf(operand, @"group_size") otherwise:0];
    made.asymmetric = [self flag:fieldOf(operand, @"asymmetric")];
    made.smooth = [self flag:fieldOf(operand, @"smooth")];
    made.rotate = [self flag:fieldOf(operand, @"rotate")];
    return made;
}

- (MFAAttentionOptions*)options {
    MFAAttentionOptions* made = [[[MFAAttentionOptions alloc] init] autorelease];
    const int64_t heads = [self integer:@"num_heads" otherwise:1];
    made.softmaxScale = @([self real:@"softmax_scale" otherwise:1]);
    made.softcap = [self real:@"softcap" otherwise:0];
    made.causal = [self flag:@"causal"];
    made.alignment = [self integer:@"alignment" otherwise:MFAAlignmentUpperLeft];
    made.windowLeft = [self integer:@"window_left" otherwise:-1];
    made.windowRight = [self integer:@"window_right" otherwise:-1];
    made.dropoutProbability = [self real:@"dropout_p" otherwise:0];
    made.seed = _seed;
    made.dropoutOffset = (uint32_t)[self integer:@"dropout_offset" otherwise:0];
    made.kvLengths = [self list:@"kv_lengths"];
    made.queryOffsets = [self list:@"query_offsets"];
    made.queryOffsetCount = [[_fields objectForKey:@"query_offsets"] count];
    if ([_fields objectForKey:@"mask"]) made.mask = [self mask];
    if ([self flag:@"alibi_slopes"]) made.alibiSlopes = [self statistics:heads stream:STREAM_ALIBI_SLOPES];
    if ([self flag:@"sinks"]) made.sinks = [self statistics:heads stream:STREAM_SINKS];
    made.queryScheme = [self scheme:@"query"];
    made.keyScheme = [self scheme:@"key"];
    made.valueScheme = [self scheme:@"value"];
    return made;
}

- (void)runAttention:(BOOL)backward {
    const MFAShape queryShape = [self queryShape], keyShape = [self keyShape], valueShape = [self valueShape];
    const MFAShape outputShape = [self outputShape];
    const int64_t rows = queryShape.batch * queryShape.heads * queryShape.tokens;
    MFATensor* query = [self operand:@"query" shape:queryShape number:0];
    MFATensor* key = [self operand:@"key" shape:keyShape number:1];
    MFATensor* value = [self operand:@"value" shape:valueShape number:2];
    MFATensor* output = nil;
    if (![[_fields objectForKey:@"null"] isEqual:@"output"])
        output = [self tensorOfType:[_fields objectForKey:@"output"] shape:outputShape];
    MFABufferView* logsumexp = [self statistics:rows];
    MFAAttentionOptions* options = [self options];
    BOOL done = [_bridge runAttentionWithQuery:query key:key value:value output:output logsumexp:logsumexp options:options error:&_error];
    if (!backward) {
        [self keep:@"output" tensor:output];
        [self keep:@"logsumexp" statistics:logsumexp count:rows];
        return;
    }
    NSString* type = [_fields objectForKey:@"gradient"];
    NSArray* wanted = [[_fields objectForKey:@"gradients"] componentsSeparatedByString:@","];
    MFATensor* gradOutput = [self tensorOfType:[_fields objectForKey:@"output"] shape:outputShape stream:STREAM_GRAD_OUTPUT];
    MFAAttentionGradients* gradients = [[[MFAAttentionGradients alloc] initWithGradOutput:gradOutput] autorelease];
    if ([self flag:@"grad_logsumexp"]) gradients.gradLogsumexp = [self statistics:rows stream:STREAM_GRAD_LOGSUMEXP];
    if ([wanted containsObject:@"query"]) gradients.gradQuery = [self tensorOfType:type shape:queryShape];
    if ([wanted containsObject:@"key"]) gradients.gradKey = [self tensorOfType:type shape:keyShape];
    if ([wanted containsObject:@"value"]) gradients.gradValue = [self tensorOfType:type shape:valueShape];
    if ([wanted containsObject:@"mask"]) gradients.gradMask = [self emptyMask];
    if ([wanted containsObject:@"sinks"]) gradients.gradSinks = [self statistics:queryShape.heads];
    if ([wanted containsObject:@"alibi_slopes"]) gradients.gradAlibiSlopes = [self statistics:queryShape.heads];
    if (done)
        [_bridge runBackwardWithQuery:query
                                  key:key
                                value:value
                               output:[self flag:@"without_output"] ? nil : output
                            logsumexp:logsumexp
                            gradients:gradients
                              options:options
                                error:&_error];
    [self keep:@"query" tensor:gradients.gradQuery];
    [self keep:@"key" tensor:gradients.gradKey];
    [self keep:@"value" tensor:gradients.gradValue];
    [self keep:@"mask" tensor:gradients.gradMask];
    [self keep:@"sinks" statistics:gradients.gradSinks count:queryShape.heads];
    [self keep:@"alibi_slopes" statistics:gradients.gradAlibiSlopes count:queryShape.heads];
}

- (void)runQuantization:(BOOL)back {
    const MFAShape shape = [self queryShape];
    NSString* type = [_fields objectForKey:@"codes"];
    MFATensor* codes = back ? [self tensorOfType:type shape:shape stream:STREAM_QUERY] : [self tensorOfType:type shape:shape];
    codes.quantization = [self quantizationOf:@"codes" shape:shape number:back ? 0 : -1 isInt8:[type isEqual:@"int8"]];
    if (back) {
        MFATensor* output = [self tensorOfType:[_fields objectForKey:@"output"] shape:shape];
        [_bridge dequantizeTensor:codes into:output error:&_error];
        [self keep:@"output" tensor:output];
        return;
    }
    MFAQuantization* quantization = codes.quantization;
    const NSUInteger count = [quantization scaleCountForShape:shape];
    const NSUInteger means = (NSUInteger)(shape.batch * shape.heads * shape.channels);
    [_bridge quantizeTensor:[self tensorOfType:[_fields objectForKey:@"query"] shape:shape stream:STREAM_QUERY] into:codes error:&_error];
    [self keep:@"codes" tensor:codes];
    [self keep:@"scales" buffer:quantization.scales.buffer length:count * sizeof(float)];
    if (quantization.zeroPoints) [self keep:@"zero_points" buffer:quantization.zeroPoints.buffer length:count * sizeof(int32_t)];
    if (quantization.channelMeans) [self keep:@"channel_means" buffer:quantization.channelMeans.buffer length:means * sizeof(float)];
}

- (void)runMerge {
    const MFAShape shape = [self queryShape];
    const int64_t rows = shape.batch * shape.heads * shape.tokens;
    MFATensor* output = [self tensorOfType:[_fields objectForKey:@"output"] shape:shape];
    MFABufferView* logsumexp = [self statistics:rows];
    [_bridge mergeOutput:[self tensorOfType:[_fields objectForKey:@"query"] shape:shape stream:STREAM_QUERY]
               logsumexp:[self statistics:rows stream:STREAM_GRAD_LOGSUMEXP]
              withOutput:[self tensorOfType:[_fields objectForKey:@"key"] shape:shape stream:STREAM_KEY]
               logsumexp:[self statistics:rows stream:STREAM_MASK]
              intoOutput:output
               logsumexp:logsumexp
                   error:&_error];
    [self keep:@"output" tensor:output];
    [self keep:@"logsumexp" statistics:logsumexp count:rows];
}

- (NSDictionary*)answer {
    NSString *identifier = [_fields objectForKey:@"id"], *operation = [_fields objectForKey:@"operation"], *reason = [self reason];
    if (reason) return @{@"id" : identifier, @"skipped" : reason};
    if ([operation isEqual:@"forward"])
        [self runAttention:NO];
    else if ([operation isEqual:@"backward"])
        [self runAttention:YES];
    else if ([operation isEqual:@"quantize"])
        [self runQuantization:NO];
    else if ([operation isEqual:@"dequantize"])
        [self runQuantization:YES];
    else if ([operation isEqual:@"merge"])
        [self runMerge];
    else
        [NSException raise:NSInvalidArgumentException format:@"no operation %@", operation];
    return
        @{@"id" : identifier, @"outputs" : _outputs, @"status" : @(_error.code), @"message" : _error ? [_error localizedDescription] : @""};
}

@end

int main(int count, char** words) {
    NSAutoreleasePool* pool = [[NSAutoreleasePool alloc] init];
    if (count != 3 || strcmp(words[1], device_name) != 0) {
        fprintf(stderr, "usage: conformance %s THREADS\n", device_name);
        return 2;
    }
    // A bridge has no number of threads; its context asks the environment.
    setenv("MFA_NUM_THREADS", words[2], 1);
    NSError* error = nil;
    MFABridge* bridge = [[MFABridge alloc] initWithDevice:[MTLCreateSystemDefaultDevice() autorelease] error:&error];
    if (!bridge) {
        fprintf(stderr, "%s\n", [[error localizedDescription] UTF8String]);
        return 2;
    }
    NSData* input = [[NSFileHandle fileHandleWithStandardInput] readDataToEndOfFile];
    NSString* text = [[[NSString alloc] initWithData:input encoding:NSUTF8StringEncoding] autorelease];
    for (NSString* line in [text componentsSeparatedByString:@"\n"]) {
        if ([line length] == 0) continue;
        NSAutoreleasePool* inner = [[NSAutoreleasePool alloc] init];
        ConformanceCase* made = [[ConformanceCase alloc] initWithLine:line bridge:bridge];
        NSData* json = [NSJSONSerialization dataWithJSONObject:[made answer] options:0 error:NULL];
        printf("%.*s\n", (int)[json length], (const char*)[json bytes]);
        [made release];
        [inner release];
    }
    [bridge release];
    [pool release];
    return 0;
}
