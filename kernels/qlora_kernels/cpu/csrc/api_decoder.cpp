// A decoder layer of adapted projections in one call each way: the calls of its parts in turn, see layers/decoder.py.
//
// Between two calls from Python all threads but one wait for the interpreter, whose code and objects the kernels have
// meanwhile driven out of the caches: 0.3 to 0.6 ms, 22 times a layer and step. The parts are those that Python calls
// for a layer that is not computed so, and what they make is the same to the bit. The alternative, to record the calls
// of a step and replay them, would need every size fixed.

#include <initializer_list>

#include "api.h"
#include "dispatch.h"
#include "types.h"

using namespace qlora;

namespace {

enum Part { kQ, kK, kV, kO, kGate, kUp, kDown, kParts };

// Both as decoder.py packs them: each member has eight bytes.
struct Projection {
  const uint8_t* packed;
  const void* absmax;
  const float *nested, *offset, *levels;
  int64_t rows, columns, block_shift, nested_shift;
  const float *A, *B, *m;  // m null in LoRA
  const void* bias;        // [rows] of q, k or v, or null
  int64_t makes_n, rank;
  double scaling;
  float* factors;  // [3, rows], or null without m; see qlora_layer_forward
  float *dA, *dB, *dm;
};

struct Decoder {
  int64_t bf16, by_integers, widened;  // widened: bf16 goes through attention in float32
  int64_t threads, tokens, heads, groups, D, examples;
  const int64_t *starts, *lengths;  // of the examples, the longest first
  double scale, eps[4];
  const void* norms[4];  // of x, of h, and of the heads of q and of k or null
  const void *cos, *sin, *x;
  void* y;
  const void* dy;
  void* dx;
  char *kept, *passing, *work;
  Projection parts[kParts];

  int dtype() const { return bf16 ? kBFloat16 : kFloat32; }
  int64_t width() const { return parts[kQ].columns; }
  int64_t inner() const { return parts[kGate].rows; }
  void* take(Work& room, int64_t count) const {
    return bf16 ? static_cast<void*>(room.take<BF16>(count)) : static_cast<void*>(room.take<float>(count));
  }
};

// What the backward pass finds; values in bf16 or float32 as the layer's own.
struct Kept {
  void *n, *q, *k, *v, *attended, *h, *n_behind;  // q and k turned
  float *inverse, *inverse_behind, *lse;
  float* inverse_of_heads[2];
  struct {
    void *down, *up, *u, *y;  // y null where nobody needs it
  } of[kParts];
};

Kept kept_of(const Decoder& d, Work& room) {
  const int64_t values = d.tokens * d.width(), queries = d.tokens * d.heads * d.D, keys = d.tokens * d.groups * d.D;
  Kept kept = {d.take(room, values),  d.take(room, queries), d.take(room, keys),  d.take(room, keys),
               d.take(room, queries), d.take(room, values),  d.take(room, values)};
  kept.inverse = room.take<float>(d.tokens), kept.inverse_behind = room.take<float>(d.tokens);
  kept.lse = room.take<float>(d.tokens * d.heads);
  for (int i = 0; i < kParts; ++i) {
    const Projection& p = d.parts[i];
    const bool normed = i < kV && d.norms[2 + i] != nullptr;
    const bool needed = p.m != nullptr || i == kGate || i == kUp || normed;
    if (normed) kept.inverse_of_heads[i] = room.take<float>(d.tokens * p.rows / d.D);
    kept.of[i] = {d.take(room, p.rank * p.columns), d.take(room, p.rows * p.rank), d.take(room, d.tokens * p.rank),
                  i == kV && (p.m == nullptr || p.bias == nullptr) ? kept.v
                  : needed                                         ? d.take(room, d.tokens * p.rows)
                                                                   : nullptr};
  }
  return kept;
}

Weight weight_of(const Projection& p) {
  return {p.packed,
          p.absmax,
          p.nested,
          p.offset,
          p.levels,
          nullptr,
          p.rows,
          p.columns,
          int32_t(p.block_shift),
          int32_t(p.nested_shift)};
}

void widen(const Decoder& d, const void* from, int64_t n, float* to) {
  parallel(ceil_div(n, kPiece), int(d.threads), [&](int64_t i) {
    for (int64_t k = i * kPiece; k < minimum(n, (i + 1) * kPiece); ++k)
      to[k] = to_float(static_cast<const BF16*>(from)[k]);
  });
}

void round_to_bf16(const Decoder& d, const float* from, int64_t n, void* to) {
  parallel(ceil_div(n, kPiece), int(d.threads), [&](int64_t i) {
    kernels->scaled(kBFloat16, from + i * kPiece, 1, minimum(kPiece, n - i * kPiece), 1.0f, nullptr,
                    static_cast<BF16*>(to) + i * kPiece);
  });
}

// sum [tokens, columns] = x plus a row.
void add_row(const Decoder& d, const void* x, const void* row, int64_t columns, void* sum) {
  const int64_t width = columns * (d.bf16 ? 2 : 4), step = ceil_div(kPiece, columns);
  parallel(ceil_div(d.tokens, step), int(d.threads), [&](int64_t i) {
    for (int64_t t = i * step; t < minimum(d.tokens, (i + 1) * step); ++t)
      kernels->add(Dtype(d.dtype()), static_cast<const char*>(x) + t * width, row, columns,
                   static_cast<char*>(sum) + t * width);
  });
}

// As `Kept` has it in float32: itself, or made in `room`.
const float* wide(const Decoder& d, const void* values, int64_t n, Work& room) {
  if (!d.bf16) return static_cast<const float*>(values);
  float* const made = room.take<float>(n);
  widen(d, values, n, made);
  return made;
}

void forward(const Decoder& d, Part part, const Kept& kept, const void* x, void* y, Work room) {
  const Projection& p = d.parts[part];
  const Weight weight = weight_of(p);
  const auto& own = kept.of[part];
  float* const u = d.bf16 ? room.take<float>(d.tokens * p.rank) : static_cast<float*>(own.u);
  qlora_layer_forward(&weight, p.factors, int(d.by_integers), int(d.bf16), x, d.tokens, x, p.A, p.B, p.m,
                      int(p.makes_n), p.rank, float(p.scaling), d.work, own.down, own.up, u, y, int(d.threads));
  if (d.bf16) round_to_bf16(d, u, d.tokens * p.rank, own.u);
}

// q or k as it is turned, of what its projection made: with a bias, and its heads normalized.
const void* to_turn(const Decoder& d, Part part, const Kept& kept, void* made, Work& room) {
  const Projection& p = d.parts[part];
  if (p.bias != nullptr) {
    void* const sum = kept.of[part].y == nullptr ? made : d.take(room, d.tokens * p.rows);
    add_row(d, made, p.bias, p.rows, sum);
    made = sum;
  }
  if (d.norms[2 + part] == nullptr) return made;
  void* const normal = d.take(room, d.tokens * p.rows);
  qlora_rms_norm(d.dtype(), made, nullptr, d.norms[2 + part], d.tokens * p.rows / d.D, d.D, float(d.eps[2 + part]),
                 nullptr, normal, kept.inverse_of_heads[part], int(d.threads));
  return normal;
}

// y: what the layer made, where dm is a sum over it; dx null: not wanted.
void backward(const Decoder& d, Part part, const Kept& kept, const void* dy, const void* x, const void* y, void* dx,
              Work room) {
  const Projection& p = d.parts[part];
  const Weight weight = weight_of(p);
  const auto& own = kept.of[part];
  const float *const down = wide(d, own.down, p.rank * p.columns, room),
                     *const up = wide(d, own.up, p.rows * p.rank, room),
                     *const u = wide(d, own.u, d.tokens * p.rank, room);
  qlora_layer_backward(&weight, p.factors, int(d.by_integers), int(d.bf16), dy, x, down, up, u,
                       p.m == nullptr ? nullptr : y, d.tokens, p.rank, float(p.scaling),
                       p.m == nullptr ? nullptr : p.factors + p.rows, d.work, dx, p.dA, p.dB, p.dm, int(d.threads));
}

// views: as `qlora_attention` takes them, dense; of `given` the first are read and the others written.
void attend(const Decoder& d, const Kept& kept, int is_backward, void* const* given, Work room) {
  const int count = is_backward ? 8 : 4, read = is_backward ? 5 : 3;
  const int64_t heads[] = {d.heads, d.groups, d.groups, d.heads, d.heads, d.groups, d.groups};
  Heads views[8];
  for (int i = 0; i < count; ++i) {
    const int64_t own = is_backward && i == 0 ? d.heads : heads[i - is_backward], n = d.tokens * own * d.D;
    views[i] = {given[i], own * d.D, d.D};
    if (!d.widened) continue;
    views[i].data = room.take<float>(n);
    if (i < read) widen(d, given[i], n, static_cast<float*>(views[i].data));
  }
  qlora_attention(is_backward, !d.bf16 || d.widened, views, kept.lse, d.starts, d.lengths, d.examples, d.tokens,
                  d.heads, d.groups, d.D, float(d.scale), d.work, int(d.threads));
  for (int i = read; d.widened && i < count; ++i)
    round_to_bf16(d, static_cast<float*>(views[i].data), d.tokens * views[i].token, given[i]);
}

// What passes in the backward pass: three rooms that serve one after the other, the gradient of h, and that of k before
// it was turned.
struct Passing {
  void *a, *b, *c, *dh, *dk;
  float *dots, *partial;
};

Passing passing_of(const Decoder& d, Work& room) {
  int64_t most = d.inner();
  for (const int64_t columns : {d.width(), d.heads * d.D, 2 * d.groups * d.D}) most = columns > most ? columns : most;
  Passing made = {d.take(room, d.tokens * most), d.take(room, d.tokens * most), d.take(room, d.tokens * most),
                  d.take(room, d.tokens * d.width()), d.take(room, d.tokens * d.groups * d.D)};
  if (d.parts[kGate].m == nullptr) return made;
  made.dots = room.take<float>(2 * d.inner());
  made.partial = room.take<float>(qlora_partials(d.tokens) * 2 * d.inner());
  return made;
}

// What a product takes of `passing` in float32, at most.
int64_t widened_bytes(const Decoder& d) {
  int64_t most = 0;
  for (const Projection& p : d.parts) {
    Work room{nullptr};
    for (const int64_t n : {p.rank * p.columns, p.rows * p.rank, d.tokens * p.rank}) room.take<float>(d.bf16 ? n : 0);
    most = room.bytes() > most ? room.bytes() : most;
  }
  return most;
}

int64_t attention_bytes(const Decoder& d, int is_backward) {
  Work room{nullptr};
  for (int i = 0; d.widened && i < (is_backward ? 4 : 2); ++i)
    for (const int64_t heads : {d.heads, d.groups}) room.take<float>(d.tokens * heads * d.D);
  return room.bytes();
}

}  // namespace

extern "C" {

// Bytes of `kept`, of `passing` forward and backward, and of `work`; all aligned to 64. Of what the layer points to,
// only the lengths are read.
void qlora_decoder_bytes(const char* layer, int64_t* bytes) {
  const Decoder& d = *reinterpret_cast<const Decoder*>(layer);
  Work kept{nullptr}, narrow{nullptr}, wide{nullptr}, back{nullptr};
  kept_of(d, kept);
  for (const Part part : {kQ, kK})
    for (const bool more : {true, d.parts[part].bias != nullptr, d.norms[2 + part] != nullptr})
      if (more) d.take(narrow, d.tokens * d.parts[part].rows);
  d.take(wide, d.tokens * d.inner());
  d.take(wide, d.tokens * d.width());
  passing_of(d, back);
  const int64_t forward = narrow.bytes() > wide.bytes() ? narrow.bytes() : wide.bytes(), own = widened_bytes(d);
  bytes[0] = kept.bytes();
  for (int i = 0; i < 2; ++i) {
    const int64_t attention = attention_bytes(d, i);
    bytes[1 + i] = (i ? back.bytes() : forward) + (attention > own ? attention : own);
  }
  bytes[3] = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t attention = qlora_attention_bytes(i, !d.bf16 || d.widened, d.lengths, d.examples, d.tokens, d.heads,
                                                    d.groups, d.D, int(d.threads));
    bytes[3] = attention > bytes[3] ? attention : bytes[3];
  }
  for (const Projection& p : d.parts) {
    const int64_t product =
        qlora_layer_bytes(int(d.by_integers), int(d.bf16), d.tokens, p.rows, p.columns, p.rank, int(d.threads));
    bytes[3] = product > bytes[3] ? product : bytes[3];
  }
}

// y = h + down(silu(gate(n')) up(n')), n' = norm'(h), h = x + o(attention(q(n), k(n), v(n))), n = norm(x), q and k
// turned. x and y [tokens, width].
void qlora_decoder_forward(const char* layer) {
  const Decoder& d = *reinterpret_cast<const Decoder*>(layer);
  const int dtype = d.dtype(), threads = int(d.threads);
  const int64_t width = d.width(), hidden_size = d.tokens * d.inner(), values = d.tokens * width;
  Work keeping{d.kept};
  const Kept kept = kept_of(d, keeping);
  const auto result = [&](Part part, Work& room) {
    void* const own = kept.of[part].y;
    return own != nullptr ? own : d.take(room, d.tokens * d.parts[part].rows);
  };

  qlora_rms_norm(dtype, d.x, nullptr, d.norms[0], d.tokens, width, float(d.eps[0]), nullptr, kept.n, kept.inverse,
                 threads);
  Work room{d.passing};
  void *const q = result(kQ, room), *const k = result(kK, room);
  forward(d, kQ, kept, kept.n, q, room);
  forward(d, kK, kept, kept.n, k, room);
  forward(d, kV, kept, kept.n, kept.of[kV].y, room);
  const Projection& of_v = d.parts[kV];
  if (of_v.bias != nullptr) add_row(d, kept.of[kV].y, of_v.bias, of_v.rows, kept.v);
  const void *const queries = to_turn(d, kQ, kept, q, room), *const keys = to_turn(d, kK, kept, k, room);
  qlora_rotate(dtype, 0, queries, d.heads * d.D, d.heads, keys, d.groups * d.D, d.groups, d.D, d.tokens, d.cos, d.sin,
               d.tokens, kept.q, kept.k, threads);
  room = Work{d.passing};
  void* const views[] = {kept.q, kept.k, kept.v, kept.attended};
  attend(d, kept, 0, views, room);
  void* const attended = result(kO, room);
  forward(d, kO, kept, kept.attended, attended, room);
  qlora_rms_norm(dtype, d.x, attended, d.norms[1], d.tokens, width, float(d.eps[1]), kept.h, kept.n_behind,
                 kept.inverse_behind, threads);
  room = Work{d.passing};
  forward(d, kGate, kept, kept.n_behind, kept.of[kGate].y, room);
  forward(d, kUp, kept, kept.n_behind, kept.of[kUp].y, room);
  void *const hidden = d.take(room, hidden_size), *const made = result(kDown, room);
  qlora_swiglu(dtype, kept.of[kGate].y, kept.of[kUp].y, hidden_size, hidden, threads);
  forward(d, kDown, kept, hidden, made, room);
  qlora_add(dtype, kept.h, made, values, d.y, threads);
}

// Of that forward pass: dx from dy unless null, and dA, dB and dm of each projection.
void qlora_decoder_backward(const char* layer) {
  const Decoder& d = *reinterpret_cast<const Decoder*>(layer);
  const int dtype = d.dtype(), threads = int(d.threads);
  const int64_t width = d.width(), hidden_size = d.tokens * d.inner(), values = d.tokens * width,
                keys = d.tokens * d.groups * d.D;
  Work keeping{d.kept}, room{d.passing};
  const Kept kept = kept_of(d, keeping);
  const Passing at = passing_of(d, room);
  const void *const gate = kept.of[kGate].y, *const up = kept.of[kUp].y;

  qlora_swiglu(dtype, gate, up, hidden_size, at.a, threads);  // not kept
  backward(d, kDown, kept, d.dy, at.a, kept.of[kDown].y, at.b, room);
  if (at.dots == nullptr) {
    qlora_swiglu_backward(dtype, at.b, gate, up, hidden_size, at.a, at.c, threads);
  } else {
    qlora_swiglu_backward_dots(dtype, at.b, gate, up, d.tokens, d.inner(), at.a, at.c, at.partial, at.dots, threads);
    for (const Part part : {kGate, kUp}) {
      const Projection& p = d.parts[part];
      const float *const dots = at.dots + (part == kUp) * p.rows, *const safe = p.factors + p.rows;
      for (int64_t j = 0; j < p.rows; ++j) p.dm[j] = dots[j] / safe[j];
    }
  }
  backward(d, kUp, kept, at.c, kept.n_behind, nullptr, at.b, room);
  backward(d, kGate, kept, at.a, kept.n_behind, nullptr, at.c, room);
  qlora_add(dtype, at.c, at.b, values, at.c, threads);
  qlora_rms_norm_backward(dtype, at.c, kept.h, d.norms[1], kept.inverse_behind, d.tokens, width, d.dy, at.dh, threads);

  backward(d, kO, kept, at.dh, kept.attended, kept.of[kO].y, at.a, room);
  void* const dv = static_cast<char*>(at.c) + keys * (d.bf16 ? 2 : 4);
  void* const views[] = {at.a, kept.q, kept.k, kept.v, kept.attended, at.b, at.c, dv};
  attend(d, kept, 1, views, room);
  qlora_rotate(dtype, 1, at.b, d.heads * d.D, d.heads, at.c, d.groups * d.D, d.groups, d.D, d.tokens, d.cos, d.sin,
               d.tokens, at.a, at.dk, threads);
  void *dq = at.a, *dk = at.dk, *sum = at.b;
  if (d.norms[2] != nullptr) {
    dq = at.b, dk = at.c, sum = at.a;
    qlora_rms_norm_backward(dtype, at.a, kept.of[kQ].y, d.norms[2], kept.inverse_of_heads[kQ], d.tokens * d.heads, d.D,
                            nullptr, dq, threads);
    qlora_rms_norm_backward(dtype, at.dk, kept.of[kK].y, d.norms[3], kept.inverse_of_heads[kK], d.tokens * d.groups,
                            d.D, nullptr, dk, threads);
  }
  const bool wanted = d.dx != nullptr;
  backward(d, kQ, kept, dq, kept.n, kept.of[kQ].y, wanted ? sum : nullptr, room);
  void* const more = dq;
  for (const Part part : {kK, kV}) {
    backward(d, part, kept, part == kK ? dk : dv, kept.n, kept.of[part].y, wanted ? more : nullptr, room);
    if (wanted) qlora_add(dtype, sum, more, values, sum, threads);
  }
  if (wanted) qlora_rms_norm_backward(dtype, sum, d.x, d.norms[0], kept.inverse, d.tokens, width, at.dh, d.dx, threads);
}

}  // extern "C"
