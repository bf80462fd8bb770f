// What the compiler calls for each access to memory under -fsanitize=thread.
#include "emulator/checker.h"

using mllama::emulator::checker::access;
using mllama::emulator::checker::Kind;

#define MLLAMA_CALLER __builtin_return_address(0)
#define MLLAMA_ACCESS(bytes)                                                                      \
    void __tsan_read##bytes(void* at) { access(at, bytes, Kind::load, MLLAMA_CALLER); }           \
    void __tsan_write##bytes(void* at) { access(at, bytes, Kind::store, MLLAMA_CALLER); }         \
    void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, Kind::load, MLLAMA_CALLER); } \
    void __tsan_unaligned_write##bytes(void* at) { access(at, bytes, Kind::store, MLLAMA_CALLER); }

extern "C" {

MLLAMA_ACCESS(1)
MLLAMA_ACCESS(2)
MLLAMA_ACCESS(4)
MLLAMA_ACCESS(8)
MLLAMA_ACCESS(16)
void __tsan_read_range(void* at, unsigned long bytes) {
    access(at, bytes, Kind::load, MLLAMA_CALLER);
}
void __tsan_write_range(void* at, unsigned long bytes) {
    access(at, bytes, Kind::store, MLLAMA_CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
