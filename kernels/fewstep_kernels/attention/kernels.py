"""The formulas of `reference` as Triton kernels: output and tangent in one pass over the keys, gradients in two.

Scores are kept in base 2 (s log2 e). Statistics and sums are float32; p, h, gS and gD are rounded to the inputs' type before a
product. The tangent is summed as h v + p tv with h = p (ds - z), z the mean of ds over the first tile of keys that a row sees: what
all keys' tangents share then cancels before rounding. In the end to = sum / l - r' o and r = r' + z with r' = sum h / l.

Gradients have no atomics, so they are equal bit for bit from run to run: one kernel goes over keys and holds the
gradients of a tile of queries, another goes over the queries of all heads of a group and holds those of a tile of keys.

INTERP: Triton's interpreter multiplies bfloat16 as integers and truncates casts to it, so there products run in float32 and
rounding is done on the bits. Capitals are the formulas' matrices and the compiler's constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _dot(a, b, INTERP: tl.constexpr, PRECISION: tl.constexpr):
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rounded(x, kind: tl.constexpr, INTERP: tl.constexpr):
    """x of float32 in the type `kind`; float32 with that type's values where interpreted."""
    if INTERP:
        if kind == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return bits.to(tl.float32, bitcast=True)
        return x.to(kind).to(tl.float32)
    return x.to(kind)


@triton.jit
def _tile(base, stride, rows, dims, n, D: tl.constexpr):
    """[rows, dims] of a matrix with unit last stride; 0 outside of it."""
    return tl.load(
        base + rows[:, None].to(tl.int64) * stride + dims[None, :], (rows < n)[:, None] & (dims < D)[None, :], 0.0
    )


@triton.jit
def _store(base, rows, dims, n, x, D: tl.constexpr, INTERP: tl.constexpr):
    """Into a contiguous [n, D]."""
    at = base + rows[:, None].to(tl.int64) * D + dims[None, :]
    value = _rounded(x, base.dtype.element_ty, INTERP).to(base.dtype.element_ty)
    tl.store(at, value, (rows < n)[:, None] & (dims < D)[None, :])


@triton.jit
def _scores(q, k, i, j, bias, n, m, scale, shift, CAUSAL: tl.constexpr, BIAS: tl.constexpr, INTERP: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """s log2 e [queries i, keys j], minus infinity where a query does not see a key."""
    s = _dot(q, tl.trans(k), INTERP, PRECISION) * (scale * LOG2E)
    if BIAS:
        s += (tl.load(bias + j, j < m, 0.0) * LOG2E)[None, :]
    seen = (i < n)[:, None] & (j < m)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None] + shift)
    return tl.where(seen, s, -INFINITY)


@triton.jit
def attend(
    Q, K, V, TQ, TK, TV, BIAS_AT, LENGTHS_AT, O, TO, LSE, R,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, tqb, tqh, tqn, tkb, tkh, tkn, tvb, tvh, tvn, bb, bh,
    heads, group, n, m_all, scale, shift,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    LENGTHS: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, INTERP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o, lse, and with a tangent to, r, of BM queries of one head."""
    TANGENT: tl.constexpr = HAS_TQ or HAS_TK or HAS_TV
    kind: tl.constexpr = Q.dtype.element_ty
    first, head = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    hk = h // group
    i, d = first + tl.arange(0, BM), tl.arange(0, DP)
    q = _tile(Q + b * qb + h * qh, qn, i, d, n, D)
    tq = q
    if HAS_TQ:
        tq = _tile(TQ + b * tqb + h * tqh, tqn, i, d, n, D)
    m = m_all
    if LENGTHS:
        m = tl.minimum(m, tl.load(LENGTHS_AT + b))
    end = m
    if CAUSAL:
        end = tl.minimum(m, tl.maximum(0, first + BM + shift))
    top = tl.full([BM], -INFINITY, tl.float32)
    l = tl.zeros([BM], tl.float32)
    rr = tl.zeros([BM], tl.float32)
    z = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    act = tl.zeros([BM, DP], tl.float32)
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        k = _tile(K + b * kb + hk * kh, kn, j, d, m, D)
        v = _tile(V + b * vb + hk * vh, vn, j, d, m, D)
        s = _scores(q, k, i, j, BIAS_AT + b * bb + h * bh, n, m, scale, shift, CAUSAL, BIAS, INTERP, PRECISION)
        above = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(above == -INFINITY, 0.0, above)
        p = tl.exp2(s - finite[:, None])
        a = tl.exp2(top - finite)
        weight = tl.sum(p, 1)
        pr = _rounded(p, kind, INTERP)
        acc = acc * a[:, None] + _dot(pr, v, INTERP, PRECISION)
        if TANGENT:
            act = act * a[:, None]
            if HAS_TV:
                tv = _tile(TV + b * tvb + hk * tvh, tvn, j, d, m, D)
                act += _dot(pr, tv, INTERP, PRECISION)
            if HAS_TQ or HAS_TK:
                ds = tl.zeros([BM, BN], tl.float32)
                if HAS_TQ:
                    ds += _dot(tq, tl.trans(k), INTERP, PRECISION)
                if HAS_TK:
                    tk = _tile(TK + b * tkb + hk * tkh, tkn, j, d, m, D)
                    ds += _dot(q, tl.trans(tk), INTERP, PRECISION)
                ds *= scale
                mean = tl.sum(p * ds, 1) / tl.where(weight > 0, weight, 1.0)
                z = tl.where((l == 0) & (weight > 0), mean, z)
                turned = p * (ds - z[:, None])
                rr = rr * a + tl.sum(turned, 1)
                act += _dot(_rounded(turned, kind, INTERP), v, INTERP, PRECISION)
        l = l * a + weight
        top = above
    some = tl.where(l > 0, l, 1.0)
    o = acc / some[:, None]
    at = head * n
    _store(O + at * D, i, d, n, o, D, INTERP)
    tl.store(LSE + at + i, tl.where(l > 0, (top + tl.log2(some)) * LN2, -INFINITY), i < n)
    if TANGENT:
        r = rr / some
        _store(TO + at * D, i, d, n, act / some[:, None] - r[:, None] * o, D, INTERP)
        tl.store(R + at + i, r + z, i < n)


@triton.jit
def _adjoints(
    q, k, v, tq, tk, tv, go, gt, lse, r, drop, beta, i, j, bias, n, m, scale, shift,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr, HAS_GO: tl.constexpr, HAS_GT: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p, h = p (ds - r), gS and gD of a tile. drop: go.o + gt.to of each row; beta: gt.o."""
    s = _scores(q, k, i, j, bias, n, m, scale, shift, CAUSAL, BIAS, INTERP, PRECISION)
    p = tl.exp2(s - tl.where(lse == -INFINITY, 0.0, lse * LOG2E)[:, None])
    centred = tl.zeros([BM, BN], tl.float32)
    gd = tl.zeros([BM, BN], tl.float32)
    gs = tl.zeros([BM, BN], tl.float32) - drop[:, None]
    if HAS_GO:
        gs += _dot(go, tl.trans(v), INTERP, PRECISION)
    if HAS_GT:
        b = _dot(gt, tl.trans(v), INTERP, PRECISION) - beta[:, None]
        if HAS_TV:
            gs += _dot(gt, tl.trans(tv), INTERP, PRECISION)
        if HAS_TQ or HAS_TK:
            if HAS_TQ:
                centred += _dot(tq, tl.trans(k), INTERP, PRECISION)
            if HAS_TK:
                centred += _dot(q, tl.trans(tk), INTERP, PRECISION)
            centred = centred * scale - r[:, None]
            gs += b * centred
        gd = p * b
    return p, p * centred, p * gs, gd


@triton.jit
def queries_back(
    Q, K, V, TQ, TK, TV, GO, GT, BIAS_AT, LENGTHS_AT, LSE, R, DROP, BETA, GQ, GTQ,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, tqb, tqh, tqn, tkb, tkh, tkn, tvb, tvh, tvn, gob, goh, gon, gtb, gth, gtn, bb, bh,
    heads, group, n, m_all, scale, shift,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    LENGTHS: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, HAS_GO: tl.constexpr,
    HAS_GT: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gq = c (gS k + gD tk) and gtq = c gD k of BM queries of one head."""
    kind: tl.constexpr = Q.dtype.element_ty
    first, head = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    hk = h // group
    i, d = first + tl.arange(0, BM), tl.arange(0, DP)
    q = _tile(Q + b * qb + h * qh, qn, i, d, n, D)
    tq, go, gt = q, q, q
    if HAS_TQ:
        tq = _tile(TQ + b * tqb + h * tqh, tqn, i, d, n, D)
    if HAS_GO:
        go = _tile(GO + b * gob + h * goh, gon, i, d, n, D)
    if HAS_GT:
        gt = _tile(GT + b * gtb + h * gth, gtn, i, d, n, D)
    at = head * n + i
    lse = tl.load(LSE + at, i < n, -INFINITY)
    drop = tl.load(DROP + at, i < n, 0.0)
    r, beta = drop, drop
    if HAS_GT:
        r, beta = tl.load(R + at, i < n, 0.0), tl.load(BETA + at, i < n, 0.0)
    m = m_all
    if LENGTHS:
        m = tl.minimum(m, tl.load(LENGTHS_AT + b))
    end = m
    if CAUSAL:
        end = tl.minimum(m, tl.maximum(0, first + BM + shift))
    gq = tl.zeros([BM, DP], tl.float32)
    gtq = tl.zeros([BM, DP], tl.float32)
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        k = _tile(K + b * kb + hk * kh, kn, j, d, m, D)
        v = _tile(V + b * vb + hk * vh, vn, j, d, m, D)
        tk, tv = k, v
        if HAS_TK:
            tk = _tile(TK + b * tkb + hk * tkh, tkn, j, d, m, D)
        if HAS_TV:
            tv = _tile(TV + b * tvb + hk * tvh, tvn, j, d, m, D)
        _, _, gs, gd = _adjoints(
            q, k, v, tq, tk, tv, go, gt, lse, r, drop, beta, i, j, BIAS_AT + b * bb + h * bh, n, m, scale, shift,
            BM, BN, CAUSAL, BIAS, HAS_TQ, HAS_TK, HAS_TV, HAS_GO, HAS_GT, INTERP, PRECISION,
        )  # fmt: skip
        gq += _dot(_rounded(gs, kind, INTERP), k, INTERP, PRECISION)
        if HAS_GT:
            gdr = _rounded(gd, kind, INTERP)
            if HAS_TK:
                gq += _dot(gdr, tk, INTERP, PRECISION)
            if HAS_TQ:
                gtq += _dot(gdr, k, INTERP, PRECISION)
    _store(GQ + head * n * D, i, d, n, gq * scale, D, INTERP)
    if HAS_GT and HAS_TQ:
        _store(GTQ + head * n * D, i, d, n, gtq * scale, D, INTERP)


@triton.jit
def keys_back(
    Q, K, V, TQ, TK, TV, GO, GT, BIAS_AT, LENGTHS_AT, LSE, R, DROP, BETA, GK, GV, GTK, GTV,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, tqb, tqh, tqn, tkb, tkh, tkn, tvb, tvh, tvn, gob, goh, gon, gtb, gth, gtn, bb, bh,
    heads, group, n, m_all, scale, shift,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    LENGTHS: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, HAS_GO: tl.constexpr,
    HAS_GT: tl.constexpr, INTERP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gk, gv, gtk, gtv of BN keys of one head of keys, over all queries of its group of heads."""
    kind: tl.constexpr = Q.dtype.element_ty
    first, head = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    b, hk = head // kv_heads, head % kv_heads
    j, d = first + tl.arange(0, BN), tl.arange(0, DP)
    m = m_all
    if LENGTHS:
        m = tl.minimum(m, tl.load(LENGTHS_AT + b))
    k = _tile(K + b * kb + hk * kh, kn, j, d, m, D)
    v = _tile(V + b * vb + hk * vh, vn, j, d, m, D)
    tk, tv = k, v
    if HAS_TK:
        tk = _tile(TK + b * tkb + hk * tkh, tkn, j, d, m, D)
    if HAS_TV:
        tv = _tile(TV + b * tvb + hk * tvh, tvn, j, d, m, D)
    gk = tl.zeros([BN, DP], tl.float32)
    gv = tl.zeros([BN, DP], tl.float32)
    gtk = tl.zeros([BN, DP], tl.float32)
    gtv = tl.zeros([BN, DP], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, first - shift) // BM * BM
    for member in range(group):
        h = hk * group + member
        for start in range(begin, n, BM):
            i = start + tl.arange(0, BM)
            q = _tile(Q + b * qb + h * qh, qn, i, d, n, D)
            tq, go, gt = q, q, q
            if HAS_TQ:
                tq = _tile(TQ + b * tqb + h * tqh, tqn, i, d, n, D)
            if HAS_GO:
                go = _tile(GO + b * gob + h * goh, gon, i, d, n, D)
            if HAS_GT:
                gt = _tile(GT + b * gtb + h * gth, gtn, i, d, n, D)
            at = (b * heads + h) * n + i
            lse = tl.load(LSE + at, i < n, -INFINITY)
            drop = tl.load(DROP + at, i < n, 0.0)
            r, beta = drop, drop
            if HAS_GT:
                r, beta = tl.load(R + at, i < n, 0.0), tl.load(BETA + at, i < n, 0.0)
            p, turned, gs, gd = _adjoints(
                q, k, v, tq, tk, tv, go, gt, lse, r, drop, beta, i, j, BIAS_AT + b * bb + h * bh, n, m, scale, shift,
                BM, BN, CAUSAL, BIAS, HAS_TQ, HAS_TK, HAS_TV, HAS_GO, HAS_GT, INTERP, PRECISION,
            )  # fmt: skip
            pt = tl.trans(_rounded(p, kind, INTERP))
            gk += _dot(tl.trans(_rounded(gs, kind, INTERP)), q, INTERP, PRECISION)
            if HAS_GO:
                gv += _dot(pt, go, INTERP, PRECISION)
            if HAS_GT:
                gdt = tl.trans(_rounded(gd, kind, INTERP))
                if HAS_TQ or HAS_TK:
                    gv += _dot(tl.trans(_rounded(turned, kind, INTERP)), gt, INTERP, PRECISION)
                if HAS_TQ:
                    gk += _dot(gdt, tq, INTERP, PRECISION)
                if HAS_TK:
                    gtk += _dot(gdt, q, INTERP, PRECISION)
                if HAS_TV:
                    gtv += _dot(pt, gt, INTERP, PRECISION)
    at = head * m_all * D
    _store(GK + at, j, d, m_all, gk * scale, D, INTERP)
    _store(GV + at, j, d, m_all, gv, D, INTERP)
    if HAS_GT and HAS_TK:
        _store(GTK + at, j, d, m_all, gtk * scale, D, INTERP)
    if HAS_GT and HAS_TV:
        _store(GTV + at, j, d, m_all, gtv, D, INTERP)
