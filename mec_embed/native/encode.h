/* What the search of encode.c and its variants for kinds of processors (search.h) share. */
#ifndef MEC_EMBED_ENCODE_H
#define MEC_EMBED_ENCODE_H

#include "native.h"

#define LANES 16
#define MOST_BEAM (2 * LANES)
#define PARENT_BITS 5 /* of the number of a sum */
#define WORDS 8       /* codewords of a sum that are copied at once */

typedef struct {
    const float *alone; /* (rows, books, size) */
    const float *norms; /* (rows): ||x||^2 */
    const float *gram;  /* of every codebook but the first, (words of those before it, width) */
    int64_t books, size, beam;
    int64_t width;         /* size, up to whole lanes; gram is zero there */
    int bits;              /* that tell which LANES codewords of a codebook */
    int64_t stride, block; /* codewords kept of a sum, a multiple of WORDS; rows at once */
    int64_t *codes;        /* (rows, books) */
} Search;

/* Search for the rows begin..end, with vectors of so many bytes; 0, or 1 where memory is short. */
int64_t search_by_16(const void *search, int64_t begin, int64_t end);
#ifdef FOR_32
int64_t search_by_32(const void *search, int64_t begin, int64_t end);
int64_t search_by_64(const void *search, int64_t begin, int64_t end);
#endif

#endif
