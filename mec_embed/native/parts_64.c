/* Lookups for processors with AVX-512: lines of the cache are one vector. */
#include "native.h"

#ifdef FOR_AVX512
#define WHOLE_LINES
#define PART __attribute__((target("avx2,bmi,bmi2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#define PARTS parts_by_64
#include "parts.h"
#endif
