// Runs the cases of a file through MFABridge, a JSON object a line, and prints a JSON object for each: whether it succeeded, the error, the
// times, and the bytes of all its buffers afterwards. tests/test_objc.py writes the file and looks at the answers.
//
// Buffers come by their names, as {"data": base64} with {"other_device": 1} if they are not the bridge's. Tensors and arrays name a buffer
// and an offset; a name that there is not stands for nil. Numbers beyond 32 bits are strings.
//
// References are counted by hand here, with or without ARC around: it shows that nothing is held for longer than it must be.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <stdio.h>
#include <stdlib.h>

#import "MFABridge.h"

#ifndef __APPLE__
#include "softmetal.h"
#endif

// Numbers, or words for them.
static int64_t integer(id number) {
    return number ? strtoll([[number description] UTF8String], NULL, 10) : 0;
}

static uint64_t natural(id number) {
    return number ? strtoull([[number description] UTF8String], NULL, 10) : 0;
}

static double real(id number) {
    return strtod([[number description] UTF8String], NULL);
}

@interface Case : NSObject {
  @private
    NSDictionary* _description;
    MFABridge* _bridge;
    NSMutableDictionary* _buffers;
}
@end

@implementation Case

- (id)initWithDescription:(NSDictionary*)description bridge:(MFABridge*)bridge {
    if ((self = [super init])) {
        _description = [description retain];
        _bridge = [bridge retain];
        _buffers = [[NSMutableDictionary alloc] init];
        NSDictionary* buffers = [description objectForKey:@"buffers"];
        for (NSString* name in buffers) {
            NSData* data = [[[NSData alloc] initWithBase64EncodedString:[[buffers objectForKey:name] objectForKey:@"data"]
                                                                options:0] autorelease];
            id<MTLDevice> device = bridge.device;
#ifndef __APPLE__
            sm_device* other = [[buffers objectForKey:name] objectForKey:@"other_device"] ? sm_device_create("another GPU", 1009) : NULL;
            if (other) device = (id<MTLDevice>)other;
#endif
            id<MTLBuffer> made = [device newBufferWithBytes:[data bytes] length:[data length] options:MTLResourceStorageModeShared];
            [_buffers setObject:made forKey:name];
            [made release];
#ifndef __APPLE__
            sm_release(other);
#endif
        }
    }
    return self;
}

- (void)dealloc {
    [_description release];
    [_bridge release];
    [_buffers release];
    [super dealloc];
}

- (id<MTLBuffer>)buffer:(NSString*)name {
    return name ? [_buffers objectForKey:name] : nil;
}

- (MFABufferView*)view:(NSDictionary*)given {
    if (!given) return nil;
    return [[[MFABufferView alloc] initWithBuffer:[self buffer:[given objectForKey:@"buffer"]]
                                           offset:natural([given objectForKey:@"offset"])] autorelease];
}

- (MFABufferView*)array:(NSString*)role {
    return [self view:[[_description objectForKey:@"arrays"] objectForKey:role]];
}

static MFAShape shapeOf(NSArray* sizes) {
    return MFAShapeMake(integer([sizes objectAtIndex:0]), integer([sizes objectAtIndex:1]), integer([sizes objectAtIndex:2]),
                        integer([sizes objectAtIndex:3]));
}

- (MFATensor*)tensor:(NSString*)role {
    NSDictionary* given = [[_description objectForKey:@"tensors"] objectForKey:role];
    if (!given) return nil;
    id<MTLBuffer> buffer = [self buffer:[given objectForKey:@"buffer"]];
    const NSUInteger offset = natural([given objectForKey:@"offset"]);
    const MFAPrecision precision = integer([given objectForKey:@"precision"]);
    const MFAShape shape = shapeOf([given objectForKey:@"shape"]);
    MFATensor* made = nil;
    if ([given objectForKey:@"strides"])
        made = [[MFATensor alloc] initWithBuffer:buffer
                                          offset:offset
                                       precision:precision
                                           shape:shape
                                         strides:shapeOf([given objectForKey:@"strides"])];
    else
        made = [[MFATensor alloc] initWithBuffer:buffer
                                          offset:offset
                                       precision:precision
                                           shape:shape
                                          layout:integer([given objectForKey:@"layout"])];
    NSDictionary* quantization = [given objectForKey:@"quantization"];
    if (quantization) {
        MFAQuantization* of = [[MFAQuantization alloc] initWithGranularity:integer([quantization objectForKey:@"granularity"])
                                                                    scales:[self view:[quantization objectForKey:@"scales"]]];
        of.blockSize = natural([quantization objectForKey:@"block_size"]);
        of.groupSize = natural([quantization objectForKey:@"group_size"]);
        of.rotated = [[quantization objectForKey:@"rotated"] boolValue];
        of.zeroPoints = [self view:[quantization objectForKey:@"zero_points"]];
        of.channelMeans = [self view:[quantization objectForKey:@"channel_means"]];
        made.quantization = of;
        [of release];
    }
    // A copy is as good as the original.
    return [[[made autorelease] copy] autorelease];
}

static MFAQuantizationScheme* scheme(NSDictionary* given) {
    if (!given) return nil;
    MFAQuantizationScheme* made =
        [[[MFAQuantizationScheme alloc] initWithPrecision:integer([given objectForKey:@"precision"])
                                              granularity:integer([given objectForKey:@"granularity"])] autorelease];
    made.blockSize = natural([given objectForKey:@"block_size"]);
    made.groupSize = natural([given objectForKey:@"group_size"]);
    made.asymmetric = [[given objectForKey:@"asymmetric"] boolValue];
    made.smooth = [[given objectForKey:@"smooth"] boolValue];
    made.rotate = [[given objectForKey:@"rotate"] boolValue];
    return made;
}

- (MFAAttentionOptions*)options {
    NSDictionary* given = [_description objectForKey:@"options"];
    if (!given) return nil;
    MFAAttentionOptions* made = [[[MFAAttentionOptions alloc] init] autorelease];
    if ([given objectForKey:@"softmax_scale"]) made.softmaxScale = @(real([given objectForKey:@"softmax_scale"]));
    if ([given objectForKey:@"softcap"]) made.softcap = real([given objectForKey:@"softcap"]);
    made.causal = [[given objectForKey:@"causal"] boolValue];
    made.alignment = integer([given objectForKey:@"alignment"]);
    made.queryOffsetCount = natural([given objectForKey:@"num_query_offsets"]);
    if ([given objectForKey:@"window_left"]) made.windowLeft = integer([given objectForKey:@"window_left"]);
    if ([given objectForKey:@"window_right"]) made.windowRight = integer([given objectForKey:@"window_right"]);
    if ([given objectForKey:@"dropout_p"]) made.dropoutProbability = real([given objectForKey:@"dropout_p"]);
    if ([given objectForKey:@"seed"]) made.seed = natural([given objectForKey:@"seed"]);
    if ([given objectForKey:@"dropout_offset"]) made.dropoutOffset = (uint32_t)integer([given objectForKey:@"dropout_offset"]);
    made.queryOffsets = [self array:@"query_offsets"];
    made.kvLengths = [self array:@"kv_lengths"];
    made.alibiSlopes = [self array:@"alibi_slopes"];
    made.sinks = [self array:@"sinks"];
    made.mask = [self tensor:@"mask"];
    made.queryScheme = scheme([given objectForKey:@"quantize_query"]);
    made.keyScheme = scheme([given objectForKey:@"quantize_key"]);
    made.valueScheme = scheme([given objectForKey:@"quantize_value"]);
    return [[made copy] autorelease];
}

- (MFAAttentionGradients*)gradients {
    MFAAttentionGradients* made = [[[MFAAttentionGradients alloc] initWithGradOutput:[self tensor:@"grad_output"]] autorelease];
    made.gradLogsumexp = [self array:@"grad_logsumexp"];
    made.dValues = [self array:@"d_values"];
    made.dValuesGiven = [[_description objectForKey:@"d_values_given"] boolValue];
    made.gradQuery = [self tensor:@"grad_query"];
    made.gradKey = [self tensor:@"grad_key"];
    made.gradValue = [self tensor:@"grad_value"];
    made.gradMask = [self tensor:@"grad_mask"];
    made.gradSinks = [self array:@"grad_sinks"];
    made.gradAlibiSlopes = [self array:@"grad_alibi_slopes"];
    return [[made copy] autorelease];
}

- (BOOL)run:(NSError**)error into:(id<MTLCommandBuffer>)commands {
    NSString* call = [_description objectForKey:@"call"];
    MFATensor *query = [self tensor:@"query"], *key = [self tensor:@"key"], *value = [self tensor:@"value"],
              *output = [self tensor:@"output"];
    MFABufferView* logsumexp = [self array:@"logsumexp"];
    if ([call isEqual:@"seed"]) {
        _bridge.precision = integer([_description objectForKey:@"precision"]);
        const NSTimeInterval seconds = [_bridge runAttentionWithQ:[self buffer:@"query"]
                                                                K:[self buffer:@"key"]
                                                                V:[self buffer:@"value"]
                                                                O:[self buffer:@"output"]
                                                        seqLength:natural([_description objectForKey:@"seq_length"])
                                                          headDim:natural([_description objectForKey:@"head_dim"])
                                                            scale:(float)real([_description objectForKey:@"scale"])
                                                           causal:[[_description objectForKey:@"causal"] boolValue]];
        *error = _bridge.lastError;
        return seconds > 0 && seconds == _bridge.executionTime;
    }
    if ([call isEqual:@"forward"] && commands)
        return [_bridge encodeAttentionWithQuery:query
                                             key:key
                                           value:value
                                          output:output
                                       logsumexp:logsumexp
                                         options:[self options]
                               intoCommandBuffer:commands
                                           error:error];
    if ([call isEqual:@"forward"])
        return [_bridge runAttentionWithQuery:query
                                          key:key
                                        value:value
                                       output:output
                                    logsumexp:logsumexp
                                      options:[self options]
                                        error:error];
    if ([call isEqual:@"backward"] && commands)
        return [_bridge encodeBackwardWithQuery:query
                                            key:key
                                          value:value
                                         output:output
                                      logsumexp:logsumexp
                                      gradients:[self gradients]
                                        options:[self options]
                              intoCommandBuffer:commands
                                          error:error];
    if ([call isEqual:@"backward"])
        return [_bridge runBackwardWithQuery:query
                                         key:key
                                       value:value
                                      output:output
                                   logsumexp:logsumexp
                                   gradients:[self gradients]
                                     options:[self options]
                                       error:error];
    if ([call isEqual:@"quantize"]) return [_bridge quantizeTensor:[self tensor:@"input"] into:output error:error];
    if ([call isEqual:@"dequantize"]) return [_bridge dequantizeTensor:[self tensor:@"input"] into:output error:error];
    if ([call isEqual:@"merge"])
        return [_bridge mergeOutput:[self tensor:@"output_a"]
                          logsumexp:[self array:@"logsumexp_a"]
                         withOutput:[self tensor:@"output_b"]
                          logsumexp:[self array:@"logsumexp_b"]
                         intoOutput:output
                          logsumexp:logsumexp
                              error:error];
    [NSException raise:NSInvalidArgumentException format:@"no call %@", call];
    return NO;
}

- (NSDictionary*)answer {
    NSError* error = nil;
    NSMutableDictionary* answer = [NSMutableDictionary dictionary];
    id<MTLCommandBuffer> commands = nil;
    if ([_description objectForKey:@"encode"]) {
        id<MTLCommandQueue> queue = [[_bridge.device newCommandQueue] autorelease];
        commands = [[_description objectForKey:@"encode"] isEqual:@"unretained"] ? [queue commandBufferWithUnretainedReferences]
                                                                                 : [queue commandBuffer];
        if ([[_description objectForKey:@"encode"] isEqual:@"committed"]) {
            [commands commit];
            [commands waitUntilCompleted];
        }
    }
    const BOOL done = [self run:&error into:commands];
    [answer setObject:@(done) forKey:@"ok"];
    [answer setObject:@(_bridge.lastError != nil) forKey:@"last_error"];
    if (error) {
        [answer setObject:error.domain forKey:@"domain"];
        [answer setObject:@(error.code) forKey:@"code"];
        [answer setObject:[error localizedDescription] forKey:@"description"];
    }
    if (commands) {
        [answer setObject:@(commands.status) forKey:@"status"];
        if (commands.status == MTLCommandBufferStatusNotEnqueued) {
            [commands commit];
            [commands waitUntilCompleted];
        }
        if (commands.error) [answer setObject:[commands.error localizedDescription] forKey:@"device_error"];
        [answer setObject:[NSString stringWithFormat:@"%.17g", commands.GPUEndTime - commands.GPUStartTime] forKey:@"seconds"];
    } else
        [answer setObject:[NSString stringWithFormat:@"%.17g", _bridge.executionTime] forKey:@"seconds"];
    NSMutableDictionary* contents = [NSMutableDictionary dictionary];
    for (NSString* name in _buffers) {
        id<MTLBuffer> buffer = [_buffers objectForKey:name];
        NSData* data = [NSData dataWithBytesNoCopy:[buffer contents] length:buffer.length freeWhenDone:NO];
        [contents setObject:[data base64EncodedStringWithOptions:0] forKey:name];
    }
    [answer setObject:contents forKey:@"buffers"];
    return answer;
}

// The addresses of the buffers, which do not hold them.
- (NSUInteger)getAddresses:(void**)addresses {
    NSUInteger count = 0;
    for (id buffer in [_buffers allValues]) addresses[count++] = buffer;
    return count;
}

@end

int main(int count, char** words) {
    NSAutoreleasePool* pool = [[NSAutoreleasePool alloc] init];
    NSString* text = count == 2 ? [NSString stringWithContentsOfFile:@(words[1]) encoding:NSUTF8StringEncoding error:NULL] : nil;
    if (!text) {
        fprintf(stderr, "usage: run_cases FILE\n");
        return 2;
    }
    NSError* error = nil;
    id<MTLDevice> device = [MTLCreateSystemDefaultDevice() autorelease];
    MFABridge* bridge = [[MFABridge alloc] initWithDevice:device error:&error];
    if (!bridge) {
        fprintf(stderr, "%s\n", [[error localizedDescription] UTF8String]);
        return 1;
    }
    NSInteger living = 0;
    for (NSString* line in [text componentsSeparatedByString:@"\n"]) {
        if ([line length] == 0) continue;
        void* addresses[64];
        NSAutoreleasePool* inner = [[NSAutoreleasePool alloc] init];
        NSDictionary* description = [NSJSONSerialization JSONObjectWithData:[line dataUsingEncoding:NSUTF8StringEncoding]
                                                                    options:0
                                                                      error:&error];
        if (!description) {
            fprintf(stderr, "a case is not JSON: %s\n", [[error localizedDescription] UTF8String]);
            return 1;
        }
        Case* made = [[Case alloc] initWithDescription:description bridge:bridge];
        NSData* json = [NSJSONSerialization dataWithJSONObject:[made answer] options:0 error:NULL];
        printf("%.*s\n", (int)[json length], (const char*)[json bytes]);
        const NSUInteger addressCount = [made getAddresses:addresses];
        if ([description objectForKey:@"leak"]) [[made tensor:@"query"] retain];
        [made release];
        [inner release];
#ifndef __APPLE__
        // What nobody holds any more is gone; the device knows what lives.
        for (NSUInteger index = 0; index < addressCount; index++) living += sm_kind(addresses[index]) != SM_KIND_NONE;
#endif
    }
    [bridge release];
    [pool release];
    fflush(stdout);
    fprintf(stderr, "%ld buffers live on\n", (long)living);
    return living == 0 ? 0 : 3;
}
