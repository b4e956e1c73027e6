// Runs cuda/decode_attention.cu on random batches and compares with attention in float64.
// The kernel's source comes before this file; argument: number of batches.

using cpu::draw;
using cpu::from_bf16;
using cpu::to_bf16;

namespace {

constexpr uint16 POISON = 0x7fc1;

int random_length(int kind) {
  if (draw() % 10 == 0) return 1;
  if (kind == 0) return 1 + draw() % 40;
  if (kind == 1) return 1 + draw() % 400;
  if (kind == 2) return 1 + draw() % (draw() % 4 == 0 ? 900 : 30);
  return kind == 3 ? 16 * (1 + draw() % 12) : draw() % 50;  // the last: also rows without keys
}

struct Batch {
  int rows, kv_heads, blocks, table_stride, qkv_stride, out_stride;
  std::vector<int> kv_lens, row_ids, table;
  std::vector<uint16> k, v, qkv;

  explicit Batch(int seed) {
    draw.seed(seed);
    rows = 1 + draw() % (seed % 3 == 0 ? 3 : seed % 3 == 1 ? 20 : 70);
    kv_heads = 1 + draw() % (seed % 4 == 3 ? 8 : 4);
    blocks = seed % 5 == 4 ? 20 : 1 + draw() % 5;
    const int kind = draw() % 5;
    int pages = 0, longest = 1;
    for (int row = 0; row < rows; ++row) {
      kv_lens.push_back(random_length(kind));
      row_ids.push_back(2 * row + 1);
      pages += num_pages(kv_lens.back());
      longest = max(longest, num_pages(kv_lens.back()));
    }
    std::shuffle(row_ids.begin(), row_ids.end(), draw);
    std::vector<int> free;
    for (int page = 0; page < pages + 3; ++page) free.push_back(page);
    std::shuffle(free.begin(), free.end(), draw);
    // Keys and values that no request has are NaN.
    k.assign(free.size() * kv_heads * PAGE * HEAD_DIM, POISON);
    v = k;
    table_stride = longest + draw() % 3;
    table.assign(rows * table_stride, 0);
    std::normal_distribution<float> normal;
    const float loud = seed % 4 == 1 ? 6 : 1;
    for (int row = 0; row < rows; ++row)
      for (int key = 0; key < kv_lens[row]; ++key) {
        if (key % PAGE == 0) {
          table[row * table_stride + key / PAGE] = free.back();
          free.pop_back();
        }
        for (int head = 0; head < kv_heads; ++head)
          for (int h = 0; h < HEAD_DIM; ++h) {
            k[cell(row, key, head) + h] = to_bf16(normal(draw) * loud);
            v[cell(row, key, head) + h] = to_bf16(normal(draw));
          }
      }
    qkv_stride = (GROUP + 2) * kv_heads * HEAD_DIM + 8 * (draw() % 2);
    out_stride = GROUP * kv_heads * HEAD_DIM + 8 * (draw() % 2);
    qkv.resize((2 * rows + 1) * qkv_stride);
    for (uint16& x : qkv) x = to_bf16(normal(draw));
  }

  long cell(int row, int key, int head) const {
    const long page = table[row * table_stride + key / PAGE];
    return ((page * kv_heads + head) * PAGE + key % PAGE) * HEAD_DIM;
  }

  std::vector<uint16> run(bool is_backwards) const {
    const int workers = blocks * WARPS;
    std::vector<float4> partials(2 * workers * WORK_CELLS, float4{NAN, NAN, NAN, NAN});
    std::vector<int> arrivals(workers, 0);
    std::vector<uint16> out((2 * rows + 1) * out_stride, POISON);
    const long pool_blocks = k.size() / (PAGE * HEAD_DIM);
    const cpu::Pool pools[] = {{k.data(), pool_blocks}, {v.data(), pool_blocks}};
    TensorMap maps[2];
    for (int i = 0; i < 2; ++i) memcpy(&maps[i], &pools[i], sizeof pools[i]);
    cpu::shared_base = 1024 + 16 * (draw() % 64);
    for (int i = 0; i < blocks; ++i)
      cpu::run_block(is_backwards ? blocks - 1 - i : i, blocks, THREADS, [&] {
        decode_attention(maps[0], maps[1], reinterpret_cast<const uint32*>(qkv.data()),
                         reinterpret_cast<uint32*>(out.data()), row_ids.data(), kv_lens.data(),
                         table.data(), partials.data(), arrivals.data(), rows, kv_heads,
                         table_stride, qkv_stride, out_stride,
                         1.4426950408889634f / std::sqrt(float(HEAD_DIM)));
      });
    for (int arrived : arrivals)
      if (arrived != 0) cpu::fail("a counter is not back at zero");
    return out;
  }

  // Largest relative error of a query head's output.
  double check(const std::vector<uint16>& out) const {
    std::vector<char> is_written(out.size(), 0);
    double worst = 0;
    for (int row = 0; row < rows; ++row)
      for (int head = 0; head < GROUP * kv_heads && kv_lens[row] > 0; ++head) {
        std::vector<double> weights(kv_lens[row]), exact(HEAD_DIM, 0);
        const uint16* q = &qkv[row_ids[row] * qkv_stride + head * HEAD_DIM];
        double sum = 0, error = 0, norm = 0;
        for (int key = 0; key < kv_lens[row]; ++key) {
          double score = 0;
          for (int h = 0; h < HEAD_DIM; ++h)
            score += double(from_bf16(q[h])) * from_bf16(k[cell(row, key, head / GROUP) + h]);
          weights[key] = std::exp(score / std::sqrt(double(HEAD_DIM)));
          sum += weights[key];
        }
        for (int key = 0; key < kv_lens[row]; ++key)
          for (int h = 0; h < HEAD_DIM; ++h)
            exact[h] += weights[key] / sum * from_bf16(v[cell(row, key, head / GROUP) + h]);
        for (int h = 0; h < HEAD_DIM; ++h) {
          const size_t at = row_ids[row] * out_stride + head * HEAD_DIM + h;
          is_written[at] = 1;
          error += std::pow(from_bf16(out[at]) - exact[h], 2);
          norm += exact[h] * exact[h];
        }
        if (!(error < norm)) cpu::fail("an output is NaN or far off");
        worst = max(worst, std::sqrt(error / norm));
      }
    for (size_t at = 0; at < out.size(); ++at)
      if (is_written[at] == 0 && out[at] != POISON) cpu::fail("a row of nobody was written");
    return worst;
  }
};

}  // namespace

int main(int, char** arguments) {
  double worst = 0;
  for (int seed = 0; seed < atoi(arguments[1]); ++seed) {
    const Batch batch(seed);
    const std::vector<uint16> out = batch.run(false);
    worst = max(worst, batch.check(out));
    if (batch.run(true) != out) cpu::fail("another order of blocks gives other bits");
  }
  printf("%g\n", worst);
}
