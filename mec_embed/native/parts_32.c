/* Lookups for processors with AVX2. */
#define VECTOR 32
#include "native.h"

#ifdef FOR_32
#include "parts.h"
#endif
