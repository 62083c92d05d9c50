/* The selective scan, h = exp(delta a) h' + delta u b and y = h c for every channel and state, and its gradients.
 *
 * Order. A vector holds one state of neighbouring channels, so a channel's result depends on its own inputs alone, in the order of
 * the tokens before it, whatever rows, tokens and threads share the call. Gradients of b and c are sums over the channels of a
 * unit of work, which are the same whatever the threads; whoever calls adds the units up.
 *
 * Memory. Backward needs every state: it gets them block after block from those kept at the blocks' starts.
 *
 * This file knows nothing of tensors, nor how the inputs come about. */
#include "rows.h"

enum { STEPS = 32, SHARE = 128 }; /* tokens of a block; channels of a unit of work */

typedef struct { /* all fp32 and contiguous */
    long batch, length, width, states;
    const float *u, *delta; /* [batch, length, width] */
    const float *a;         /* [states, width] */
    const float *b, *c;     /* [batch, length, states] */
    const float *start;     /* [batch, states, width] */
    const uint8_t *begins;  /* [batch, length] bytes: a token that knows none before it; NULL: all follow one another */
    const int64_t *parent;  /* [batch, length]: the earlier token that one follows, -1: the start, -2: none; NULL: a chain */
    float *y, *last;        /* as u; as start, for a chain */
    float *kept;            /* [batch, blocks, states, whole width]: the states before each block; NULL: not wanted */
    const float *dy, *dlast; /* as y and last, and from here on the gradients of the inputs: */
    float *du, *ddelta, *da; /* da [batch, states, width] */
    float *db, *dc;          /* [units of a sequence, batch, length, states] */
    float *dstart;
} scan;

typedef struct { /* a unit of work: channels first .. last-1 of sequence `row`, and its memory: */
    long row, first, last;
    vec *a, *h, *g, *da;           /* [groups, states] */
    vec *before, *decay, *db, *dc; /* [STEPS, states], or the states of a tree's tokens */
    vec *none;                     /* [states] zeros */
} unit;

static long parts(const scan *s) { return (s->width + SHARE - 1) / SHARE; }
static long blocks(const scan *s) { return (s->length + STEPS - 1) / STEPS; }
static long whole(long n) { return (n + 15) / 16 * 16; }

/* The vectors of a unit's channels, from or to rows [states, width]; NULL: zeros. */
static void take(const scan *s, const unit *u, const float *rows, vec *to) {
    for (long e = u->first; e < u->last; e += LANES)
        for (long i = 0; i < s->states; i++) *to++ = rows ? fetch(rows + i * s->width, e, u->last - e, FLOAT) : all(0.0f);
}

static void give(const scan *s, const unit *u, const vec *from, float *rows) {
    for (long e = u->first; e < u->last; e += LANES)
        for (long i = 0; i < s->states; i++) store(rows + i * s->width, e, u->last - e, *from++, FLOAT);
}

static float *kept_at(const scan *s, const unit *u, long block, long channel) {
    return s->kept + (u->row * blocks(s) + block) * s->states * whole(s->width) + channel;
}

INLINE int begins(const scan *s, long token) { return s->begins && s->begins[token]; }

/* The states after a token, from those before it, and what it reads of them. */
INLINE void step(const scan *s, const long states, long token, long channel, long n, const vec *a, const vec *from, vec *to) {
    const float *b = s->b + token * states, *c = s->c + token * states;
    const vec delta = fetch(s->delta + token * s->width, channel, n, FLOAT);
    const vec x = delta * fetch(s->u + token * s->width, channel, n, FLOAT);
    vec y = all(0.0f);
    for (long i = 0; i < states; i++) {
        to[i] = multiply_add(exponential(delta * a[i]), from[i], x * broadcast(b + i));
        y = multiply_add(to[i], broadcast(c + i), y);
    }
    store(s->y + token * s->width, channel, n, y, FLOAT);
}

/* Tokens of a group of channels; `states` is a constant once inlined. */
INLINE void run(const scan *s, const unit *u, const long states, long token, long count, long channel, const vec *a, vec *h) {
    for (long t = token; t < token + count; t++)
        step(s, states, t, channel, u->last - channel, a, begins(s, t) ? u->none : h, h);
}

static void chain(const scan *s, const unit *u) {
    take(s, u, s->start + u->row * s->width * s->states, u->h);
    for (long k = 0; k < blocks(s); k++) {
        const long token = u->row * s->length + k * STEPS, left = s->length - k * STEPS, count = left < STEPS ? left : STEPS;
        vec *h = u->h, *a = u->a;
        for (long e = u->first; e < u->last; e += LANES, h += s->states, a += s->states) {
            if (s->kept)
                for (long i = 0; i < s->states; i++) memcpy(kept_at(s, u, k, e) + i * whole(s->width), h + i, sizeof(vec));
            if (s->states == 16) run(s, u, 16, token, count, e, a, h);
            else run(s, u, s->states, token, count, e, a, h);
        }
    }
    give(s, u, u->h, s->last + u->row * s->width * s->states);
}

static void tree(const scan *s, const unit *u) {
    take(s, u, s->start + u->row * s->width * s->states, u->h);
    const vec *h = u->h, *a = u->a;
    for (long e = u->first; e < u->last; e += LANES, h += s->states, a += s->states)
        for (long k = 0; k < s->length; k++) {
            const long t = u->row * s->length + k, parent = s->parent[t];
            const vec *from = parent >= 0 ? u->before + parent * s->states : parent == -1 ? h : u->none;
            step(s, s->states, t, e, u->last - e, a, from, u->before + k * s->states);
        }
}

/* The states before each token of a block, and their decays. */
INLINE void again(const scan *s, const unit *u, const long states, long token, long count, long channel, const vec *a) {
    const vec *h = u->h;
    for (long k = 0; k < count; k++) {
        const float *b = s->b + (token + k) * states;
        const vec delta = fetch(s->delta + (token + k) * s->width, channel, u->last - channel, FLOAT);
        const vec x = delta * fetch(s->u + (token + k) * s->width, channel, u->last - channel, FLOAT);
        vec *before = u->before + k * states, *decay = u->decay + k * states;
        if (begins(s, token + k)) h = u->none;
        for (long i = 0; i < states; i++) {
            before[i] = h[i];
            decay[i] = exponential(delta * a[i]);
            u->h[i] = multiply_add(decay[i], h[i], x * broadcast(b + i));
        }
        h = u->h;
    }
}

/* The gradients of a token: g is that of the states after it, and becomes that of those before it. */
INLINE void undo(const scan *s, const unit *w, const long states, long token, long k, long channel, const vec *a, vec *g, vec *da) {
    const float *b = s->b + token * states, *c = s->c + token * states;
    const vec *before = w->before + k * states, *decay = w->decay + k * states;
    const long at = token * s->width, n = w->last - channel;
    const vec delta = fetch(s->delta + at, channel, n, FLOAT), u = fetch(s->u + at, channel, n, FLOAT), x = delta * u;
    const vec dy = fetch(s->dy + at, channel, n, FLOAT);
    vec *db = w->db + k * states, *dc = w->dc + k * states, through = all(0.0f), faded = all(0.0f);
    for (long i = 0; i < states; i++) {
        const vec past = decay[i] * before[i], input = broadcast(b + i);
        const vec dh = multiply_add(dy, broadcast(c + i), g[i]), dlog = dh * past;
        dc[i] = multiply_add(dy, multiply_add(x, input, past), dc[i]);
        db[i] = multiply_add(dh, x, db[i]);
        through = multiply_add(dh, input, through);
        faded = multiply_add(dlog, a[i], faded);
        da[i] = multiply_add(dlog, delta, da[i]);
        g[i] = dh * decay[i];
    }
    if (begins(s, token)) memset(g, 0, states * sizeof(vec));
    store(s->du + at, channel, n, delta * through, FLOAT);
    store(s->ddelta + at, channel, n, multiply_add(u, through, faded), FLOAT);
}

INLINE void undo_block(const scan *s, const unit *u, const long states, long token, long count, long channel, const vec *a, vec *g,
                       vec *da) {
    again(s, u, states, token, count, channel, a);
    for (long k = count - 1; k >= 0; k--) undo(s, u, states, token + k, k, channel, a, g, da);
}

static void backward(const scan *s, const unit *u) {
    const long states = s->states, row = u->row * s->width * states, part = u->first / SHARE;
    take(s, u, s->dlast + row, u->g);
    take(s, u, NULL, u->da);
    for (long k = blocks(s) - 1; k >= 0; k--) {
        const long token = u->row * s->length + k * STEPS, left = s->length - k * STEPS, count = left < STEPS ? left : STEPS;
        const vec *a = u->a;
        vec *g = u->g, *da = u->da;
        memset(u->db, 0, count * states * sizeof(vec));
        memset(u->dc, 0, count * states * sizeof(vec));
        for (long e = u->first; e < u->last; e += LANES, a += states, g += states, da += states) {
            for (long i = 0; i < states; i++) memcpy(u->h + i, kept_at(s, u, k, e) + i * whole(s->width), sizeof(vec));
            if (states == 16) undo_block(s, u, 16, token, count, e, a, g, da);
            else undo_block(s, u, states, token, count, e, a, g, da);
        }
        const long at = (part * s->batch * s->length + token) * states;
        for (long i = 0; i < count * states; i++) {
            s->db[at + i] = sum(u->db[i]);
            s->dc[at + i] = sum(u->dc[i]);
        }
    }
    give(s, u, u->g, s->dstart + row);
    give(s, u, u->da, s->da + row);
}

/* Vectors of a thread's memory. */
static long memory_of(const scan *s) {
    return ((4 * SHARE / LANES + 1) + (s->parent ? s->length : s->dy ? 4 * STEPS : 0)) * s->states;
}

static void work(const scan *s, long first, long last, vec *memory) {
    const long states = s->states, groups = SHARE / LANES * states, block = STEPS * states;
    unit u = {.none = memory, .a = memory + states};
    u.h = u.a + groups;
    u.g = u.h + groups;
    u.da = u.g + groups;
    u.before = u.da + groups;
    u.decay = u.before + block;
    u.db = u.decay + block;
    u.dc = u.db + block;
    memset(u.none, 0, states * sizeof(vec));
    for (long i = first; i < last; i++) {
        u.row = i / parts(s);
        u.first = i % parts(s) * SHARE;
        u.last = u.first + SHARE < s->width ? u.first + SHARE : s->width;
        take(s, &u, s->a, u.a);
        if (s->dy) backward(s, &u);
        else if (s->parent) tree(s, &u);
        else chain(s, &u);
    }
}

/* Forward, or where there is dy backward, with the states that forward kept. Returns 0, or -1 where memory is lacking. */
int selective_scan(const scan *s, int threads) {
    const long units = s->batch * parts(s), own = memory_of(s);
    if (forked || s->batch * s->length * s->width * s->states * 8 < PARALLEL) threads = 1;
    if (threads > units) threads = units ? units : 1;
    vec *memory = aligned_alloc(64, (threads * own * sizeof(vec) + 63) / 64 * 64);
    if (!memory) return -1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const long t = omp_get_thread_num(), n = omp_get_num_threads();
        work(s, units * t / n, units * (t + 1) / n, memory + t * own);
    }
#else
    work(s, 0, units, memory);
#endif
    free(memory);
    return 0;
}
