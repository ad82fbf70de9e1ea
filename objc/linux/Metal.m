// The objects of Metal over those of libsoftmetal, without anything between: an object of libsoftmetal begins with a word for its class, so
// that a pointer to it is one of Objective-C. Without ARC, which GCC's run-time library does not have.

#import <Metal/Metal.h>

#include <Block.h>

#include "softmetal.h"

NSErrorDomain const MTLCommandBufferErrorDomain = @"MTLCommandBufferErrorDomain";

static id borrowed(void* object) {
    return [[(id)object retain] autorelease];
}

static NSString* text(const char* words) {
    return words ? [NSString stringWithUTF8String:words] : nil;
}

// What all have in common: references are libsoftmetal's to count, and nothing of NSObject's own lies before an object.
@interface SoftMetalObject : NSObject
@property (copy, atomic) NSString* label;
@end

@implementation SoftMetalObject
+ (id)allocWithZone:(NSZone*)zone {
    [NSException raise:NSInvalidArgumentException format:@"objects of Metal are made by a device, not by alloc"];
    return nil;
}

- (id)retain {
    return sm_retain(self);
}

- (oneway void)release {
    sm_release(self);
}

- (NSUInteger)retainCount {
    return NSUIntegerMax;
}

- (NSZone*)zone {
    return NSDefaultMallocZone();
}

- (NSString*)label {
    return text(sm_label(self));
}

- (void)setLabel:(NSString*)label {
    sm_set_label(self, [label UTF8String]);
}
@end

@interface SoftMetalBuffer : SoftMetalObject <MTLBuffer>
@end

@implementation SoftMetalBuffer
+ (void)load {
    sm_set_class(SM_KIND_BUFFER, self);
}

- (id<MTLDevice>)device {
    return borrowed(sm_buffer_device((sm_buffer*)self));
}

- (MTLStorageMode)storageMode {
    return MTLStorageModeShared;
}

- (NSUInteger)length {
    return sm_buffer_length((sm_buffer*)self);
}

- (NSUInteger)allocatedSize {
    return sm_buffer_length((sm_buffer*)self);
}

- (void*)contents {
    return sm_buffer_contents((sm_buffer*)self);
}
@end

@interface SoftMetalCommandBuffer : SoftMetalObject <MTLCommandBuffer>
@end

static void call_handler(void* state, sm_command_buffer* commands) {
    MTLCommandBufferHandler block = state;
    @autoreleasepool {
        block((id<MTLCommandBuffer>)commands);
    }
    Block_release(block);
}

@implementation SoftMetalCommandBuffer
+ (void)load {
    sm_set_class(SM_KIND_COMMAND_BUFFER, self);
}

- (id<MTLDevice>)device {
    return borrowed(sm_command_buffer_device((sm_command_buffer*)self));
}

- (MTLCommandBufferStatus)status {
    return (MTLCommandBufferStatus)sm_command_buffer_status((sm_command_buffer*)self);
}

- (NSError*)error {
    NSString* words = text(sm_command_buffer_error((sm_command_buffer*)self));
    if (!words) return nil;
    return [NSError errorWithDomain:MTLCommandBufferErrorDomain
                               code:MTLCommandBufferErrorInternal
                           userInfo:@{NSLocalizedDescriptionKey : words}];
}

- (CFTimeInterval)GPUStartTime {
    return sm_command_buffer_gpu_start_time((sm_command_buffer*)self);
}

- (CFTimeInterval)GPUEndTime {
    return sm_command_buffer_gpu_end_time((sm_command_buffer*)self);
}

// Metal's validation ends a program that does one of these; an exception that nobody catches does too.
- (void)addCompletedHandler:(MTLCommandBufferHandler)block {
    MTLCommandBufferHandler held = Block_copy(block);
    if (sm_command_buffer_add_completed_handler((sm_command_buffer*)self, call_handler, held) == 0) return;
    Block_release(held);
    [NSException raise:NSInternalInconsistencyException format:@"a handler is added before the command buffer is committed"];
}

- (void)commit {
    if (sm_command_buffer_commit((sm_command_buffer*)self) == 0) return;
    [NSException raise:NSInternalInconsistencyException format:@"a command buffer is committed once"];
}

- (void)waitUntilCompleted {
    sm_command_buffer_wait_until_completed((sm_command_buffer*)self);
}
@end

@interface SoftMetalCommandQueue : SoftMetalObject <MTLCommandQueue>
@end

@implementation SoftMetalCommandQueue
+ (void)load {
    sm_set_class(SM_KIND_COMMAND_QUEUE, self);
}

- (id<MTLDevice>)device {
    return borrowed(sm_command_queue_device((sm_command_queue*)self));
}

- (id<MTLCommandBuffer>)commandBuffer {
    return [(id)sm_command_queue_new_command_buffer((sm_command_queue*)self, 1) autorelease];
}

- (id<MTLCommandBuffer>)commandBufferWithUnretainedReferences {
    return [(id)sm_command_queue_new_command_buffer((sm_command_queue*)self, 0) autorelease];
}
@end

@interface SoftMetalDevice : SoftMetalObject <MTLDevice>
@end

// The only memory of this device is the host's.
static BOOL is_shared(MTLResourceOptions options) {
    return (options >> 4 & 15) == MTLStorageModeShared;
}

typedef void (^Deallocator)(void* pointer, NSUInteger length);

static void call_deallocator(void* state, void* memory, uint64_t length) {
    Deallocator block = state;
    block(memory, length);
    Block_release(block);
}

@implementation SoftMetalDevice
+ (void)load {
    sm_set_class(SM_KIND_DEVICE, self);
}

- (NSString*)name {
    return text(sm_device_name((sm_device*)self));
}

- (uint64_t)registryID {
    return (uint64_t)(uintptr_t)self;
}

- (BOOL)hasUnifiedMemory {
    return YES;
}

- (BOOL)supportsFamily:(MTLGPUFamily)gpuFamily {
    return sm_device_supports_family((sm_device*)self, (int32_t)gpuFamily) != 0;
}

- (id<MTLCommandQueue>)newCommandQueue {
    return (id)sm_device_new_command_queue((sm_device*)self);
}

- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
    return is_shared(options) ? (id)sm_device_new_buffer((sm_device*)self, length) : nil;
}

- (id<MTLBuffer>)newBufferWithBytes:(const void*)pointer length:(NSUInteger)length options:(MTLResourceOptions)options {
    sm_buffer* made = is_shared(options) ? sm_device_new_buffer((sm_device*)self, length) : NULL;
    if (made) memcpy(sm_buffer_contents(made), pointer, length);
    return (id)made;
}

- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(Deallocator)deallocator {
    if (!is_shared(options)) return nil;
    Deallocator held = deallocator ? Block_copy(deallocator) : NULL;
    sm_buffer* made = sm_device_new_buffer_no_copy((sm_device*)self, pointer, length, held ? call_deallocator : NULL, held);
    if (!made && held) Block_release(held);
    return (id)made;
}
@end

id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
    return [(id)sm_device_default() retain];
}
