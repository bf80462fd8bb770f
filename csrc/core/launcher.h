// What an operator's CUDA entry asks of torch: the stream, and that its tensors are on one device.
// In the emulated library the same entries run for CPU tensors, and the emulator learns which
// memory kernels may touch.
#pragma once

#include "core/tensor.h"
#include "kernels/cuda/stream.h"

#if defined(MLLAMA_EMULATED)

#include <mutex>

#include "emulator/emulator.h"

#define MLLAMA_CUDA_KEY CPU  // registered over the CPU kernels

namespace mllama {

class Launcher {
  public:
    Launcher(const char*, const Tensor&) : lock_(mutex_) {}
    ~Launcher() { emulator::forget_tensors(); }
    Launcher(const Launcher&) = delete;
    Launcher& operator=(const Launcher&) = delete;

    void reads(const char* name, const Tensor& t) { allow(name, t, emulator::Use::read); }
    void writes(const char* name, const Tensor& t) { allow(name, t, emulator::Use::write); }
    void updates(const char* name, const Tensor& t) { allow(name, t, emulator::Use::update); }
    void scratch(const char* name, const Tensor& t) { allow(name, t, emulator::Use::scratch); }
    cuda::Stream stream() const { return nullptr; }
    // All kernels have been launched.
    void done() const { emulator::check_written(); }

  private:
    static void allow(const char* name, const Tensor& t, emulator::Use use) {
        int64_t last = 0;
        for (int64_t d = 0; d < t.dim(); ++d) {
            if (t.size(d) == 0) return;
            last += (t.size(d) - 1) * t.stride(d);
        }
        emulator::allow_tensor(t.const_data_ptr(), (last + 1) * t.element_size(), use, name);
    }

    static inline std::mutex mutex_;  // there is one emulator
    std::lock_guard<std::mutex> lock_;
};

}  // namespace mllama

#else

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#define MLLAMA_CUDA_KEY CUDA

// Only CUDA builds of torch have it, and the module is imported under others too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace mllama {

class Launcher {
  public:
    Launcher(const char* op, const Tensor& first)
        : op_(op), device_(first.get_device_index()), guard_(device_) {
        check(aoti_torch_get_current_cuda_stream != nullptr, op, "torch: it has no CUDA");
        void* stream = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
        stream_ = static_cast<cuda::Stream>(stream);
    }

    void reads(const char* name, const Tensor& t) const {
        check(t.is_cuda() && t.get_device_index() == device_, op_, name);
    }
    void writes(const char* name, const Tensor& t) const { reads(name, t); }
    void updates(const char* name, const Tensor& t) const { reads(name, t); }
    // New memory. Kernels may leave parts of it unwritten.
    void scratch(const char*, const Tensor&) const {}
    cuda::Stream stream() const { return stream_; }
    // All kernels have been launched.
    void done() const {
        cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess)
            throw std::runtime_error(std::string(op_) + ": " + cudaGetErrorString(error));
    }

  private:
    const char* op_;
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
    cuda::Stream stream_;
};

}  // namespace mllama

#endif
