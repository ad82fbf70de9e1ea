// Whether <Metal/Metal.h> for Linux behaves like the framework: objects, references, labels, buffers, handlers, errors. Prints what does not.

#import <Metal/Metal.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "softmetal.h"

static int wrong = 0;

#define CHECK(condition)                                       \
    do {                                                       \
        if (!(condition)) {                                    \
            printf("line %d: not %s\n", __LINE__, #condition); \
            wrong++;                                           \
        }                                                      \
    } while (0)

static BOOL raises(void (^block)(void)) {
    @try {
        block();
    } @catch (NSException* exception) {
        return YES;
    }
    return NO;
}

static void checkDevice(id<MTLDevice> device) {
    id<MTLDevice> again = MTLCreateSystemDefaultDevice();
    CHECK(again == device);
    [again release];
    CHECK((void*)device == (void*)sm_device_default());
    CHECK([device conformsToProtocol:NSProtocolFromString(@"MTLDevice")]);
    CHECK([device.name isEqual:@"software Metal device"]);
    CHECK(device.hasUnifiedMemory);
    CHECK([device supportsFamily:MTLGPUFamilyApple7]);
    CHECK(raises(^{ [[[(id)device class] alloc] init]; }));
}

static void checkBuffers(id<MTLDevice> device) {
    id<MTLBuffer> buffer = [device newBufferWithLength:100 options:MTLResourceStorageModeShared];
    CHECK(buffer.length == 100 && buffer.allocatedSize >= 100);
    CHECK(buffer.device == device);
    CHECK(buffer.storageMode == MTLStorageModeShared);
    CHECK([buffer conformsToProtocol:NSProtocolFromString(@"MTLBuffer")]);
    CHECK(![buffer conformsToProtocol:NSProtocolFromString(@"MTLDevice")]);
    for (int index = 0; index < 100; index++) CHECK(((char*)[buffer contents])[index] == 0);
    CHECK(buffer.label == nil);
    buffer.label = @"keys, schlüssel";
    CHECK([buffer.label isEqual:@"keys, schlüssel"]);
    buffer.label = nil;
    CHECK(buffer.label == nil);

    // In collections, which hold and release.
    @autoreleasepool {
        NSMutableArray* held = [NSMutableArray arrayWithObject:buffer];
        [buffer release];
        CHECK(sm_kind(buffer) == SM_KIND_BUFFER);
        CHECK([held containsObject:buffer] && [[NSSet setWithArray:held] containsObject:buffer]);
    }
    CHECK(sm_kind(buffer) == SM_KIND_NONE);

    id<MTLBuffer> copy = [device newBufferWithBytes:"abc" length:4 options:MTLResourceStorageModeShared];
    CHECK(strcmp([copy contents], "abc") == 0);
    [copy release];
    CHECK([device newBufferWithLength:0 options:MTLResourceStorageModeShared] == nil);

    const NSUInteger page = (NSUInteger)sysconf(_SC_PAGESIZE);
    void* memory = NULL;
    CHECK(posix_memalign(&memory, page, page) == 0);
    __block void* given = NULL;
    __block NSUInteger length = 0;
    void (^deallocator)(void*, NSUInteger) = ^(void* pointer, NSUInteger bytes) {
      given = pointer;
      length = bytes;
      free(pointer);
    };
    id<MTLBuffer> around = [device newBufferWithBytesNoCopy:memory length:page options:0 deallocator:deallocator];
    CHECK([around contents] == memory);
    [around release];
    CHECK(given == memory && length == page);
    CHECK([device newBufferWithBytesNoCopy:(char*)memory + 4 length:page options:0 deallocator:deallocator] == nil);
    CHECK(posix_memalign(&memory, page, page) == 0);
    around = [device newBufferWithBytesNoCopy:memory length:page options:0 deallocator:nil];
    [around release];
    free(memory);
}

static void checkStorageModes(id<MTLDevice> device) {
    id<MTLBuffer> buffer = [device newBufferWithLength:64 options:MTLResourceCPUCacheModeWriteCombined | MTLResourceStorageModeShared];
    CHECK(buffer.storageMode == MTLStorageModeShared && buffer.length == 64);
    [buffer release];
    // There is no memory here that the host cannot read.
    CHECK([device newBufferWithLength:64 options:MTLResourceStorageModePrivate] == nil);
    CHECK([device newBufferWithLength:64 options:MTLResourceStorageModeMemoryless] == nil);
    CHECK([device newBufferWithBytes:"abc" length:4 options:MTLResourceStorageModePrivate] == nil);
}

static void checkCommandBuffers(id<MTLDevice> device) {
    id<MTLCommandQueue> queue = [device newCommandQueue];
    CHECK(queue.device == device);
    queue.label = @"attention";
    CHECK([queue.label isEqual:@"attention"]);
    NSMutableArray* order = [[NSMutableArray alloc] init];
    void* first = NULL;
    @autoreleasepool {
        NSMutableArray* all = [NSMutableArray array];
        for (int number = 0; number < 4; number++) {
            id<MTLCommandBuffer> commands = number % 2 ? [queue commandBufferWithUnretainedReferences] : [queue commandBuffer];
            CHECK(commands.status == MTLCommandBufferStatusNotEnqueued);
            CHECK(commands.device == device && commands.error == nil && commands.GPUEndTime == 0);
            // On a thread of the device.
            const pthread_t here = pthread_self();
            [commands addCompletedHandler:^(id<MTLCommandBuffer> done) {
              @synchronized(order) {
                  [order addObject:@(number)];
              }
              CHECK(done == commands && done.status == MTLCommandBufferStatusCompleted);
              CHECK(!pthread_equal(here, pthread_self()));
              CHECK(done.GPUStartTime > 0 && done.GPUEndTime >= done.GPUStartTime);
            }];
            [all addObject:commands];
            if (number == 0) first = commands;
        }
        for (id<MTLCommandBuffer> commands in all) [commands commit];
        id<MTLCommandBuffer> last = [all lastObject];
        [last waitUntilCompleted];
        CHECK(last.status == MTLCommandBufferStatusCompleted);
        CHECK([order isEqual:([NSArray arrayWithObjects:@0, @1, @2, @3, nil])]);
        CHECK(raises(^{ [last commit]; }));
        CHECK(raises(^{ [last addCompletedHandler:^(id<MTLCommandBuffer> done) { abort(); }]; }));

        setenv("SOFTMETAL_FAULT", "execute", 1);
        id<MTLCommandBuffer> failing = [queue commandBuffer];
        [failing commit];
        [failing waitUntilCompleted];
        unsetenv("SOFTMETAL_FAULT");
        CHECK(failing.status == MTLCommandBufferStatusError);
        CHECK([failing.error.domain isEqual:MTLCommandBufferErrorDomain] && failing.error.code == MTLCommandBufferErrorInternal);
        CHECK([[failing.error localizedDescription] rangeOfString:@"the GPU gave up"].length > 0);

        // One that is never committed does not call its handlers, and forgets them.
        [[queue commandBuffer] addCompletedHandler:^(id<MTLCommandBuffer> done) { abort(); }];
    }
    // The queue's thread lets go of the last command buffers by itself.
    for (int tries = 0; tries < 1000 && sm_kind(first) != SM_KIND_NONE; tries++) usleep(1000);
    CHECK(sm_kind(first) == SM_KIND_NONE);
    [order release];
    [queue release];
}

int main(void) {
    @autoreleasepool {
        id<MTLDevice> device = [MTLCreateSystemDefaultDevice() autorelease];
        checkDevice(device);
        checkBuffers(device);
        checkStorageModes(device);
        checkCommandBuffers(device);
    }
    if (wrong == 0) printf("all as it should be\n");
    return wrong != 0;
}
