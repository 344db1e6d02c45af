/* The search for any processor. */
#define VECTOR 16
#define TARGET
#define SEARCH search_by_16
#include "search.h"
