/* The search for processors with AVX-512. */
#include "encode.h"

#ifdef SEARCH_BY_32_AND_64
#define VECTOR 64
#define TARGET __attribute__((target("avx2,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")))
#define SEARCH search_by_64
#include "search.h"
#endif
