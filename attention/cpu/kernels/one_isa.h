/* Everything for one instruction set: see vectors.h for what must be defined. */
#include "vectors.h"
#include "products.h"
#include "rows.h"
#include "task.h"
#include "lay.h"
#include "soften.h"
#include "finish.h"
#include "attend.h"
#include "queue.h"
#include "write.h"

#undef ISA
#undef TARGET
#undef LANES
#undef GEMM_ROWS
#undef GEMM_VECTORS
#undef BF16_DOT
#undef INT16_DOT
#undef IS_INTEGER
#undef ROW_WORD_BYTES
#undef PER_WORD
#undef DOT_KEYS
#undef DOT_ROWS
#undef INLINE
#undef vf
#undef vi
#undef vu
