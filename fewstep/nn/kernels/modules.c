/* Greedy drafting with sequential modules: module k reads what module k-1 made of a position's parent and the embedding of the
 * position's own token, and its best scores are the next level of the tree. All modules in one call.
 *
 * Nodes. The `certain` positions of a row, right-aligned, then the drafted nodes, breadth first; the last certain position stands
 * for the tree's root. A module runs on all nodes there are so far; its new keys and values go to its own cache.
 *
 * This file knows nothing of tensors, nor of how a verdict is reached. */
#include "rows.h"

typedef struct { /* a draft module, made once */
    norm embed, hidden, last;
    layer join;
    const void *block; /* of step.c */
} module;

typedef struct { /* where a module stands */
    const void *cache; /* of step.c */
    const int64_t *lengths;
    long base, slots;
} seat;

typedef struct {
    long batch, certain, width, depth, nodes; /* nodes of the tree, its root included */
    const void *table;                        /* embeddings [head.out, width] */
    layer head;
    const void *hidden;     /* [batch, certain, width] */
    const int64_t *tokens;  /* [batch, certain], the root's token last */
    const int64_t *count;   /* [batch]: how many of them are real, the last ones */
    const char *carry;      /* [depth - 1, batch, width]: what each module but the last made of the position before them */
    const int64_t *budget;  /* [batch]: nodes at or beyond it are padding */
    const long *branching;  /* [depth] */
    const char *cos, *sin;
    long angles;
    int64_t *drafted, *parent; /* [batch, nodes] out */
    char *carries;             /* [depth - 1, batch, width] out: what each module but the last made of the last certain position */
    int bf16, threads;
} draft;

typedef struct {
    int64_t *tokens, *parents, *reads; /* tokens and parents [batch, total] */
    char *made, *source, *scores;
    long total, size, sources; /* sources: entries of a row of `source` */
} desk;

static void begin(const draft *d, const desk *k) {
    for (long b = 0; b < d->batch; b++) {
        const long start = d->certain - d->count[b];
        for (long i = 0; i < d->certain; i++) {
            k->tokens[b * k->total + i] = d->tokens[b * d->certain + i];
            k->parents[b * k->total + i] = i < start ? -2 : i == start ? -1 : i - 1;
        }
    }
}

/* Module m on the first `count` nodes of every row: k->made [batch, count, width], and the scores of the last `level` of them. */
static int evaluate(const draft *d, const desk *k, const module *m, const seat *s, long count, long level, int first) {
    for (long b = 0; b < d->batch; b++)
        for (long t = 0; t < count; t++) {
            const int64_t parent = k->parents[b * k->total + t];
            k->reads[b * count + t] = parent < 0 ? 0 : parent + 1;
        }
    const scene sight = {.batch = d->batch, .queries = count, .base = s->base, .pending = count, .lengths = s->lengths,
                         .parent = k->parents, .parent_row = k->total, .cos = d->cos, .sin = d->sin, .angles = d->angles,
                         .threads = d->threads};
    const joint join = {.embed = &m->embed, .hidden = &m->hidden, .layer = &m->join, .from = first ? d->hidden : k->source,
                        .reads = first ? NULL : k->reads, .sources = first ? count : k->sources};
    const steps call = {.blocks = m->block, .caches = s->cache, .depth = 1, .scene = &sight, .width = d->width, .slots = s->slots,
                        .bf16 = d->bf16, .table = d->table, .tokens = k->tokens, .token_row = k->total, .vocab = d->head.out,
                        .join = &join, .y = k->made, .last = &m->last, .head = &d->head, .tail = level, .scores = k->scores};
    return run_steps(&call);
}

/* The `branch` best tokens after each of the last `level` of `count` nodes become nodes. */
static void sprout(const draft *d, const desk *k, long count, long level, long branch) {
    const long vocab = d->head.out;
    for (long b = 0; b < d->batch; b++)
        for (long n = 0; n < level * branch; n++) {
            char *scores = k->scores + (b * level + n / branch) * vocab * k->size;
            int64_t *token = k->tokens + b * k->total + count + n, parent = count - level + n / branch;
            largest(scores, token, 1, vocab, d->bf16);
            if (d->bf16) ((uint16_t *)scores)[*token] = 0xff80; /* minus infinity: the next child is another */
            else ((float *)scores)[*token] = -INFINITY;
            const int left_out = count - d->certain + 1 + n >= d->budget[b];
            const int padded = parent >= d->certain && k->parents[b * k->total + parent] < 0;
            k->parents[b * k->total + count + n] = left_out || padded ? -2 : parent;
        }
}

static void finish(const draft *d, const desk *k) {
    for (long b = 0; b < d->batch; b++)
        for (long n = 0; n < d->nodes; n++) {
            const long at = b * k->total + d->certain - 1 + n;
            d->drafted[b * d->nodes + n] = k->tokens[at];
            d->parent[b * d->nodes + n] = n == 0 ? -1 : k->parents[at] < 0 ? -2 : k->parents[at] - (d->certain - 1);
        }
}

/* Returns 0, or as run_steps does, or BAD_TOKEN; new slots may have been written then. */
int draft_tree(const module *modules, const seat *seats, const draft *d) {
    const long size = d->bf16 ? 2 : 4, total = d->certain - 1 + d->nodes, rows = d->batch * (total + 1), pitch = d->width * size;
    long widest = 1, level = 1;
    for (long i = 0; i + 1 < d->depth; i++) widest = (level *= d->branching[i]) > widest ? level : widest;
    const long floats = 2 * rows * pitch + d->batch * widest * d->head.out * size, whole = 3 * rows * (long)sizeof(int64_t);
    char *memory = malloc(whole + floats);
    if (!memory) return NO_MEMORY;
    desk k = {.tokens = (int64_t *)memory, .total = total, .size = size};
    k.parents = k.tokens + rows, k.reads = k.parents + rows;
    k.made = memory + whole, k.source = k.made + rows * pitch, k.scores = k.source + rows * pitch;
    begin(d, &k);
    long count = d->certain;
    int failed = 0;
    level = 1;
    for (long i = 0; i < d->depth && !failed; i++) {
        failed = evaluate(d, &k, modules + i, seats + i, count, level, i == 0);
        if (!failed) sprout(d, &k, count, level, d->branching[i]);
        for (long b = 0; b < d->batch && !failed; b++) {
            if (i + 1 == d->depth) break;
            const char *made = k.made + b * count * pitch;
            const long row = (i * d->batch + b) * pitch;
            memcpy(d->carries + row, made + (d->certain - 1) * pitch, pitch);
            memcpy(k.source + b * (count + 1) * pitch, d->carry + row, pitch);
            memcpy(k.source + (b * (count + 1) + 1) * pitch, made, count * pitch);
        }
        level *= d->branching[i];
        k.sources = count + 1;
        count += level;
    }
    if (!failed) finish(d, &k);
    free(memory);
    return failed;
}
