// A CUDA runtime without a GPU: memory is address space, kernels and library calls do nothing and succeed.
//
// Preloaded in front of libcudart, cuBLAS, cuDNN and NCCL, it lets a CUDA build of PyTorch walk a program's GPU
// path on any machine. Dispatch, autograd, streams, device checks and the caching allocator are the real ones;
// every number a kernel would compute reads as zero. The functions here say something about the device or manage
// its memory; tools/null_cuda/run.py adds a successful stub for every other symbol that PyTorch asks for.
//
// NULL_CUDA_DEVICES: GPUs of the machine (1). NULL_CUDA_GIB: memory of each (80); beyond it cudaMalloc fails.
// NULL_CUDA_CAPABILITY: their compute capability (9), 8 to 10; all else is an H100's.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace {

// Whether someone computes on the device's memory (run.py --compute): then copies are real.
const bool kComputes = std::getenv("NULL_CUDA_MESSAGES");
constexpr size_t kCopied = 1 << 20;  // without, a larger copy would only fill real memory

std::mutex mutex;
std::unordered_map<void*, size_t> device_memory, host_memory;
size_t in_use = 0;
thread_local int current_device = 0;

double from_environment(const char* name, double otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atof(value) : otherwise;
}

size_t capacity() { return static_cast<size_t>(from_environment("NULL_CUDA_GIB", 80) * (1ull << 30)); }

cudaError_t reserve(std::unordered_map<void*, size_t>& memory, void** at, size_t size) {
  *at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*at == MAP_FAILED) return cudaErrorMemoryAllocation;
  memory[*at] = size;
  return cudaSuccess;
}

size_t release(std::unordered_map<void*, size_t>& memory, void* at) {
  auto found = memory.find(at);
  if (found == memory.end()) return 0;
  size_t size = found->second;
  munmap(at, size);
  memory.erase(found);
  return size;
}

bool inside(const std::unordered_map<void*, size_t>& memory, const void* at) {
  for (auto& [start, size] : memory)
    if (at >= start && at < static_cast<char*>(start) + size) return true;
  return false;
}

void describe_device(cudaDeviceProp* device) {
  std::memset(device, 0, sizeof *device);
  device->major = static_cast<int>(from_environment("NULL_CUDA_CAPABILITY", 9));
  std::strcpy(device->name, device->major == 8 ? "NVIDIA A100 (null)" : device->major == 9 ? "NVIDIA H100 (null)" : "NVIDIA B200 (null)");
  device->totalGlobalMem = capacity();
  device->multiProcessorCount = 132;
  device->warpSize = 32;
  device->maxThreadsPerBlock = 1024;
  device->maxThreadsPerMultiProcessor = 2048;
  device->maxBlocksPerMultiProcessor = 32;
  device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024;
  device->maxThreadsDim[2] = 64;
  device->maxGridSize[0] = 2147483647;
  device->maxGridSize[1] = device->maxGridSize[2] = 65535;
  device->sharedMemPerBlock = 49152;
  device->sharedMemPerBlockOptin = 232448;
  device->sharedMemPerMultiprocessor = 233472;
  device->regsPerBlock = device->regsPerMultiprocessor = 65536;
  device->l2CacheSize = 50 << 20;
  device->unifiedAddressing = 1;
}

int attribute_of_device(int attribute) {
  cudaDeviceProp device;
  describe_device(&device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return device.major;
    case cudaDevAttrMultiProcessorCount: return device.multiProcessorCount;
    case cudaDevAttrMaxSharedMemoryPerBlock: return device.sharedMemPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return device.sharedMemPerBlockOptin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return device.sharedMemPerMultiprocessor;
    case cudaDevAttrMaxThreadsPerBlock: return device.maxThreadsPerBlock;
    case cudaDevAttrMaxRegistersPerBlock: return device.regsPerBlock;
    case cudaDevAttrMaxGridDimX: return device.maxGridSize[0];
    case cudaDevAttrL2CacheSize: return device.l2CacheSize;
    case cudaDevAttrWarpSize: return device.warpSize;
    default: return 0;
  }
}

template <typename Handle>
cudaError_t new_handle(Handle* handle) {
  static char* next = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  *handle = reinterpret_cast<Handle>(next += 16);
  return cudaSuccess;
}

cudaError_t launch(const void* kernel) {
  if (!kComputes) return cudaSuccess;
  Dl_info from;
  const char* library = dladdr(kernel, &from) ? from.dli_fname : "a library";
  throw std::runtime_error(std::string("null_cuda: nothing does the work of a kernel of ") + library);
}

int success() { return 0; }

int primary_context(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

}  // namespace

extern "C" {

// --- devices

cudaError_t cudaGetDeviceCount(int* count) {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  const bool hidden = visible != nullptr && *visible == '\0';
  *count = hidden ? 0 : static_cast<int>(from_environment("NULL_CUDA_DEVICES", 1));
  return hidden ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
  describe_device(device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute_of_device(attribute);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int, int) {
  std::strcpy(id, "0000:00:00.0");
  return cudaSuccess;
}

// --- memory

cudaError_t cudaMalloc(void** at, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  if (in_use + size > capacity()) return cudaErrorMemoryAllocation;
  cudaError_t result = reserve(device_memory, at, size);
  if (result == cudaSuccess) in_use += size;
  return result;
}
cudaError_t cudaFree(void* at) {
  std::lock_guard<std::mutex> lock(mutex);
  in_use -= release(device_memory, at);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** at, size_t size, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  return reserve(host_memory, at, size);
}
cudaError_t cudaFreeHost(void* at) {
  std::lock_guard<std::mutex> lock(mutex);
  release(host_memory, at);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = capacity();
  *available = *total - in_use;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  std::lock_guard<std::mutex> lock(mutex);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->device = current_device;
  attributes->type = inside(device_memory, at) ? cudaMemoryTypeDevice
                     : inside(host_memory, at) ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(at);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (size > kCopied && !kComputes) return cudaSuccess;
  if (kind == cudaMemcpyDeviceToHost && !kComputes)
    std::memset(to, 0, size);  // what no kernel has computed
  else
    std::memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemset(void* at, int value, size_t size) {
  if (kComputes) std::memset(at, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t) { return cudaMemset(at, value, size); }

// --- streams, events, kernels

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return new_handle(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_handle(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = 232448;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

// --- kernels: they do nothing, which is an error where others do their work and this one was left out

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(reinterpret_cast<void*>(kernel));
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launch(kernel); }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  bool context = !std::strcmp(name, "cuDevicePrimaryCtxGetState");
  *function = context ? reinterpret_cast<void*>(primary_context) : reinterpret_cast<void*>(success);
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- libraries: what they return through a pointer

int cublasCreate_v2(void** handle) { return new_handle(handle); }
int cublasLtCreate(void** handle) { return new_handle(handle); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  *found = 1;
  return 0;
}

}  // extern "C"
