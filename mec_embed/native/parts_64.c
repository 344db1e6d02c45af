/* Lookups for processors with AVX-512. */
#include "native.h"

#ifdef FOR_AVX512
#define WHOLE_LINES
#define PART __attribute__((target("arch=x86-64-v4")))
#define PARTS parts_by_64
#include "parts.h"
#endif
