/* Lookups for other processors, with AVX2 and without. */
#include "native.h"

#ifdef FOR_AVX512
#define PART __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define PART
#endif
#define PARTS parts_by_32
#include "parts.h"
