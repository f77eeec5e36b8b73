/* Everything for one instruction set: see vectors.h for what must be defined. */
#include "vectors.h"
#include "products.h"
#include "tiles.h"
#include "rows.h"
#include "task.h"
#include "lay.h"
#include "soften.h"
#include "finish.h"
#include "attend_tiles.h"
#include "attend.h"
#include "queue.h"
#if !defined(BF16_DOT) && !defined(INT16_DOT) /* nothing in these depends on words: sets with other words share them */
#include "merge.h"
#include "write.h"
#endif

#undef ISA
#undef TARGET
#undef LANES
#undef GEMM_ROWS
#undef GEMM_VECTORS
#undef BF16_DOT
#undef INT16_DOT
#undef HAS_TILES
#undef IS_INTEGER
#undef VALUE_STRIDE
#undef VALUE_PANEL
#undef ROW_WORD_BYTES
#undef PER_WORD
#undef DOT_KEYS
#undef DOT_ROWS
#undef FETCH_ROWS
#undef INLINE
#undef RARE
#undef vf
#undef vi
#undef vu
