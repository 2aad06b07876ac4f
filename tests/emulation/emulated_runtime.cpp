// Stands in for the CUDA runtime, so that PyTorch's CUDA build finds GPUs where there are none: what of it PyTorch and
// the extension call (of the rest, the real one's functions return errors). Preloaded before libcudart, and found as
// libcuda.so.1. A kernel runs if add_emulated_kernel has made it known.
//
// Device memory is host memory. Work that is given to a stream waits there until the stream, or an event recorded after
// it, is synchronised, queried or waited for, so that a kernel on the wrong stream comes too late.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "emulated_runtime.h"

namespace {

constexpr int kDevices = 2, kMultiprocessors = 4;
constexpr size_t kMemory = size_t{8} << 30;  // of each device

using cuda_emulation::MakeWork;
using cuda_emulation::Work;
using Clock = std::chrono::steady_clock;

using Graph = std::vector<Work>;

struct Stream {
  int device, priority = 0;
  std::deque<Work> waiting;
  uint64_t done = 0;  // works
  Graph* captured = nullptr;
  unsigned long long capture = 0;
};

struct Event {
  Stream* stream = nullptr;
  uint64_t works = 0;  // of the stream, done before it
  Clock::time_point at;
};

struct Allocation {
  size_t bytes;
  int device;
};

struct State {
  std::recursive_mutex mutex;
  std::map<const void*, std::string> names;  // of kernels, by their addresses in the host's code
  std::map<std::string, MakeWork> kernels;
  std::map<uintptr_t, Allocation> allocations;
  size_t allocated[kDevices] = {};
  Stream default_streams[kDevices];
  std::set<Stream*> streams;
  unsigned long long captures = 0;
  std::map<cudaError_t, std::string> messages;  // the last one of each

  State() {
    for (int d = 0; d < kDevices; ++d) streams.insert(&(default_streams[d] = Stream{d}));
  }
};

// Never destroyed: memory is freed after this library's destructors.
State& state() {
  static State* all = new State;
  return *all;
}
std::lock_guard<std::recursive_mutex> lock() { return std::lock_guard(state().mutex); }

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error, const std::string& text) {
  const auto locked = lock();
  std::fprintf(stderr, "emulated CUDA runtime: %s\n", text.c_str());
  state().messages[error] = text;
  return last_error = error;
}

Stream& stream_of(cudaStream_t s, int device = current_device) {
  const bool is_default = !s || s == cudaStreamLegacy || s == cudaStreamPerThread;
  return is_default ? state().default_streams[device] : *reinterpret_cast<Stream*>(s);
}

// Does the stream's first `works` works, those done already among them.
cudaError_t finish(Stream& stream, uint64_t works) {
  if (stream.captured) return fail(cudaErrorStreamCaptureUnsupported, "a stream is synchronised while it is captured");
  while (stream.done < works) {
    const Work work = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    ++stream.done;
    try {
      work();
    } catch (const std::exception& e) {
      return fail(cudaErrorLaunchFailure, e.what());
    }
  }
  return cudaSuccess;
}
cudaError_t finish(Stream& stream) { return finish(stream, stream.done + stream.waiting.size()); }

cudaError_t finish_all() {
  cudaError_t result = cudaSuccess;
  for (Stream* stream : state().streams)
    if (const cudaError_t error = finish(*stream)) result = error;
  return result;
}

cudaError_t give(cudaStream_t s, Work work) {
  const auto locked = lock();
  Stream& stream = stream_of(s);
  if (stream.device != current_device)
    return fail(cudaErrorInvalidResourceHandle, "work for a stream of device " + std::to_string(stream.device) +
                                                    " while device " + std::to_string(current_device) +
                                                    " is the current one");
  if (stream.captured)
    stream.captured->push_back(std::move(work));
  else
    stream.waiting.push_back(std::move(work));
  return cudaSuccess;
}

template <class Handle, class T>
cudaError_t set(Handle* handle, T* object) {
  *handle = reinterpret_cast<Handle>(object);
  return cudaSuccess;
}

// Not a byte more, so that AddressSanitizer would see each one too far.
void* allocate(size_t bytes) {
  void* p = nullptr;
  return posix_memalign(&p, 512, bytes) ? nullptr : p;
}

}  // namespace

namespace cuda_emulation {

void add_emulated_kernel(const char* name, MakeWork make) {
  const auto locked = lock();
  state().kernels[name] = std::move(make);
}

int device_of(const void* p) {
  const auto locked = lock();
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  auto it = state().allocations.upper_bound(at);
  if (it == state().allocations.begin()) return -1;
  --it;
  return at < it->first + it->second.bytes ? it->second.device : -1;
}

void finish_before_host(int device, void* handle) {
  const auto locked = lock();
  Stream& stream = stream_of(static_cast<cudaStream_t>(handle), device);
  if (!stream.captured) finish(stream);
}

}  // namespace cuda_emulation

extern "C" {

// ---- devices ----

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice, "no device " + std::to_string(device));
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  *p = {};
  std::strcpy(p->name, "emulated GPU");
  p->uuid.bytes[0] = static_cast<char>(1 + device);
  p->totalGlobalMem = kMemory;
  p->major = 9;
  p->warpSize = 32;
  p->multiProcessorCount = kMultiprocessors;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsPerBlock = 1024;
  p->sharedMemPerBlock = 48 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 1 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const auto locked = lock();
  return finish_all();
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// ---- kernels ----

void __cudaRegisterFunction(void** binary, const char* host, char* device, const char* name, int limit, uint3* thread,
                            uint3* block, dim3* block_size, dim3* grid_size, int* warp_size) {
  using Register = decltype(&__cudaRegisterFunction);
  static const auto real = reinterpret_cast<Register>(dlsym(RTLD_NEXT, "__cudaRegisterFunction"));
  const auto locked = lock();
  state().names[host] = name;
  real(binary, host, device, name, limit, thread, block, block_size, grid_size, warp_size);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) { return set(kernel, const_cast<void*>(host)); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t stream) {
  const auto locked = lock();
  const std::string& name = state().names[reinterpret_cast<const void*>(kernel)];
  if (name.find("spin_kernel") != std::string::npos) return cudaSuccess;  // torch.cuda._sleep
  const auto make = state().kernels.find(name);
  if (make == state().kernels.end()) return fail(cudaErrorNotSupported, "a kernel of no known source, " + name);
  try {
    return give(stream, make->second(arguments, grid, block, shared_bytes));
  } catch (const std::exception& e) {
    return fail(cudaErrorInvalidValue, e.what());
  }
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  return __cudaLaunchKernel(reinterpret_cast<cudaKernel_t>(const_cast<void*>(host)), grid, block, arguments,
                            shared_bytes, stream);
}

// ---- memory ----

cudaError_t cudaMalloc(void** p, size_t bytes) {
  const auto locked = lock();
  size_t& allocated = state().allocated[current_device];
  if (allocated + bytes > kMemory) return last_error = cudaErrorMemoryAllocation;
  if (!(*p = allocate(bytes))) return last_error = cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);  // NaN
  state().allocations[reinterpret_cast<uintptr_t>(*p)] = {bytes, current_device};
  allocated += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  const auto locked = lock();
  if (!p) return cudaSuccess;
  const auto it = state().allocations.find(reinterpret_cast<uintptr_t>(p));
  if (it == state().allocations.end()) return fail(cudaErrorInvalidValue, "cudaFree of what cudaMalloc did not give");
  const cudaError_t error = finish_all();
  state().allocated[it->second.device] -= it->second.bytes;
  state().allocations.erase(it);
  std::free(p);
  return error;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const auto locked = lock();
  *total = kMemory;
  *free = kMemory - state().allocated[current_device];
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return set(p, allocate(bytes)); }
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  const int device = cuda_emulation::device_of(p);
  *attributes = {};
  attributes->type = device < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice;
  attributes->device = device;
  attributes->devicePointer = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t s) {
  if (cuda_emulation::device_of(from) < 0) {  // the host may overwrite it at once
    const char* begin = static_cast<const char*>(from);
    return give(s, [=, copy = std::vector<char>(begin, begin + bytes)] { std::memcpy(to, copy.data(), bytes); });
  }
  return give(s, [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t s) {
  return give(s, [=] { std::memset(to, value, bytes); });
}

// ---- streams and events ----

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
  const auto locked = lock();
  return set(s, *state().streams.insert(new Stream{current_device, priority}).first);
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
  *priority = stream_of(s).priority;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  const auto locked = lock();
  return finish(stream_of(s));
}
cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaStreamSynchronize(s); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return set(e, new Event); }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return set(e, new Event); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete reinterpret_cast<Event*>(e);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  const auto locked = lock();
  Stream& stream = stream_of(s);
  *reinterpret_cast<Event*>(e) = {&stream, stream.done + stream.waiting.size(), Clock::now()};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  const auto locked = lock();
  const Event& event = *reinterpret_cast<Event*>(e);
  return event.stream ? finish(*event.stream, event.works) : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaEventSynchronize(e); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t e, unsigned) { return cudaEventSynchronize(e); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  const auto span = reinterpret_cast<Event*>(end)->at - reinterpret_cast<Event*>(begin)->at;
  *ms = std::chrono::duration<float, std::milli>(span).count();
  return cudaSuccess;
}

// ---- graphs ----

cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  const auto locked = lock();
  *status = stream_of(s).captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  const auto locked = lock();
  if (id) *id = stream_of(s).capture;
  if (graph) set(graph, stream_of(s).captured);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  const auto locked = lock();
  Stream& stream = stream_of(s);
  if (&stream == &state().default_streams[stream.device])
    return fail(cudaErrorStreamCaptureUnsupported, "a default stream cannot be captured");
  const cudaError_t error = finish(stream);
  stream.captured = new Graph;
  stream.capture = ++state().captures;
  return error;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  const auto locked = lock();
  return set(graph, std::exchange(stream_of(s).captured, nullptr));
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return set(executable, new Graph(*reinterpret_cast<Graph*>(graph)));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t s) {
  for (const Work& work : *reinterpret_cast<Graph*>(executable))
    if (const cudaError_t error = give(s, work)) return error;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

// ---- errors and the driver ----

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  const auto locked = lock();
  const auto message = state().messages.find(error);
  return message == state().messages.end() ? cudaGetErrorName(error) : message->second.c_str();
}

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_state = !std::strcmp(name, "cuDevicePrimaryCtxGetState");
  int (*const not_supported)() = [] { return 801; };
  *function = is_state ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState) : reinterpret_cast<void*>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
