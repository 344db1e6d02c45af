/* The search for any processor. */
#define VECTOR 16
#include "search.h"
