// softmetal-replay FILE...   Runs recorded dispatches again and compares what they write with what was written then.
//
// It links the kernels statically, so that they can be compiled with a sanitizer, or from a changed source. Exits with 1 if a dispatch fails
// or writes something else, and says which.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "executor_internal.h"
#include "record.h"

namespace {

class Reader {
  public:
    explicit Reader(const char* path) : path(path), file(fopen(path, "rb")) {
        if (!file) fail("cannot be opened");
    }
    ~Reader() { fclose(file); }
    uint64_t number() {
        uint64_t value = 0;
        if (fread(&value, sizeof(value), 1, file) != 1) fail("is cut off");
        return value;
    }
    // Memory of its own and of exactly its length, so that AddressSanitizer sees an access beyond it.
    std::unique_ptr<char[]> bytes(uint64_t* length) {
        *length = number();
        std::unique_ptr<char[]> memory(*length ? new char[*length] : nullptr);
        if (*length && fread(memory.get(), 1, *length, file) != *length) fail("is cut off");
        return memory;
    }

  private:
    const char* path;
    FILE* file;
    [[noreturn]] void fail(const char* why) {
        fprintf(stderr, "softmetal-replay: %s %s\n", path, why);
        exit(2);
    }
};

const sm_kernel* find(const std::string& name) {
    for (const sm_library* library : sm_libraries())
        for (uint32_t index = 0; index < library->kernel_count; index++)
            if (name == library->kernels[index].name) return &library->kernels[index];
    return nullptr;
}

// True if the dispatch of a file does again what it did.
bool replay(const char* path) {
    Reader reader(path);
    if (reader.number() != softmetal::record_magic) {
        fprintf(stderr, "softmetal-replay: %s is not a recorded dispatch\n", path);
        return false;
    }
    uint64_t length = 0;
    const std::unique_ptr<char[]> name_bytes = reader.bytes(&length);
    const std::string name(name_bytes.get(), length);
    sm_job job{};
    job.kernel = find(name);
    if (!job.kernel) {
        fprintf(stderr, "softmetal-replay: %s: there is no kernel '%s'\n", path, name.c_str());
        return false;
    }
    for (uint32_t& size : job.grid) size = static_cast<uint32_t>(reader.number());
    for (uint32_t& size : job.threadgroup) size = static_cast<uint32_t>(reader.number());
    std::vector<sm_constant> constants(reader.number());
    std::vector<std::unique_ptr<char[]>> values;
    for (sm_constant& constant : constants) {
        constant.index = static_cast<uint32_t>(reader.number());
        values.push_back(reader.bytes(&length));
        constant.size = static_cast<uint32_t>(length);
        constant.value = values.back().get();
    }
    job.constants = constants.data();
    job.constant_count = static_cast<uint32_t>(constants.size());
    uint32_t lengths[SM_BUFFER_SLOTS];
    for (uint32_t& bytes : lengths) bytes = static_cast<uint32_t>(reader.number());
    job.threadgroup_lengths = lengths;
    std::unique_ptr<char[]> memory[SM_BUFFER_SLOTS];
    sm_binding buffers[SM_BUFFER_SLOTS];
    for (int slot = 0; slot < SM_BUFFER_SLOTS; slot++) {
        memory[slot] = reader.bytes(&length);
        buffers[slot] = {memory[slot].get(), length};
    }
    job.bindings = buffers;
    char message[4096];
    if (sm_run(&job, message, sizeof(message)) != 0) {
        fprintf(stderr, "softmetal-replay: %s: %s\n", path, message);
        return false;
    }
    for (int slot = 0; slot < SM_BUFFER_SLOTS; slot++) {
        const std::unique_ptr<char[]> expected = reader.bytes(&length);
        if (length != buffers[slot].length || (length && memcmp(expected.get(), memory[slot].get(), length) != 0)) {
            fprintf(stderr, "softmetal-replay: %s: kernel '%s' wrote something else to buffer %d\n", path, name.c_str(), slot);
            return false;
        }
    }
    return true;
}

} // namespace

int main(int count, char** paths) {
    bool same = true;
    for (int index = 1; index < count; index++) same = replay(paths[index]) && same;
    return same ? 0 : 1;
}
