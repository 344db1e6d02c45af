/* The search for processors with AVX-512. */
#define VECTOR 64
#include "native.h"

#ifdef FOR_64
#include "search.h"
#endif
