/* A CUDA without a GPU: runtime, driver and cuBLAS whose kernels do nothing. Torch's build for CUDA runs
 * with it on any machine, takes the paths that a GPU takes and compiles for an H100. Tensors hold
 * garbage; what the host does is real: what it calls, allocates, compiles, refuses and waits for.
 *
 * tests/no_cuda.sh builds and uses it. A function that a newer torch calls and this file lacks shows as
 * "API call is not supported in the installed CUDA driver" or "undefined symbol": add it.
 */
#include <driver_types.h>
#include <stdlib.h>
#include <string.h>

#define DOES_NOTHING(name) int name() { return 0; }
#define SETS(name, type, value) int name(type *it) { *it = (type)(value); return 0; }
#define SETS_SECOND(name, type, value) int name(void *a, type *it) { *it = (type)(value); return 0; }
#define HANDLE ((void *)64)

/* One device */
SETS(cudaGetDeviceCount, int, 1)
SETS(cudaGetDevice, int, 0)
SETS(cudaDriverGetVersion, int, 13000)
SETS(cudaRuntimeGetVersion, int, 13000)
SETS(cudaGetDeviceFlags, unsigned, 0)
SETS(cuDeviceGet, int, 0)
SETS(cuDeviceGetCount, int, 1)
SETS(cuDriverGetVersion, int, 13000)
SETS(cuCtxGetCurrent, void *, HANDLE)
SETS(cuDevicePrimaryCtxRetain, void *, HANDLE)
SETS_SECOND(cuStreamGetCtx, void *, HANDLE)
SETS_SECOND(cuGetErrorString, const char *, "none")
SETS_SECOND(cuGetErrorName, const char *, "none")
DOES_NOTHING(cuInit)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cudaSetDevice)
DOES_NOTHING(cudaGetLastError)
DOES_NOTHING(cudaPeekAtLastError)
DOES_NOTHING(cudaDeviceSynchronize)
DOES_NOTHING(cudaProfilerStart)
DOES_NOTHING(cudaProfilerStop)

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->major = 9;
    p->multiProcessorCount = 132;
    p->totalGlobalMem = 80ull << 30;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 50 << 20;
    return 0;
}

static int attribute(int *value, int which) { /* runtime and driver number them alike */
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: *value = 0;
    }
    return 0;
}
int cudaDeviceGetAttribute(int *value, int which, int device) { return attribute(value, which); }
int cuDeviceGetAttribute(int *value, int which, int device) { return attribute(value, which); }

/* Memory: the host's, never touched if it is large, so that a model larger than it can be built */
#define LARGE (32 << 20)
int cudaMemGetInfo(size_t *free, size_t *total) { *free = 79ull << 30; *total = 80ull << 30; return 0; }
int cudaMalloc(void **at, size_t size) { *at = aligned_alloc(512, (size + 511) / 512 * 512); return 0; }
int cudaHostAlloc(void **at, size_t size, unsigned flags) { return cudaMalloc(at, size); }
int cudaMemcpy(void *to, const void *from, size_t size) { if (size < LARGE) memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { return cudaMemcpy(to, from, size); }
int cudaMemset(void *at, int value, size_t size) { if (size < LARGE) memset(at, value, size); return 0; }
int cudaMemsetAsync(void *at, int value, size_t size) { return cudaMemset(at, value, size); }
int cudaHostGetDevicePointer(void **to, void *from, unsigned flags) { *to = from; return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) { memset(a, 0, sizeof *a); return 0; }
int cuPointerGetAttribute(void **to, int which, void *from) { *to = from; return 0; }
DOES_NOTHING(cudaFree)
DOES_NOTHING(cudaFreeHost)
DOES_NOTHING(cudaHostRegister)
DOES_NOTHING(cudaHostUnregister)
DOES_NOTHING(cudaMemcpy2DAsync)

/* Streams and events: all is done at once, unless NO_CUDA_STUCK is set */
static size_t handles = 64;
static int create(void **it) { *it = (void *)(handles += 64); return 0; }
int cudaStreamCreateWithPriority(void **stream) { return create(stream); }
int cudaEventCreateWithFlags(void **event) { return create(event); }
int cudaEventQuery(void *event) { return getenv("NO_CUDA_STUCK") ? cudaErrorNotReady : 0; }
int cudaStreamGetId(void *stream, unsigned long long *id) { *id = (size_t)stream; return 0; }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }
int cudaEventElapsedTime_v2(float *milliseconds) { *milliseconds = 1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
SETS_SECOND(cudaStreamGetPriority, int, 0)
DOES_NOTHING(cudaStreamDestroy)
DOES_NOTHING(cudaStreamSynchronize)
DOES_NOTHING(cudaStreamQuery)
DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventRecordWithFlags)
DOES_NOTHING(cudaEventSynchronize)
DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode)

/* Graphs */
static int capturing;
int cudaStreamBeginCapture() { capturing = 1; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = HANDLE; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph,
                             void *nodes, void *edges, size_t *count) {
    *status = capturing;
    if (id) *id = 1;
    if (graph) *graph = HANDLE;
    if (count) *count = 0;
    return 0;
}
int cudaGraphGetNodes(void *graph, void *nodes, size_t *count) { *count = 1; return 0; }
SETS(cudaGraphInstantiate, void *, HANDLE)
SETS(cudaGraphInstantiateWithFlags, void *, HANDLE)
DOES_NOTHING(cudaGraphLaunch)
DOES_NOTHING(cudaGraphDestroy)
DOES_NOTHING(cudaGraphExecDestroy)

/* Kernels */
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->ptxVersion = a->binaryVersion = 90;
    return 0;
}
int cuFuncGetAttribute(int *value, int which) { *value = which ? 0 : 1024; return 0; }
SETS(cudaOccupancyMaxActiveBlocksPerMultiprocessor, int, 2)
SETS(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int, 2)
SETS(cudaOccupancyMaxActiveClusters, int, 16)
SETS(cuOccupancyMaxActiveClusters, int, 1)
SETS(cuOccupancyMaxActiveBlocksPerMultiprocessor, int, 2)
SETS(cuModuleLoad, void *, HANDLE)
SETS(cuModuleLoadData, void *, HANDLE)
SETS(cuModuleLoadDataEx, void *, HANDLE)
SETS(cuModuleGetFunction, void *, HANDLE)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuLaunchKernel)
DOES_NOTHING(cuLaunchKernelEx)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cudaFuncSetAttribute)
DOES_NOTHING(cudaFuncSetCacheConfig)
DOES_NOTHING(cudaLaunchKernel)
DOES_NOTHING(cudaLaunchKernelExC)

/* cuBLAS */
SETS(cublasCreate_v2, void *, HANDLE)
SETS_SECOND(cublasGetStream_v2, void *, NULL)
SETS_SECOND(cublasGetMathMode, int, 0)
SETS_SECOND(cublasGetPointerMode_v2, int, 0)
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasGemmEx)
DOES_NOTHING(cublasSgemm_v2)
DOES_NOTHING(cublasGemmStridedBatchedEx)
DOES_NOTHING(cublasSgemmStridedBatched)
DOES_NOTHING(cublasSgemv_v2)
DOES_NOTHING(cublasSdot_v2)
