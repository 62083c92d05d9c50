/* RWKV-4's mean of values whose weights fade, and its gradients. Before token t the sums
 *     A = sum_{i<t} exp(k_i - (t-1-i) w) v_i   and   B = the same without v
 * are held as A exp(-m), B exp(-m), where m is the largest exponent, and y = (A + exp(u + k_t) v_t) / (B + exp(u + k_t)).
 *
 * Backward carries the gradients of A and B times exp(m) of the same token. These are bounded too: a later quotient's denominator is at
 * least what is left of B, which is at least exp(m).
 *
 * Order. A vector holds one number of neighbouring channels, so a channel's result depends on its own inputs alone, in the order of the
 * tokens before it, whatever rows, tokens and threads share the call. Backward gets the states block after block from those kept at the
 * blocks' starts.
 *
 * This file knows nothing of tensors, nor how the inputs come about. */
#include "rows.h"

enum { STEPS = 32, SHARE = 64 }; /* tokens of a block; channels of a unit of work */

typedef struct { /* all fp32 and contiguous */
    long batch, length, width;
    const float *k, *v;                 /* [batch, length, width] */
    const float *fading, *bonus;        /* [width]: w, at least 0, and u */
    const float *above, *below, *most;  /* [batch, width]: A exp(-m), B exp(-m) and m before the first token */
    const uint8_t *begins;              /* [batch, length] bytes: a token that knows none before it; NULL: all follow one another */
    float *y;                           /* as k */
    float *last_above, *last_below, *last_most; /* as above */
    float *kept;                        /* [batch, blocks, 3, width]: the states before each block; NULL: not wanted */
    const float *dy, *dlast_above, *dlast_below; /* from here on gradients; m has none */
    float *dk, *dv, *dfading, *dbonus, *dabove, *dbelow; /* of w and u [batch, width] */
} wkv;

typedef struct {
    vec above, below, most;
} sums;

typedef struct { /* what a token made of the sums before it */
    sums before;
    vec keeps, adds; /* what the sums, and what the token's own term, become part of the next sums by */
    vec past, own;   /* what they are worth in the quotient, over its denominator */
    vec y;
} step;

static long blocks(const wkv *s) { return (s->length + STEPS - 1) / STEPS; }


INLINE sums empty(void) { return (sums){all(0.0f), all(0.0f), all(-1e30f)}; } /* finite, so that differences of two are */

/* exp of two logarithms less the larger, which is returned. */
INLINE vec relate(vec a, vec b, vec *of_a, vec *of_b) {
    const vec apart = a - b, less = exponential(choose(apart > all(0.0f), -apart, apart));
    *of_a = choose(apart > all(0.0f), all(1.0f), less);
    *of_b = choose(apart > all(0.0f), less, all(1.0f));
    return choose(apart > all(0.0f), a, b);
}

/* A token after the sums `now`, which become those after it. */
INLINE step take(sums *now, vec k, vec v, vec fading, vec bonus) {
    step s = {.before = *now};
    relate(now->most, bonus + k, &s.past, &s.own);
    const vec denominator = multiply_add(s.past, now->below, s.own);
    s.past /= denominator;
    s.own /= denominator;
    s.y = multiply_add(s.past, now->above, s.own * v);
    now->most = relate(now->most - fading, k, &s.keeps, &s.adds);
    now->above = multiply_add(s.keeps, now->above, s.adds * v);
    now->below = multiply_add(s.keeps, now->below, s.adds);
    return s;
}

INLINE sums sums_at(const float *above, const float *below, const float *most, long e, long n) {
    return (sums){fetch(above, e, n, FLOAT), fetch(below, e, n, FLOAT), fetch(most, e, n, FLOAT)};
}

INLINE void give_sums(const sums *from, float *above, float *below, float *most, long e, long n) {
    store(above, e, n, from->above, FLOAT);
    store(below, e, n, from->below, FLOAT);
    store(most, e, n, from->most, FLOAT);
}

static void forward(const wkv *s, long row, long first, long last) {
    const long w = s->width, at = row * w;
    sums now[SHARE / LANES];
    for (long e = first; e < last; e += LANES)
        now[(e - first) / LANES] = sums_at(s->above + at, s->below + at, s->most + at, e, last - e);
    for (long block = 0; block < blocks(s); block++) {
        const long token = row * s->length + block * STEPS, left = s->length - block * STEPS;
        float *kept = s->kept ? s->kept + (row * blocks(s) + block) * 3 * w : NULL;
        for (long e = first; e < last; e += LANES) {
            sums *of = now + (e - first) / LANES;
            const vec fading = fetch(s->fading, e, last - e, FLOAT), bonus = fetch(s->bonus, e, last - e, FLOAT);
            if (kept) give_sums(of, kept, kept + w, kept + 2 * w, e, last - e);
            for (long t = token; t < token + (left < STEPS ? left : STEPS); t++) {
                if (s->begins && s->begins[t]) *of = empty();
                const vec k = fetch(s->k + t * w, e, last - e, FLOAT), v = fetch(s->v + t * w, e, last - e, FLOAT);
                store(s->y + t * w, e, last - e, take(of, k, v, fading, bonus).y, FLOAT);
            }
        }
    }
    for (long e = first; e < last; e += LANES)
        give_sums(now + (e - first) / LANES, s->last_above + at, s->last_below + at, s->last_most + at, e, last - e);
}

typedef struct { /* gradients of a group of channels: of the sums after a token, and of the rates of all tokens behind it */
    vec above, below, fading, bonus;
} slopes;

/* A block of tokens of a group of channels; g is for the sums after it, and becomes that for those before it. */
static void undo(const wkv *s, long row, long block, long e, long n, slopes *g) {
    const long w = s->width, token = row * s->length + block * STEPS, left = s->length - block * STEPS;
    const long count = left < STEPS ? left : STEPS;
    const float *kept = s->kept + (row * blocks(s) + block) * 3 * w;
    const vec fading = fetch(s->fading, e, n, FLOAT), bonus = fetch(s->bonus, e, n, FLOAT);
    sums now = sums_at(kept, kept + w, kept + 2 * w, e, n);
    step steps[STEPS];
    for (long i = 0; i < count; i++) {
        const long at = (token + i) * w;
        if (s->begins && s->begins[token + i]) now = empty();
        steps[i] = take(&now, fetch(s->k + at, e, n, FLOAT), fetch(s->v + at, e, n, FLOAT), fading, bonus);
    }
    for (long i = count - 1; i >= 0; i--) {
        const step *p = steps + i;
        const long at = (token + i) * w;
        const vec v = fetch(s->v + at, e, n, FLOAT), dy = fetch(s->dy + at, e, n, FLOAT);
        const vec own = dy * p->own, through = own * (v - p->y), past = dy * p->past;
        store(s->dv + at, e, n, multiply_add(p->adds, g->above, own), FLOAT);
        store(s->dk + at, e, n, multiply_add(p->adds, multiply_add(g->above, v, g->below), through), FLOAT);
        g->bonus += through;
        g->fading -= p->keeps * multiply_add(p->before.above, g->above, p->before.below * g->below);
        g->above = multiply_add(p->keeps, g->above, past);
        g->below = multiply_add(p->keeps, g->below, -past * p->y);
        if (s->begins && s->begins[token + i]) g->above = g->below = all(0.0f);
    }
}

static void backward(const wkv *s, long row, long first, long last) {
    const long at = row * s->width;
    slopes g[SHARE / LANES] = {0};
    for (long e = first; e < last; e += LANES) {
        g[(e - first) / LANES].above = fetch(s->dlast_above + at, e, last - e, FLOAT);
        g[(e - first) / LANES].below = fetch(s->dlast_below + at, e, last - e, FLOAT);
    }
    for (long block = blocks(s) - 1; block >= 0; block--)
        for (long e = first; e < last; e += LANES) undo(s, row, block, e, last - e, g + (e - first) / LANES);
    for (long e = first; e < last; e += LANES) {
        const slopes *of = g + (e - first) / LANES;
        store(s->dfading + at, e, last - e, of->fading, FLOAT);
        store(s->dbonus + at, e, last - e, of->bonus, FLOAT);
        store(s->dabove + at, e, last - e, of->above, FLOAT);
        store(s->dbelow + at, e, last - e, of->below, FLOAT);
    }
}

/* Forward, or where there is dy backward, with the states that forward kept. */
void wkv4(const wkv *s, int threads) {
    const long parts = (s->width + SHARE - 1) / SHARE, units = s->batch * parts;
    if (forked || s->batch * s->length * s->width * 64 < PARALLEL) threads = 1;
    if (threads > units) threads = units ? units : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long unit = 0; unit < units; unit++) {
        const long row = unit / parts, first = unit % parts * SHARE, last = first + SHARE < s->width ? first + SHARE : s->width;
        if (s->dy) backward(s, row, first, last);
        else forward(s, row, first, last);
    }
}
