/* Calls whose tensors lie as those of a call that was checked. Where other work has emptied the caches, Python's checks take as long
   as attention over a thousand tokens; what they look at is noted down once, and compared here. A tensor is looked at through DLPack's
   table of C functions (https://dmlc.github.io/dlpack/latest/c_api.html), which torch has. */

enum { MAX_DIMS = 5, MAX_TENSORS = 13, WRITE_TENSORS = 7 };

/* DLTensor, of DLPack's first major version. */
struct view {
    void *data;
    int32_t device[2];
    int32_t num_dims;
    uint32_t dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

/* What is needed of Python and of torch, by address: this library links neither. */
struct python {
    int (*view_of)(void *tensor, struct view *view); /* not 0, with a Python error set, if there is nothing to see */
    void *(*item_of)(void *tuple, int64_t i);
    void *(*release_lock)(void);
    void (*take_lock)(void *state);
    void *none;
};

/* How a tensor lies; num_dims is -1 for None. */
struct layout {
    int32_t device[2], num_dims;
    uint32_t dtype;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
};

struct known_attention {
    struct attention_call call;
    struct layout layouts[MAX_TENSORS];
    const int32_t *seq_lens, *query_start_loc; /* that the plan was made for */
};
struct known_write {
    struct write_call call;
    struct layout layouts[MAX_TENSORS];
    int64_t num_slots;
};

/* Notes down how the first `num_tensors` of a tuple lie. Returns 0; or -1 if one of them is shown in a way that is not known here. */
int pagedkv_note(const struct python *python, void *tensors, int num_tensors, struct layout *layouts) {
    for (int i = 0; i < num_tensors; i++) {
        struct layout *to = layouts + i;
        struct view view;
        void *tensor = python->item_of(tensors, i);
        memset(to, 0, sizeof *to);
        to->num_dims = -1;
        if (tensor == python->none) continue;
        if (python->view_of(tensor, &view) || view.num_dims > MAX_DIMS || (view.num_dims && !view.strides)) return -1;
        memcpy(to->device, view.device, sizeof to->device);
        to->num_dims = view.num_dims;
        to->dtype = view.dtype;
        memcpy(to->shape, view.shape, view.num_dims * sizeof(int64_t));
        memcpy(to->strides, view.strides, view.num_dims * sizeof(int64_t));
    }
    return 0;
}

/* Whether the tensors of a tuple lie as noted down; and where, NULL for None. */
static int lie_as_noted(const struct python *python, void *tensors, int num_tensors, const struct layout *layouts, void **addresses) {
    for (int i = 0; i < num_tensors; i++) {
        const struct layout *noted = layouts + i;
        struct view view;
        void *tensor = python->item_of(tensors, i);
        addresses[i] = NULL;
        if (tensor == python->none) {
            if (noted->num_dims != -1) return 0;
            continue;
        }
        if (python->view_of(tensor, &view)) return 0;
        size_t size = view.num_dims * sizeof(int64_t);
        if (view.num_dims != noted->num_dims || view.dtype != noted->dtype || memcmp(view.device, noted->device, sizeof noted->device) ||
            (size && (!view.strides || memcmp(view.shape, noted->shape, size) || memcmp(view.strides, noted->strides, size))))
            return 0;
        addresses[i] = (char *)view.data + view.byte_offset;
    }
    return 1;
}

/* Runs a call whose tensors (query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, sinks, alibi_slopes,
   tree_mask, k_scale, v_scale, out, lse) lie as those of `known`, and whose lengths are the plan's. Returns 1 where that is not
   so, with nothing done; else as pagedkv_attention. Called with Python's lock, which is not held while the kernel runs. */
int pagedkv_attend_known(const struct known_attention *known, const struct python *python, void *tensors, int set, int num_threads,
                         parallel_t parallel) {
    void *at[MAX_TENSORS];
    if (!lie_as_noted(python, tensors, MAX_TENSORS, known->layouts, at)) return 1;
    size_t lengths_size = known->layouts[4].shape[0] * sizeof(int32_t);
    if (memcmp(at[4], known->seq_lens, lengths_size) || memcmp(at[5], known->query_start_loc, lengths_size + sizeof(int32_t))) return 1;
    struct attention_call call = known->call;
    call.query = at[0];
    call.key.data = at[1], call.value.data = at[2];
    call.block_tables = at[3], call.seq_lens = at[4], call.query_start_loc = at[5];
    call.sinks = at[6], call.alibi_slopes = at[7], call.tree_mask = at[8];
    call.key.scale = at[9], call.value.scale = at[10];
    call.out = at[11], call.lse = at[12];
    void *state = python->release_lock();
    int result = pagedkv_attention(&call, set, num_threads, parallel);
    python->take_lock(state);
    return result;
}

/* The same for a write (key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale); also 1 where a slot is out
   of range, which may be an error. */
int pagedkv_write_known(const struct known_write *known, const struct python *python, void *tensors, int set,
                        int num_threads, parallel_t parallel) {
    void *at[MAX_TENSORS];
    if (!lie_as_noted(python, tensors, WRITE_TENSORS, known->layouts, at)) return 1;
    const int64_t *slots = at[4];
    for (int64_t i = 0; i < known->call.num_tokens; i++)
        if (slots[i] < -1 || slots[i] >= known->num_slots) return 1;
    struct write_call call = known->call;
    call.source[0] = at[0], call.source[1] = at[1];
    call.cache[0].data = at[2], call.cache[1].data = at[3];
    call.slots = slots;
    call.cache[0].scale = at[5], call.cache[1].scale = at[6];
    void *state = python->release_lock();
    pagedkv_write(&call, set, num_threads, parallel);
    python->take_lock(state);
    return 0;
}

int64_t pagedkv_size_of_known_attention(void) { return sizeof(struct known_attention); }
int64_t pagedkv_size_of_known_write(void) { return sizeof(struct known_write); }
