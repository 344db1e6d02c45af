/* Lookups for any processor. */
#define VECTOR 16
#include "parts.h"
