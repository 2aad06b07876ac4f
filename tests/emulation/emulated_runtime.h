// Between emulated_runtime.cpp, compiled with the CUDA toolkit's headers, and emulated_gpu.cpp, compiled without them.
#pragma once

#include <cstddef>
#include <functional>

struct dim3;

namespace cuda_emulation {

using Work = std::function<void()>;

// From a launch to the work for its stream. Throws where the launch would fail.
using MakeWork = std::function<Work(void** arguments, const dim3& grid, const dim3& block, std::size_t shared_bytes)>;

// name: the kernel's mangled name.
void add_emulated_kernel(const char* name, MakeWork make);

// The device whose memory p points into, or -1.
int device_of(const void* p);

// Before the host does the next work of a device's stream: does what the stream was given before. A stream that is
// being captured was given nothing.
void finish_before_host(int device, void* stream);

}  // namespace cuda_emulation
