/* Where the tokens of a call lie in the caches: who sees what, at which position, and what stays when nodes are kept.
 *
 * Row b's committed tokens fill slots 0 .. lengths[b]-1, pending node n lies in slot base + n. A new node sees the committed tokens
 * of its row, its ancestors and itself, as far as a window reaches, or, where tokens attend in blocks, every pending node of its own
 * block and of those before. Padding sees itself, too, and is seen by nothing else.
 *
 * This file knows nothing of activations. */
#include "calls.h"
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const int64_t *parents(const scene *s, long b) { return s->parent ? s->parent + b * s->parent_row : NULL; }

static long depth(const int64_t *parent, long node) {
    long d = 0;
    if (!parent) return node;
    for (; parent[node] >= 0; node = parent[node]) d++;
    return d;
}

/* 0, or what is out of range. */
int check_scene(const scene *s) {
    const long rows = s->parent_row ? s->batch : 1;
    for (long b = 0; b < s->batch; b++)
        if (s->lengths[b] < 0 || s->lengths[b] > s->base) return BAD_LENGTHS;
    for (long b = 0; s->parent && b < rows; b++)
        for (long n = 0; n < s->pending; n++)
            if (parents(s, b)[n] < -2 || parents(s, b)[n] >= n) return BAD_PARENT;
    return 0;
}

/* Where each new token [batch, queries] reads the rotary table; -1: outside of it. */
void place(const scene *s, int64_t *angles) {
    for (long b = 0; b < s->batch; b++)
        for (long t = 0; t < s->queries; t++, angles++) {
            if (s->positions) *angles = s->positions[b * s->position_row + t];
            else *angles = s->lengths[b] + depth(parents(s, b), s->pending - s->queries + t);
            if (*angles < 0 || *angles >= s->angles) *angles = -1;
        }
}

/* The window of the call and the decoder block together, LONG_MAX where all is within it; blocks of tokens have none. */
long sight_window(const scene *s, long window) {
    if (s->block) return LONG_MAX;
    if (!window || (s->window && s->window < window)) window = s->window;
    return window && window < s->base + s->pending ? window : LONG_MAX;
}

static long visible_bytes(const scene *s, long window) { return (window < LONG_MAX ? s->base : 0) + s->pending; }

long sight_memory(const scene *s, long window) {
    const long slots = (s->base + s->pending) * sizeof(int32_t), seen = s->queries * s->pending;
    return s->batch * ((long)sizeof(view) + slots + s->queries * visible_bytes(s, window)) + seen + s->pending * sizeof(long) + 64;
}

/* Marks `seen` [queries, pending]; returns the lowest index among the new tokens, those of all pending nodes in `index`. */
static long mark(const scene *s, long b, long window, char *seen, long *index) {
    const int64_t *parent = parents(s, b);
    long lowest = LONG_MAX;
    memset(seen, 0, s->queries * s->pending);
    for (long n = 0; n < s->pending; n++) {
        const long before = parent ? parent[n] : n - 1;
        index[n] = before < 0 ? s->lengths[b] : index[before] + 1;
    }
    for (long own = s->pending - s->queries; own < s->pending; own++, seen += s->pending) {
        const long end = s->block ? (index[own] / s->block + 1) * s->block : 0;
        for (long n = 0; n < s->pending && end; n++) seen[n] = index[n] < end && !(parent && parent[n] == -2);
        long left = window;
        for (long n = own; n >= 0 && left > 0; n = parent ? parent[n] : n - 1, left--) seen[n] = 1;
        if (index[own] < lowest) lowest = index[own];
    }
    return lowest;
}

/* What every row of the batch sees of its slots, in `memory` of `sight_memory` bytes, aligned as malloc does. */
const view *look(const scene *s, long window, char *memory) {
    const long row = visible_bytes(s, window), first = s->pending - s->queries;
    view *views = (view *)memory;
    long *index = (long *)(views + s->batch);
    int32_t *slots = (int32_t *)(index + s->pending);
    uint8_t *visible = (uint8_t *)(slots + s->batch * (s->base + s->pending));
    char *seen = (char *)visible + s->batch * s->queries * row;
    for (long b = 0; b < s->batch; b++, slots += s->base + s->pending, visible += s->queries * row) {
        view *v = views + b;
        const long lowest = mark(s, b, window, seen, index), committed = s->lengths[b];
        *v = (view){.slots = slots, .visible = visible, .row = row};
        for (long slot = window < LONG_MAX && lowest >= window ? lowest - window + 1 : 0; slot < committed; slot++) {
            slots[v->count] = (int32_t)slot;
            for (long t = 0; window < LONG_MAX && t < s->queries; t++) visible[t * row + v->count] = index[first + t] - slot < window;
            v->count++;
        }
        if (window == LONG_MAX) v->open = v->count;
        for (long n = 0; n < s->pending; n++) {
            long any = 0;
            for (long t = 0; t < s->queries; t++)
                any += visible[t * row + v->count - v->open] = seen[t * s->pending + n];
            slots[v->count] = (int32_t)(s->base + n);
            v->count += any > 0;
        }
        if (s->queries == 1) v->open = v->count;
    }
    return views;
}

typedef struct {
    char *data;       /* [batch, sides, capacity, bytes] */
    long sides, bytes; /* bytes of a slot */
} cache;

/* Slots base + path[j] become slots lengths + j for j < count, in every cache. Returns 0, or the number of the argument that is out
 * of range: 1 lengths, 2 path, 3 count; nothing is written then. */
int keep_slots(const cache *caches, long depth, long batch, long capacity, long base, const int64_t *lengths, const int64_t *path,
               long nodes, const int64_t *count) {
    for (long b = 0; b < batch; b++) {
        if (lengths[b] < 0 || lengths[b] > base) return 1;
        if (count[b] < 0 || count[b] > nodes) return 3;
        for (long j = 0, last = -1; j < count[b]; last = path[b * nodes + j++])
            if (path[b * nodes + j] <= last || path[b * nodes + j] >= capacity - base) return 2;
    }
    for (const cache *c = caches; c < caches + depth; c++)
        for (long b = 0; b < batch; b++)
            for (long side = 0; side < c->sides; side++) {
                char *row = c->data + (b * c->sides + side) * capacity * c->bytes;
                for (long j = 0; j < count[b]; j++) {
                    const long from = base + path[b * nodes + j], to = lengths[b] + j;
                    if (from != to) memcpy(row + to * c->bytes, row + from * c->bytes, c->bytes);
                }
            }
    return 0;
}
