// A CUDA runtime without a GPU, to be loaded before libcudart. Device memory is host memory, a stream is a queue, and
// a launch of one of torchlars' kernels runs its source on the host. A function that is not defined here is
// libcudart's, which fails without a driver.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define RUNTIME EXPORT cudaError_t CUDARTAPI

namespace {

using fake_cuda::Kernel;
using fake_cuda::Work;

constexpr int kDevices = 2;

// Never destroyed: torch calls in after the destructors of this library.
template <typename T>
T& immortal() {
  static T* const value = new T;
  return *value;
}

std::recursive_mutex& mutex = immortal<std::recursive_mutex>();
// Deferred work may call Python while it holds the mutex: who waits for the mutex must not hold Python's lock.
std::unique_lock<std::recursive_mutex> locked() {
  static const auto has_gil = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  static const auto release_gil = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
  static const auto take_gil = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
  std::unique_lock<std::recursive_mutex> lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) {
    void* const thread = has_gil && has_gil() ? release_gil() : nullptr;
    lock.lock();
    if (thread) {
      lock.unlock();
      take_gil(thread);
      return locked();
    }
  }
  return lock;
}
#define LOCK const auto lock = locked()

[[noreturn]] void fail(const char* what, const void* where) {
  std::fprintf(stderr, "fake_cuda: %s (%p)\n", what, where);
  std::abort();
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

// --- Streams, events and captures ------------------------------------------------------------------------------------

struct Capture {
  std::vector<Work> works;
  unsigned long long id;
  bool is_valid = true;
};

// Its work waits until someone waits for it. Only a default stream works at once, unless a sleep is in it.
struct Stream {
  int device;
  bool is_default;
  std::deque<Work> queue;
  uint64_t enqueued = 0, done = 0;
  std::shared_ptr<Capture> capture;

  bool is_deferred() const { return capture || !is_default || !queue.empty(); }
};

struct Event {
  int device;
  Stream* stream = nullptr;
  uint64_t position = 0;  // in the stream
  std::weak_ptr<Capture> capture;
  bool is_captured = false;  // recorded in a capture: never done, even when the capture is over
  double milliseconds = 0;

  bool is_done() const { return stream == nullptr || stream->done >= position; }
};

std::set<Capture*>& captures = immortal<std::set<Capture*>>();  // that have not ended
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

Stream& stream_of(cudaStream_t handle, int device = current_device) {
  static Stream* const defaults[kDevices] = {new Stream{0, true}, new Stream{1, true}};
  if (handle == cudaStreamPerThread) {
    fail("per-thread default streams are not modelled", handle);
  }
  return handle == nullptr || handle == cudaStreamLegacy ? *defaults[device] : *reinterpret_cast<Stream*>(handle);
}

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

cudaError_t break_capture(Capture& capture, cudaError_t error) {
  capture.is_valid = false;
  return error;
}

// What a call that waits or allocates returns, unless the thread is in relaxed mode.
cudaError_t unsafe_in_capture() {
  if (captures.empty() || capture_mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  for (Capture* capture : captures) {
    capture->is_valid = false;
  }
  return cudaErrorStreamCaptureUnsupported;
}

void run_until(Stream& stream, uint64_t position) {
  while (stream.done < position) {
    const Work work = std::move(stream.queue.front());
    work();  // before it is removed, for who asks whether the stream is idle
    stream.queue.pop_front();
    ++stream.done;
  }
}

cudaError_t enqueue(Stream& stream, Work work, bool at_once = true) {
  if (stream.capture) {
    if (!stream.capture->is_valid) {
      return cudaErrorStreamCaptureInvalidated;
    }
    stream.capture->works.push_back(std::move(work));
    return cudaSuccess;
  }
  ++stream.enqueued;
  if (at_once && !stream.is_deferred()) {
    ++stream.done;
    work();
  } else {
    stream.queue.push_back(std::move(work));
  }
  return cudaSuccess;
}

cudaError_t synchronize(Stream& stream) {
  if (stream.capture) {
    return break_capture(*stream.capture, cudaErrorStreamCaptureUnsupported);
  }
  const cudaError_t error = unsafe_in_capture();
  if (error == cudaSuccess) {
    run_until(stream, stream.enqueued);
  }
  return error;
}

std::vector<Stream*>& created = immortal<std::vector<Stream*>>();

// --- Memory ----------------------------------------------------------------------------------------------------------

constexpr uintptr_t kArena = uintptr_t(1) << 44;  // a device's addresses, of which none is used twice
constexpr size_t kPage = 4096, kGap = 1 << 20;    // kGap: no access far outside of an allocation meets another one
constexpr size_t kAhead = 64;  // torch's fused SGD for bfloat16 on a CPU reads that far beyond the end of a tensor
constexpr size_t kTotal = size_t(16) << 30;
constexpr unsigned char kPoison = 0xff;  // NaN in every dtype

struct Allocation {
  unsigned char* pages;
  size_t mapped;
  size_t size;
  bool is_captured;  // a graph may use it again
};

std::map<uintptr_t, Allocation>& allocations = immortal<std::map<uintptr_t, Allocation>>();
std::map<uintptr_t, size_t>& pinned = immortal<std::map<uintptr_t, size_t>>();
size_t allocated = 0;

int device_of(const void* pointer) { return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / kArena) - 1; }
bool is_on_device(const void* pointer) { return 0 <= device_of(pointer) && device_of(pointer) < kDevices; }

// Whether a map from begins to sizes holds a range.
template <typename Map, typename Size>
bool holds(const Map& map, const void* pointer, size_t bytes, const Size& size_of) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  auto found = map.upper_bound(begin);
  return found != map.begin() && begin + bytes <= (--found)->first + size_of(found->second);
}
bool is_pinned(const void* pointer, size_t bytes) {
  return holds(pinned, pointer, bytes, [](size_t size) { return size; });
}
bool is_allocated(const void* pointer, size_t bytes) {
  return holds(allocations, pointer, bytes, [](const Allocation& allocation) { return allocation.size; });
}

void release(uintptr_t begin) {
  const auto found = allocations.find(begin);
  const Allocation& a = found->second;
  const auto* const data = reinterpret_cast<unsigned char*>(begin);
  const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
  if (!std::all_of(static_cast<const unsigned char*>(a.pages), data, is_poison) ||
      !std::all_of(data + a.size, static_cast<const unsigned char*>(a.pages + a.mapped), is_poison)) {
    fail("something was written beside an allocation", data);
  }
  munmap(a.pages, a.mapped);
  allocated -= a.size;
  allocations.erase(found);
}

}  // namespace

// Torch's allocator: each tensor has memory of its own, which faults or holds NaN around its ends and after its life.
EXPORT void* fake_malloc(ssize_t bytes, int device, cudaStream_t handle) {
  LOCK;
  if (bytes == 0) {
    return nullptr;
  }
  static uintptr_t next[kDevices] = {kArena, 2 * kArena};
  const size_t size = bytes, rounded = (size + 15) / 16 * 16 + kAhead;
  const size_t mapped = (rounded + kPage - 1) / kPage * kPage;
  void* const pages = mmap(reinterpret_cast<void*>(next[device]), mapped, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (pages == MAP_FAILED || allocated + size > kTotal) {
    fail("out of memory", pages);
  }
  next[device] += mapped + kGap;
  allocated += size;
  std::memset(pages, kPoison, mapped);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pages) + mapped - rounded;
  allocations[begin] = {static_cast<unsigned char*>(pages), mapped, size, stream_of(handle, device).capture != nullptr};
  return reinterpret_cast<void*>(begin);
}

EXPORT void fake_free(void* pointer, ssize_t, int device, cudaStream_t handle) {
  LOCK;
  if (pointer == nullptr) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  Stream& stream = stream_of(handle, device);
  const Allocation& allocation = allocations.at(begin);
  if (!allocation.is_captured) {
    enqueue(stream, [=] { release(begin); });
  } else if (stream.capture) {
    enqueue(stream, [pointer, size = allocation.size] { std::memset(pointer, kPoison, size); });
  }
}

RUNTIME cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  LOCK;
  if (const cudaError_t error = unsafe_in_capture()) {
    return result(error);
  }
  *pointer = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  pinned[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return cudaSuccess;
}

RUNTIME cudaFreeHost(void* pointer) {
  LOCK;
  pinned.erase(reinterpret_cast<uintptr_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

RUNTIME cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  LOCK;
  const bool on_device = is_on_device(pointer), on_host = is_pinned(pointer, 1);
  *attributes = {};
  attributes->type = on_device ? cudaMemoryTypeDevice : on_host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  attributes->device = on_device ? device_of(pointer) : 0;
  attributes->devicePointer = on_device || on_host ? const_cast<void*>(pointer) : nullptr;
  attributes->hostPointer = on_host ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}

RUNTIME cudaMemGetInfo(size_t* free, size_t* total) {
  LOCK;
  *free = kTotal - allocated;
  *total = kTotal;
  return cudaSuccess;
}

RUNTIME cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
  LOCK;
  Stream& stream = stream_of(handle);
  bool is_pageable[2];
  for (const int i : {0, 1}) {
    const void* const end = i == 0 ? to : from;
    const bool on_device =
        kind == cudaMemcpyDeviceToDevice || kind == (i == 0 ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost);
    if (kind == cudaMemcpyDefault || on_device != is_on_device(end)) {
      return result(cudaErrorInvalidMemcpyDirection);
    }
    if (on_device && (device_of(end) != stream.device || !is_allocated(end, bytes))) {
      return result(cudaErrorInvalidValue);
    }
    is_pageable[i] = !on_device && !is_pinned(end, bytes);
  }
  if (stream.capture && (is_pageable[0] || is_pageable[1])) {
    return result(break_capture(*stream.capture, cudaErrorStreamCaptureUnsupported));
  }
  if (is_pageable[1]) {  // read before the call returns
    const auto* const begin = static_cast<const unsigned char*>(from);
    const auto staged = std::make_shared<std::vector<unsigned char>>(begin, begin + bytes);
    return result(enqueue(stream, [=] { std::memcpy(to, staged->data(), bytes); }));
  }
  const cudaError_t error = enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  if (error == cudaSuccess && is_pageable[0]) {  // written before the call returns
    run_until(stream, stream.enqueued);
  }
  return result(error);
}

// --- Devices ---------------------------------------------------------------------------------------------------------

RUNTIME cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

RUNTIME cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

RUNTIME cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) {
    return result(cudaErrorInvalidDevice);
  }
  current_device = device;
  return cudaSuccess;
}

RUNTIME cudaDriverGetVersion(int* version) {
  const char* const wanted = std::getenv("FAKE_CUDA_DRIVER");
  *version = wanted ? std::atoi(wanted) : CUDART_VERSION;
  return cudaSuccess;
}

RUNTIME cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "no GPU: tests/fake_cuda");
  properties->major = 9;
  properties->totalGlobalMem = kTotal;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

// Whatever else torch asks for is not there.
RUNTIME cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}

RUNTIME cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

RUNTIME cudaDeviceSynchronize() {
  LOCK;
  cudaError_t error = synchronize(stream_of(nullptr));
  for (size_t i = 0; error == cudaSuccess && i < created.size(); ++i) {
    error = created[i]->device == current_device ? synchronize(*created[i]) : cudaSuccess;
  }
  return result(error);
}

RUNTIME cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
RUNTIME cudaPeekAtLastError() { return last_error; }

// --- Streams and events, as torch calls them -------------------------------------------------------------------------

RUNTIME cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

RUNTIME cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
  LOCK;
  if (flags != cudaStreamNonBlocking) {
    fail("streams that wait for the default stream are not modelled", handle);
  }
  created.push_back(new Stream{current_device, false});
  *handle = reinterpret_cast<cudaStream_t>(created.back());
  return cudaSuccess;
}

RUNTIME cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

RUNTIME cudaStreamQuery(cudaStream_t handle) {
  LOCK;
  const cudaError_t error = unsafe_in_capture();
  return result(error ? error : stream_of(handle).queue.empty() ? cudaSuccess : cudaErrorNotReady);
}

RUNTIME cudaStreamSynchronize(cudaStream_t handle) {
  LOCK;
  return result(synchronize(stream_of(handle)));
}

RUNTIME cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  *handle = reinterpret_cast<cudaEvent_t>(new Event{current_device});
  return cudaSuccess;
}

RUNTIME cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // a stream may still stamp it

RUNTIME cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  LOCK;
  Event& event = event_of(handle);
  Stream& stream = stream_of(stream_handle);
  if (event.device != stream.device) {
    return result(cudaErrorInvalidResourceHandle);
  }
  event.capture = stream.capture;
  event.is_captured = stream.capture != nullptr;
  if (event.is_captured) {
    return cudaSuccess;
  }
  event.stream = &stream;
  event.position = stream.enqueued + 1;
  return result(enqueue(stream, [&event] {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    event.milliseconds = std::chrono::duration<double, std::milli>(now).count();
  }));
}

RUNTIME cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

cudaError_t unsafe_to_ask(const Event& event) {
  const cudaError_t error = unsafe_in_capture();
  return error ? error : event.is_captured ? cudaErrorCapturedEvent : cudaSuccess;
}

RUNTIME cudaEventQuery(cudaEvent_t handle) {
  LOCK;
  const Event& event = event_of(handle);
  const cudaError_t error = unsafe_to_ask(event);
  return result(error ? error : event.is_done() ? cudaSuccess : cudaErrorNotReady);
}

RUNTIME cudaEventSynchronize(cudaEvent_t handle) {
  LOCK;
  const Event& event = event_of(handle);
  const cudaError_t error = unsafe_to_ask(event);
  if (error == cudaSuccess && event.stream != nullptr) {
    run_until(*event.stream, event.position);
  }
  return result(error);
}

RUNTIME cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  LOCK;
  if (event_of(start).is_captured || event_of(end).is_captured) {
    return result(cudaErrorCapturedEvent);
  }
  *milliseconds = static_cast<float>(event_of(end).milliseconds - event_of(start).milliseconds);
  return result(event_of(start).is_done() && event_of(end).is_done() ? cudaSuccess : cudaErrorNotReady);
}

RUNTIME cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  LOCK;
  Stream& stream = stream_of(handle);
  const Event& event = event_of(event_handle);
  if (const auto capture = event.capture.lock()) {
    return stream.capture == capture ? cudaSuccess : result(break_capture(*capture, cudaErrorNotSupported));
  }
  if (event.is_captured) {
    return result(cudaErrorCapturedEvent);
  }
  if (stream.capture) {
    return result(break_capture(*stream.capture, cudaErrorStreamCaptureIsolation));
  }
  if (event.stream == nullptr) {
    return cudaSuccess;
  }
  return result(enqueue(stream, [other = event.stream, position = event.position] { run_until(*other, position); }));
}

// --- Graphs ----------------------------------------------------------------------------------------------------------

RUNTIME cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

RUNTIME cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  LOCK;
  static unsigned long long id = 0;
  Stream& stream = stream_of(handle);
  if (stream.is_default || stream.capture) {
    return result(cudaErrorStreamCaptureUnsupported);
  }
  stream.capture = std::make_shared<Capture>();
  stream.capture->id = ++id;
  captures.insert(stream.capture.get());
  return cudaSuccess;
}

RUNTIME cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                 cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                 const cudaGraphEdgeData** edges, size_t* count) {
  LOCK;
  const auto& capture = stream_of(handle).capture;
  *status = !capture            ? cudaStreamCaptureStatusNone
            : capture->is_valid ? cudaStreamCaptureStatusActive
                                : cudaStreamCaptureStatusInvalidated;
  if (id && capture) {
    *id = capture->id;
  }
  const auto clear = [](auto* output) {  // nodes have no handles here
    if (output) {
      *output = {};
    }
  };
  clear(graph), clear(dependencies), clear(edges), clear(count);
  return cudaSuccess;
}

RUNTIME cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

RUNTIME cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCK;
  *graph = nullptr;
  const auto capture = stream_of(handle).capture;  // of no other stream: joining one is not supported
  if (!capture) {
    return result(cudaErrorIllegalState);
  }
  captures.erase(capture.get());
  stream_of(handle).capture = nullptr;
  if (!capture->is_valid) {
    return result(cudaErrorStreamCaptureInvalidated);
  }
  *graph = reinterpret_cast<cudaGraph_t>(new std::vector<Work>(std::move(capture->works)));
  return cudaSuccess;
}

RUNTIME cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = reinterpret_cast<std::vector<Work>*>(graph)->size();
  return result(nodes ? cudaErrorNotSupported : cudaSuccess);
}

RUNTIME cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(new std::vector<Work>(*reinterpret_cast<std::vector<Work>*>(graph)));
  return cudaSuccess;
}

RUNTIME cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  LOCK;
  const auto works = *reinterpret_cast<std::vector<Work>*>(exec);
  return result(enqueue(stream_of(handle), [works] {
    for (const Work& work : works) {
      work();
    }
  }));
}

RUNTIME cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<std::vector<Work>*>(graph);
  return cudaSuccess;
}

RUNTIME cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<std::vector<Work>*>(exec);
  return cudaSuccess;
}

// --- Launches --------------------------------------------------------------------------------------------------------

namespace {

std::map<const void*, const char*>& names = immortal<std::map<const void*, const char*>>();
std::vector<const char*>& launched = immortal<std::vector<const char*>>();

const Kernel* find_kernel(const char* name) {
  static const auto find = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&fake_malloc), &info);
    const std::string path = info.dli_fname;
    void* const library = dlopen((path.substr(0, path.rfind('/')) + "/libkernels.so").c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      fail(dlerror(), nullptr);
    }
    return reinterpret_cast<decltype(&find_host_kernel)>(dlsym(library, "find_host_kernel"));
  }();
  return find(name);
}

}  // namespace

RUNTIME cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                         cudaStream_t handle) {
  LOCK;
  Stream& stream = stream_of(handle);
  const auto found = names.find(function);
  if (found == names.end()) {
    return result(cudaErrorInvalidDeviceFunction);
  }
  const char* const name = found->second;
  if (stream.device != current_device) {
    return result(cudaErrorInvalidResourceHandle);
  }
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024) {
    return result(cudaErrorInvalidConfiguration);
  }
  if (std::strstr(name, "spin_kernel")) {  // torch.cuda._sleep
    return result(enqueue(stream, [] {}, /*at_once=*/false));
  }
  const Kernel* const kernel = find_kernel(name);
  if (kernel == nullptr || grid.y * grid.z != 1 || block.y * block.z != 1 || shared != 0) {
    std::fprintf(stderr, "fake_cuda: there is no host code for this launch of %s\n", name);
    return result(cudaErrorNoKernelImageForDevice);
  }
  int driver;
  cudaDriverGetVersion(&driver);
  if (kernel->argument_bytes > (driver < 12010 ? 4096 : 32764)) {
    return result(cudaErrorInvalidValue);
  }
  for (size_t i = 0; i < kernel->argument_sizes.size(); ++i) {
    for (size_t at = 0; at + sizeof(void*) <= kernel->argument_sizes[i]; at += sizeof(void*)) {
      const void* pointer;
      std::memcpy(&pointer, static_cast<const char*>(arguments[i]) + at, sizeof(pointer));
      if (is_on_device(pointer) && device_of(pointer) != stream.device) {
        return result(cudaErrorIllegalAddress);
      }
    }
  }
  launched.push_back(name);
  return result(enqueue(stream, kernel->bind(grid.x, block.x, arguments)));
}

// For which the kernels are compiled, as 10 * major + minor.
int architecture() {
  const char* const wanted = std::getenv("FAKE_CUDA_ARCHITECTURE");
  return wanted ? std::atoi(wanted) : 90;
}

RUNTIME cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization || architecture() < 90) {
      return result(cudaErrorNotSupported);
    }
  }
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                          config->stream);
}

RUNTIME cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  LOCK;
  *attributes = {};
  attributes->binaryVersion = attributes->ptxVersion = architecture();
  return result(names.count(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}

RUNTIME __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

RUNTIME __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                           cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                   dim3*, int*) {
  LOCK;
  names[function] = name;
}

// --- The driver, which torch only loads ------------------------------------------------------------------------------

EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}

#define UNSUPPORTED(call) \
  EXPORT int call() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
DRIVER_CALLS                         // run.py passes those without which torch's library does not load
UNSUPPORTED(fake_driver_call)

RUNTIME cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                         cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(&fake_driver_call);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- What Python asks ------------------------------------------------------------------------------------------------

EXPORT bool fake_is_deferred(int device, cudaStream_t stream) { return stream_of(stream, device).is_deferred(); }

EXPORT cudaError_t fake_enqueue(int device, cudaStream_t stream, void (*run)(size_t), size_t argument) {
  LOCK;
  return enqueue(stream_of(stream, device), [=] { run(argument); });
}

EXPORT size_t fake_launches() { return launched.size(); }
EXPORT const char* fake_launch(size_t index) { return launched[index]; }
