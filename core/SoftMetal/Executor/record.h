// Dispatches in files: what one got and what it wrote, so that softmetal-replay can run it again with kernels that were compiled otherwise.
//
//   magic, then the kernel's name, grid, threadgroup, constants, lengths of threadgroup memory, and of each buffer its bytes before and after
//
// Numbers are 64 bits, in the machine's order; a text or a piece of memory is its length and its bytes.

#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unistd.h>

#include "softmetal.h"

namespace softmetal {

inline constexpr uint64_t record_magic = 0x31304d5354464f53u;

// Writes the dispatch that is made while this object lives, if SOFTMETAL_RECORD asks for it.
class Record {
  public:
    explicit Record(const sm_job& job) {
        static std::atomic<unsigned> count{0};
        const char* folder = getenv("SOFTMETAL_RECORD");
        if (!folder || !*folder) return;
        char name[64];
        snprintf(name, sizeof(name), "/%d-%06u.dispatch", static_cast<int>(getpid()), count++);
        file = fopen((folder + std::string(name)).c_str(), "wb");
        if (!file) return;
        number(record_magic);
        bytes(sm_kernel_name(job.kernel), std::char_traits<char>::length(sm_kernel_name(job.kernel)));
        for (uint32_t size : job.grid) number(size);
        for (uint32_t size : job.threadgroup) number(size);
        number(job.constant_count);
        for (uint32_t index = 0; index < job.constant_count; index++) {
            number(job.constants[index].index);
            bytes(job.constants[index].value, job.constants[index].size);
        }
        for (int slot = 0; slot < SM_BUFFER_SLOTS; slot++) number(job.threadgroup_lengths[slot]);
        buffers(job);
    }
    Record(const Record&) = delete;
    ~Record() {
        if (file) fclose(file);
    }
    // The dispatch has run.
    void finish(const sm_job& job) const {
        if (file) buffers(job);
    }

  private:
    FILE* file = nullptr;

    void number(uint64_t value) const { fwrite(&value, sizeof(value), 1, file); }
    void bytes(const void* memory, uint64_t length) const {
        number(length);
        if (length) fwrite(memory, 1, length, file);
    }
    void buffers(const sm_job& job) const {
        for (int slot = 0; slot < SM_BUFFER_SLOTS; slot++)
            bytes(job.bindings[slot].address, job.bindings[slot].address ? job.bindings[slot].length : 0);
    }
};

} // namespace softmetal
