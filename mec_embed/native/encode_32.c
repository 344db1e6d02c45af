/* The search for processors with AVX2. */
#include "encode.h"

#ifdef SEARCH_BY_32_AND_64
#define VECTOR 32
#define TARGET __attribute__((target("avx2,bmi,bmi2")))
#define SEARCH search_by_32
#include "search.h"
#endif
