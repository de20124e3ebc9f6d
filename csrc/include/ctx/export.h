// Symbol visibility of libctx. Everything that is not marked CTX_API stays inside the library.
#pragma once

#if defined(_WIN32)
#if defined(CTX_BUILDING)
#define CTX_API __declspec(dllexport)
#else
#define CTX_API __declspec(dllimport)
#endif
#else
#define CTX_API __attribute__((visibility("default")))
#endif

// Index arithmetic is compiled for the host and for the device.
#if defined(__CUDACC__)
#define CTX_HOST_DEVICE __host__ __device__
#else
#define CTX_HOST_DEVICE
#endif
