// Attention of several heads in FP16 and in INT8, checked against a plain loop. Written for ARC; on Linux, which has none here, the end of the
// program gives back what it held.

#import <Metal/Metal.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#import "MFABridge.h"

enum { HEADS = 4, KV_HEADS = 2, TOKENS = 128, CHANNELS = 64 };

static id<MTLBuffer> newBuffer(id<MTLDevice> device, MFAPrecision precision, MFAShape shape) {
    return [device newBufferWithLength:[MFATensor lengthForPrecision:precision shape:shape] options:MTLResourceStorageModeShared];
}

static MFATensor* newTensor(id<MTLDevice> device, MFAPrecision precision, MFAShape shape) {
    return [[MFATensor alloc] initWithBuffer:newBuffer(device, precision, shape) precision:precision shape:shape];
}

static MFATensor* newNoise(id<MTLDevice> device, MFAShape shape) {
    MFATensor* made = newTensor(device, MFAPrecisionFP16, shape);
    _Float16* elements = [made.buffer contents];
    for (int64_t index = 0; index < shape.heads * shape.tokens * shape.channels; index++) elements[index] = (_Float16)(2 * drand48() - 1);
    return made;
}

// INT8 codes of a tensor, with a scale for each token; nil if that failed.
static MFATensor* newQuantized(MFABridge* bridge, MFATensor* tensor, NSError** error) {
    MFATensor* made = newTensor(bridge.device, MFAPrecisionINT8, tensor.shape);
    id<MTLBuffer> scales = newBuffer(bridge.device, MFAPrecisionFP32, MFAShapeMake(1, tensor.shape.heads, tensor.shape.tokens, 1));
    made.quantization = [[MFAQuantization alloc] initWithGranularity:MFAGranularityToken scales:[MFABufferView viewWithBuffer:scales]];
    return [bridge quantizeTensor:tensor into:made error:error] ? made : nil;
}

// Causal attention by its formula; query heads share key heads.
static void computePlainly(MFATensor* query, MFATensor* key, MFATensor* value, double* output) {
    const _Float16 *q = [query.buffer contents], *k = [key.buffer contents], *v = [value.buffer contents];
    for (int head = 0; head < HEADS; head++) {
        const int shared = head / (HEADS / KV_HEADS) * TOKENS * CHANNELS;
        for (int row = 0; row < TOKENS; row++, output += CHANNELS) {
            double weights[TOKENS], sum = 0;
            for (int column = 0; column <= row; column++) {
                double score = 0;
                for (int channel = 0; channel < CHANNELS; channel++)
                    score += (double)q[(head * TOKENS + row) * CHANNELS + channel] * (double)k[shared + column * CHANNELS + channel];
                sum += weights[column] = exp(score / sqrt(CHANNELS));
            }
            for (int channel = 0; channel < CHANNELS; channel++) {
                output[channel] = 0;
                for (int column = 0; column <= row; column++)
                    output[channel] += weights[column] / sum * (double)v[shared + column * CHANNELS + channel];
            }
        }
    }
}

// The relative error of the output, prints it beside the time, and says whether it is as small as it must be.
static BOOL report(const char* name, MFATensor* output, const double* expected, NSTimeInterval seconds, double bound) {
    double error = 0, size = 0;
    for (int index = 0; index < HEADS * TOKENS * CHANNELS; index++) {
        const double got = output.precision == MFAPrecisionFP16 ? (double)((_Float16*)[output.buffer contents])[index]
                                                                : (double)((float*)[output.buffer contents])[index];
        error += pow(got - expected[index], 2);
        size += pow(expected[index], 2);
    }
    printf("%s: %9.6f s, relative error %.2e\n", name, seconds, sqrt(error / size));
    return sqrt(error / size) < bound;
}

static int fail(NSError* error) {
    fprintf(stderr, "%s\n", [[error localizedDescription] UTF8String]);
    return 1;
}

int main(void) {
    @autoreleasepool {
        NSError* error = nil;
        id<MTLDevice> device = MTLCreateSystemDefaultDevice();
        MFABridge* bridge = [[MFABridge alloc] initWithDevice:device error:&error];
        if (!bridge) return fail(error);
        printf("%s, %d heads, %d tokens, %d channels\n", [device.name UTF8String], HEADS, TOKENS, CHANNELS);

        const MFAShape shape = MFAShapeMake(1, HEADS, TOKENS, CHANNELS);
        MFATensor* query = newNoise(device, shape);
        MFATensor* key = newNoise(device, MFAShapeMake(1, KV_HEADS, TOKENS, CHANNELS));
        MFATensor* value = newNoise(device, MFAShapeMake(1, KV_HEADS, TOKENS, CHANNELS));
        double* expected = malloc(HEADS * TOKENS * CHANNELS * sizeof(double));
        computePlainly(query, key, value, expected);
        MFAAttentionOptions* options = [[MFAAttentionOptions alloc] init];
        options.causal = YES;

        MFATensor* output = newTensor(device, MFAPrecisionFP16, shape);
        if (![bridge runAttentionWithQuery:query key:key value:value output:output logsumexp:nil options:options error:&error])
            return fail(error);
        BOOL isGood = report("fp16", output, expected, bridge.executionTime, 1e-3);

        // The same in a command buffer of the app's, between whatever else that does on the GPU.
        MFATensor* encoded = newTensor(device, MFAPrecisionFP16, shape);
        id<MTLCommandBuffer> commands = [[device newCommandQueue] commandBuffer];
        if (![bridge encodeAttentionWithQuery:query
                                          key:key
                                        value:value
                                       output:encoded
                                    logsumexp:nil
                                      options:options
                            intoCommandBuffer:commands
                                        error:&error])
            return fail(error);
        [commands commit];
        [commands waitUntilCompleted];
        if (commands.error) return fail(commands.error);
        isGood &= report("fp16, encoded", encoded, expected, commands.GPUEndTime - commands.GPUStartTime, 1e-3);

        MFATensor* codes[3];
        MFATensor* operands[3] = {query, key, value};
        for (int index = 0; index < 3; index++) {
            codes[index] = newQuantized(bridge, operands[index], &error);
            if (!codes[index]) return fail(error);
        }
        MFATensor* approximate = newTensor(device, MFAPrecisionFP32, shape);
        if (![bridge runAttentionWithQuery:codes[0]
                                       key:codes[1]
                                     value:codes[2]
                                    output:approximate
                                 logsumexp:nil
                                   options:options
                                     error:&error])
            return fail(error);
        isGood &= report("int8", approximate, expected, bridge.executionTime, 2e-2);
        free(expected);
        return isGood ? 0 : 1;
    }
}
