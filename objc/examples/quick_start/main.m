// The shortest program: attention of one head on buffers of Metal.

#import <Metal/Metal.h>

#include <stdio.h>
#include <stdlib.h>

#import "MFABridge.h"

int main(void) {
    @autoreleasepool {
        const NSUInteger seqLength = 128, headDim = 64, length = seqLength * headDim * sizeof(float);
        id<MTLDevice> device = MTLCreateSystemDefaultDevice();
        id<MTLBuffer> q = [device newBufferWithLength:length options:MTLResourceStorageModeShared];
        id<MTLBuffer> k = [device newBufferWithLength:length options:MTLResourceStorageModeShared];
        id<MTLBuffer> v = [device newBufferWithLength:length options:MTLResourceStorageModeShared];
        id<MTLBuffer> output = [device newBufferWithLength:length options:MTLResourceStorageModeShared];
        for (NSUInteger index = 0; index < seqLength * headDim; index++) {
            ((float*)[q contents])[index] = (float)drand48() - 0.5f;
            ((float*)[k contents])[index] = (float)drand48() - 0.5f;
            ((float*)[v contents])[index] = (float)drand48() - 0.5f;
        }

        MFABridge* bridge = [[MFABridge alloc] initWithDevice:device];
        NSTimeInterval seconds = [bridge runAttentionWithQ:q K:k V:v O:output seqLength:seqLength headDim:headDim scale:0.125f causal:YES];
        if (seconds < 0) {
            fprintf(stderr, "%s\n", [[bridge.lastError localizedDescription] UTF8String]);
            return 1;
        }
        printf("%s: %.6f s\n", [device.name UTF8String], seconds);
    }
    return 0;
}
