/* The driver's library, which vLLM's libraries are linked with. `make cuda-env` compiles it; every function answers that
   there is no device. */
#define CUDA_ERROR_NO_DEVICE 100
#define ANSWER(name) int name(void) { return CUDA_ERROR_NO_DEVICE; }

ANSWER(cuCtxGetCurrent)
ANSWER(cuCtxSetCurrent)
ANSWER(cuDeviceGetAttribute)
ANSWER(cuDevicePrimaryCtxRetain)
ANSWER(cuGetErrorString)
ANSWER(cuGetProcAddress_v2)
ANSWER(cuMemAddressFree)
ANSWER(cuMemAddressReserve)
ANSWER(cuMemCreate)
ANSWER(cuMemGetAllocationGranularity)
ANSWER(cuMemMap)
ANSWER(cuMemRelease)
ANSWER(cuMemSetAccess)
ANSWER(cuMemUnmap)
ANSWER(cuPointerGetAttribute)
ANSWER(cuTensorMapEncodeTiled)
