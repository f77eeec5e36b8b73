/* Products on tile registers (AMX), a step at a time, so that they are made while vectors work: a step keeps the tile unit busy for
   64 cycles and takes few instructions. Included once per instruction set after products.h; all but one have no tiles. */

struct NAME(tile_work);
#ifdef HAS_TILES

#define LOAD_TILE(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride) * 4) : "memory")
/* The same, of what will not be needed soon: it is to leave the first-level cache to others. */
#define LOAD_PASSING_TILE(tile, from, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride) * 4) : "memory")
#define STORE_TILE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride) * 4) : "memory")
#define CLEAR_TILE(tile) __asm__ volatile("tilezero %%tmm" #tile : : : "memory")
#define MULTIPLY_TILES(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : : : "memory")

/* c = a . b, or c += a . b, of up to TILE_PAIR rows; columns are a multiple of TILE_PAIR, depth of TILE. b comes in tiles: word w of
   columns [16 * i, 16 * i + 16) begins at b[i * b_panel + 16 * w]. Rows of c that a tile has beyond num_rows are written too. */
struct NAME(tile_product) {
    const float *a, *b;
    float *c;
    int64_t a_stride, b_panel, c_stride;
    int num_rows, num_columns, depth, is_added;
    int column, word; /* where the next step is */
    struct NAME(fetches) *fetches;
};

/* Up to two products, one after the other. */
struct NAME(tile_work) {
    struct NAME(tile_product) products[2], *next, *end;
    int num_steps;          /* of all products */
    int credit, num_shares; /* steps x num_shares that may be made by now and are not; see work_share */
};

static void TARGET NAME(begin_work)(struct NAME(tile_work) *work, int num_shares) {
    work->next = work->end = work->products;
    work->num_steps = work->credit = 0;
    work->num_shares = num_shares;
}

static void TARGET NAME(add_product)(struct NAME(tile_work) *work, struct NAME(tile_product) product) {
    work->num_steps += product.num_columns / TILE_PAIR * (product.depth / TILE);
    *work->end++ = product;
}

INLINE void NAME(tile_step)(struct NAME(tile_work) *work) {
    struct NAME(tile_product) *p = work->next;
    const float *a = p->a + p->word, *b = p->b + p->column / TILE * p->b_panel + p->word * TILE;
    const int is_second = p->num_rows > TILE;
    float *c = p->c + p->column, *c_second = c + TILE * p->c_stride;
    if (p->word == 0) {
        if (p->is_added) {
            LOAD_TILE(0, c, p->c_stride);
            LOAD_TILE(1, c + TILE, p->c_stride);
            if (is_second) {
                LOAD_TILE(2, c_second, p->c_stride);
                LOAD_TILE(3, c_second + TILE, p->c_stride);
            }
        } else {
            CLEAR_TILE(0);
            CLEAR_TILE(1);
            CLEAR_TILE(2);
            CLEAR_TILE(3);
        }
    }
    LOAD_TILE(4, a, p->a_stride);
    LOAD_PASSING_TILE(6, b, TILE);
    LOAD_PASSING_TILE(7, b + p->b_panel, TILE);
    MULTIPLY_TILES(0, 4, 6);
    MULTIPLY_TILES(1, 4, 7);
    if (is_second) {
        LOAD_TILE(5, a + TILE * p->a_stride, p->a_stride);
        MULTIPLY_TILES(2, 5, 6);
        MULTIPLY_TILES(3, 5, 7);
    }
    p->word += TILE;
    if (p->word < p->depth) return;
    STORE_TILE(0, c, p->c_stride);
    STORE_TILE(1, c + TILE, p->c_stride);
    if (is_second) {
        STORE_TILE(2, c_second, p->c_stride);
        STORE_TILE(3, c_second + TILE, p->c_stride);
    }
    NAME(fetch_share)(p->fetches);
    p->word = 0;
    p->column += TILE_PAIR;
    if (p->column == p->num_columns) work->next++;
}

/* A share of the work's steps: num_shares / share calls make all of them. */
INLINE void NAME(work_share)(struct NAME(tile_work) *work, int share) {
    for (work->credit += share * work->num_steps; work->credit >= work->num_shares; work->credit -= work->num_shares)
        NAME(tile_step)(work);
}

static void TARGET NAME(finish_work)(struct NAME(tile_work) *work) {
    while (work->next < work->end) NAME(tile_step)(work);
}
#endif
