// GNUstep's headers ask for this header of libobjc2 where blocks are compiled; with GCC's libobjc the functions of libBlocksRuntime serve.
#ifndef OBJC_BLOCKS_RUNTIME_H
#define OBJC_BLOCKS_RUNTIME_H

#ifdef __cplusplus
extern "C" {
#endif

void* _Block_copy(const void* block);
void _Block_release(const void* block);

#ifdef __cplusplus
}
#endif

#endif // OBJC_BLOCKS_RUNTIME_H
