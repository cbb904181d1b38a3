// Vector loops of varlen_attention: csrc/varlen_attention.h says what it computes.
#include "cpu/vec/varlen_attention.h"

#include "cpu/vec/vec.h"

#include <limits>

namespace fastppo::CPU_CAPABILITY {

namespace {

// Sums that stay in registers: 6 x 4 of the 32 of AVX-512, 6 x 2 of the 16 of AVX2.
constexpr int64_t kVectors = kLanes >= 16 ? 4 : 2;

// A factor that is read one number at a time; either step may be 1, so this is a matrix or its transpose.
struct Factor {
  const float* data;
  int64_t row, step;
};

// c[m][n] = (or +=) sum_k a[m][k] b[k][n] for M rows and V registers of columns.
template <int M, int V>
void product(const Factor& a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t steps, bool add) {
  Vec sums[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      sums[m][v] = add ? Vec::loadu(c + m * ldc + v * kLanes) : Vec(0.0f);
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    Vec row[V];
    for (int v = 0; v < V; ++v) {
      row[v] = Vec::loadu(b + k * ldb + v * kLanes);
    }
    for (int m = 0; m < M; ++m) {
      const Vec factor(a.data[m * a.row + k * a.step]);
      for (int v = 0; v < V; ++v) {
        sums[m][v] = at::vec::fmadd(factor, row[v], sums[m][v]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      sums[m][v].store(c + m * ldc + v * kLanes);
    }
  }
}

template <int V>
void product_columns(
    int64_t rows, Factor a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t steps, bool add) {
  const auto advance = [&](int64_t m) {
    a.data += m * a.row;
    c += m * ldc;
    rows -= m;
  };
  while (rows >= 6) {
    product<6, V>(a, b, ldb, c, ldc, steps, add);
    advance(6);
  }
  if (rows >= 4) {
    product<4, V>(a, b, ldb, c, ldc, steps, add);
    advance(4);
  }
  if (rows >= 2) {
    product<2, V>(a, b, ldb, c, ldc, steps, add);
    advance(2);
  }
  if (rows >= 1) {
    product<1, V>(a, b, ldb, c, ldc, steps, add);
  }
}

// c (rows x columns) = (or +=) a b; columns are whole registers.
void multiply(
    int64_t rows, int64_t columns, int64_t steps, const Factor& a, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  int64_t n = 0;
  for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes) {
    product_columns<kVectors>(rows, a, b + n, ldb, c + n, ldc, steps, add);
  }
  for (; n < columns; n += kLanes) {
    product_columns<1>(rows, a, b + n, ldb, c + n, ldc, steps, add);
  }
}

void load_token(const Heads& x, int64_t token, int64_t head, int64_t width, float* out) {
  load(x.tokens, token, head * x.head, width, out);
}

void store_token(const Heads& x, int64_t token, int64_t head, int64_t width, const float* from) {
  store(from, width, x.tokens.dtype, const_cast<void*>(x.tokens.data), token * x.tokens.stride + head * x.head);
}

// One head's tokens as rows, `padded` apart.
void load_rows(const Heads& x, int64_t tokens, int64_t width, int64_t padded, float* out) {
  for (int64_t j = 0; j < tokens; ++j) {
    load_token(x, j, 0, width, out + j * padded);
  }
}

// One head's tokens as columns: out (padded, columns), 0 past the last token. `rows` holds kLanes tokens meanwhile.
void load_columns(
    const Heads& x, int64_t tokens, int64_t width, int64_t padded, int64_t columns, float* rows, float* out) {
  for (int64_t begin = 0; begin < columns; begin += kLanes) {
    const int64_t n = std::max<int64_t>(0, std::min(kLanes, tokens - begin));
    for (int64_t j = 0; j < n; ++j) {
      load_token(x, begin + j, 0, width, rows + j * padded);
    }
    std::fill(rows + n * padded, rows + kLanes * padded, 0.0f);
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t j = 0; j < kLanes; ++j) {
        out[d * columns + begin + j] = rows[j * padded + d];
      }
    }
  }
}

// Some queries of a sequence and what they see. Row h * count + i of a tile is head h of query begin + i.
struct Tile {
  int64_t begin, count, rows;
  int64_t first, last; // keys [first, last), whole registers of them

  Tile(const VarlenAttentionArgs& args, int64_t from) : begin(from) {
    count = std::min(kVarlenQueries, args.queries - begin);
    rows = count * args.group;
    const int64_t offset = args.keys - args.queries;
    first = std::max<int64_t>(0, begin + offset + 1 - args.window) / kLanes * kLanes;
    last = round_up(begin + count + offset);
  }
};

// f(head, query, row of the tile, from, to): the row sees keys [from, to).
template <class Function>
void for_each_row(const VarlenAttentionArgs& args, const Tile& tile, const Function& f) {
  const int64_t offset = args.keys - args.queries;
  for (int64_t h = 0; h < args.group; ++h) {
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t to = tile.begin + i + offset + 1, from = std::max<int64_t>(0, to - args.window);
      f(h, tile.begin + i, h * tile.count + i, from, to);
    }
  }
}

void load_tile(const Heads& x, const VarlenAttentionArgs& args, const Tile& tile, int64_t padded, float* out) {
  for (int64_t h = 0; h < args.group; ++h) {
    for (int64_t i = 0; i < tile.count; ++i) {
      load_token(x, tile.begin + i, h, args.width, out + (h * tile.count + i) * padded);
    }
  }
}

// Queries times scale, and their scores against keys [tile.first, tile.last).
void tile_scores(
    const VarlenAttentionArgs& args, const Tile& tile, const float* keys, int64_t columns, int64_t padded, float* query,
    float* scores) {
  load_tile(args.query, args, tile, padded, query);
  const Vec scale(args.scale);
  for (int64_t x = 0; x < tile.rows * padded; x += kLanes) {
    (Vec::loadu(query + x) * scale).store(query + x);
  }
  multiply(
      tile.rows, tile.last - tile.first, args.width, {query, padded, 1}, keys + tile.first, columns,
      scores + tile.first, columns, false);
}

// What a row does not see of its tile: -inf.
void mask(float* scores, const Tile& tile, int64_t from, int64_t to) {
  std::fill(scores + tile.first, scores + from, -std::numeric_limits<float>::infinity());
  std::fill(scores + to, scores + tile.last, -std::numeric_limits<float>::infinity());
}

float largest(const float* scores, const Tile& tile) {
  Vec highest = Vec::loadu(scores + tile.first);
  for (int64_t j = tile.first + kLanes; j < tile.last; j += kLanes) {
    highest = at::vec::maximum(highest, Vec::loadu(scores + j));
  }
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, highest);
}

// In place: e^(score - shift), and 0 where a score is -inf: vexp is bounded below. Gives the sum.
float weigh(float* scores, const Tile& tile, float shift) {
  const Vec nothing(-std::numeric_limits<float>::infinity()), zero(0.0f), minus(-shift);
  Vec sums = zero;
  for (int64_t j = tile.first; j < tile.last; j += kLanes) {
    const Vec score = Vec::loadu(scores + j);
    const Vec weight = select(score == nothing, zero, vexp(score + minus));
    weight.store(scores + j);
    sums = sums + weight;
  }
  return static_cast<float>(sum_lanes(sums));
}

} // namespace

void varlen_attention_forward(const VarlenAttentionArgs& args, float* scratch) {
  const int64_t padded = round_up(args.width), columns = round_up(args.keys);
  float* keys = scratch;
  float* values = keys + padded * columns;
  float* query = values + padded * columns;
  float* out = query + args.group * kVarlenQueries * padded;
  float* scores = out + args.group * kVarlenQueries * padded;
  load_columns(args.key, args.keys, args.width, padded, columns, values, keys);
  load_rows(args.value, args.keys, args.width, padded, values);
  for (int64_t begin = 0; begin < args.queries; begin += kVarlenQueries) {
    const Tile tile(args, begin);
    tile_scores(args, tile, keys, columns, padded, query, scores);
    for_each_row(args, tile, [&](int64_t h, int64_t i, int64_t r, int64_t from, int64_t to) {
      float* row = scores + r * columns;
      mask(row, tile, from, to);
      const float highest = largest(row, tile), sum = weigh(row, tile, highest);
      args.lse[h * args.lse_head + i] = highest + std::log(sum);
      const Vec inverse(1.0f / sum);
      for (int64_t j = tile.first; j < tile.last; j += kLanes) {
        (Vec::loadu(row + j) * inverse).store(row + j);
      }
    });
    const int64_t seen = std::min(tile.last, args.keys);
    multiply(
        tile.rows, padded, seen - tile.first, {scores + tile.first, columns, 1}, values + tile.first * padded, padded,
        out, padded, false);
    for_each_row(args, tile, [&](int64_t h, int64_t i, int64_t r, int64_t, int64_t) {
      store_token(args.out, i, h, args.width, out + r * padded);
    });
  }
}

void varlen_attention_backward(const VarlenAttentionArgs& args, float* scratch) {
  const int64_t padded = round_up(args.width), columns = round_up(args.keys), size = padded * columns;
  const int64_t tile_size = args.group * kVarlenQueries * padded;
  float* key_columns = scratch;
  float* value_columns = key_columns + size;
  float* key_rows = value_columns + size;
  float* grad_keys = key_rows + size;
  float* grad_values = grad_keys + size;
  float* query = grad_values + size;
  float* grad = query + tile_size;
  float* grad_query = grad + tile_size;
  float* weights = grad_query + tile_size;
  float* slopes = weights + args.group * kVarlenQueries * columns;
  load_columns(args.key, args.keys, args.width, padded, columns, key_rows, key_columns);
  load_columns(args.value, args.keys, args.width, padded, columns, key_rows, value_columns);
  load_rows(args.key, args.keys, args.width, padded, key_rows);
  std::fill(grad_keys, grad_keys + 2 * size, 0.0f);
  for (int64_t begin = 0; begin < args.queries; begin += kVarlenQueries) {
    const Tile tile(args, begin);
    const int64_t seen = std::min(tile.last, args.keys) - tile.first;
    tile_scores(args, tile, key_columns, columns, padded, query, weights);
    load_tile(args.grad, args, tile, padded, grad);
    load_tile(args.out, args, tile, padded, grad_query); // out for now
    multiply(
        tile.rows, tile.last - tile.first, args.width, {grad, padded, 1}, value_columns + tile.first, columns,
        slopes + tile.first, columns, false);
    for_each_row(args, tile, [&](int64_t h, int64_t i, int64_t r, int64_t from, int64_t to) {
      float *row = weights + r * columns, *slope = slopes + r * columns;
      mask(row, tile, from, to);
      weigh(row, tile, args.lse[h * args.lse_head + i]);
      Vec products(0.0f);
      for (int64_t d = 0; d < padded; d += kLanes) {
        products = at::vec::fmadd(Vec::loadu(grad + r * padded + d), Vec::loadu(grad_query + r * padded + d), products);
      }
      const Vec delta(static_cast<float>(sum_lanes(products)));
      for (int64_t j = tile.first; j < tile.last; j += kLanes) {
        (Vec::loadu(row + j) * (Vec::loadu(slope + j) - delta)).store(slope + j);
      }
    });
    // The queries hold the scale already, so the keys' gradient has it; the queries' own gets it at the end.
    multiply(
        seen, padded, tile.rows, {slopes + tile.first, 1, columns}, query, padded, grad_keys + tile.first * padded,
        padded, true);
    multiply(
        seen, padded, tile.rows, {weights + tile.first, 1, columns}, grad, padded, grad_values + tile.first * padded,
        padded, true);
    multiply(
        tile.rows, padded, seen, {slopes + tile.first, columns, 1}, key_rows + tile.first * padded, padded, grad_query,
        padded, false);
    const Vec scale(args.scale);
    for (int64_t x = 0; x < tile.rows * padded; x += kLanes) {
      (Vec::loadu(grad_query + x) * scale).store(grad_query + x);
    }
    for_each_row(args, tile, [&](int64_t h, int64_t i, int64_t r, int64_t, int64_t) {
      store_token(args.grad_query, i, h, args.width, grad_query + r * padded);
    });
  }
  for (int64_t j = 0; j < args.keys; ++j) {
    store_token(args.grad_key, j, 0, args.width, grad_keys + j * padded);
    store_token(args.grad_value, j, 0, args.width, grad_values + j * padded);
  }
}

} // namespace fastppo::CPU_CAPABILITY
