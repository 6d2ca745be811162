// Fake quantization on a CPU: each operator passes once over memory and saves one byte a value for its backward pass.
//
// What is computed, to the last bit, is in reference.py. Words: step d, smallest and largest code lo and hi; codes are
// `apart` = 1 apart, or 2: odd ones, without 0.
//
// Bytes of an activation: bit 6 says that x is in [lo d, hi d], bit 7 that x > 0, the lower six are code - lo if
// hi - lo < 64. Bytes of a weight: code - lo. Sums are those of fixed pieces, so they do not depend on the threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 4
using MaybeTensor = c10::optional<Tensor>;
at::ScalarType type_in_use(const Tensor& x) { // that of autocast, where it is on
  return at::autocast::is_cpu_enabled() ? at::autocast::get_autocast_cpu_dtype() : x.scalar_type();
}
#else
using MaybeTensor = std::optional<Tensor>;
at::ScalarType type_in_use(const Tensor& x) {
  return at::autocast::is_autocast_enabled(at::kCPU) ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
}
#endif

constexpr uint8_t CODE = 63, INSIDE = 64, POSITIVE = 128;
constexpr int64_t PIECE = 1 << 15; // values whose sum is one partial sum
constexpr int64_t GRAIN = 2; // pieces that are not worth another thread

// ---- numbers ------------------------------------------------------------------------------------------------------

struct BFloat16 { // as c10::BFloat16, without a branch, so that loops are vectorized
  uint16_t bits;
};

inline float wide(float x) {
  return x;
}

inline float wide(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void store(float* out, float x) {
  *out = x;
}

inline void store(BFloat16* out, float x) { // half to even; the quiet NaN of c10::BFloat16
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  uint16_t rounded = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  out->bits = x != x ? uint16_t(0x7fc0) : rounded;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename F>
auto with_type(at::ScalarType type, F&& body) { // F takes a number of the type
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "float32 or bfloat16 is needed, this is ", type);
  return type == at::kFloat ? body(float()) : body(BFloat16());
}

struct Range {
  float divisor, step, lo, hi;

  Range(float step, int64_t lo, int64_t hi) : divisor(step > 0 ? step : 1), step(step), lo(lo), hi(hi) {}

  float clipped(float q) const { // NaN stays NaN
    q = q < lo ? lo : q;
    return q > hi ? hi : q;
  }

  float code(float x) const {
    return clipped(std::nearbyint(x / divisor));
  }

  float odd_code(float x) const {
    return clipped(2 * std::floor(x / divisor * 0.5f) + 1);
  }
};

// ---- loops over values of one step ---------------------------------------------------------------------------------

struct Sum {
  double total = 0;
  int64_t count = 0;
  bool outside = false; // whether a value is outside of the range
};

enum Save { NOTHING, BITS, CODES };

template <Save SAVE, bool ADD, bool COUNT, typename In, typename Out>
Sum quantize_values(const In* x, Out* out, uint8_t* codes, int64_t n, Range range) {
  double total = 0;
  int count = 0, beyond = 0;
  const int lowest = int(range.lo);
  const float low = range.lo * range.step, high = range.hi * range.step;
#pragma omp simd reduction(+ : total, count) reduction(| : beyond)
  for (int64_t i = 0; i < n; i++) {
    float v = wide(x[i]), q = range.code(v);
    store(out + i, q * range.step);
    if (SAVE != NOTHING) {
      int byte = SAVE == CODES ? int(q) - lowest : 0, outside = (v < low) | (v > high);
      beyond |= outside;
      byte |= outside ? 0 : INSIDE;
      byte |= v > 0 ? POSITIVE : 0;
      codes[i] = uint8_t(byte);
    }
    if (ADD)
      total += double(std::fabs(v));
    if (COUNT)
      count += v != 0;
  }
  return {total, COUNT ? count : n, beyond != 0};
}

template <typename T>
void restore_values(const uint8_t* codes, T* out, int64_t n, float step, int lo, int mask) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    store(out + i, float(int(codes[i] & mask) + lo) * step);
}

// In integers: compilers do not vectorize a choice between structs, and are 70 times slower at bfloat16 without that.
template <uint8_t FLAGS, typename T>
void mask_values(const T* grad, const uint8_t* codes, T* out, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  auto* from = reinterpret_cast<const Bits*>(grad);
  auto* to = reinterpret_cast<Bits*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    to[i] = from[i] & Bits(-int((codes[i] & FLAGS) == FLAGS));
}

template <typename G>
void mask_by_range(const G* grad, const float* x, float* out, int64_t n, Range range, int apart) {
  const float beyond = apart - 1, low = (range.lo - beyond) * range.step, high = (range.hi + beyond) * range.step;
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    out[i] = (x[i] < low) | (x[i] > high) ? 0 : wide(grad[i]);
}

// The gradient of x, and the sum of grad * dQ/dd over these values.
template <bool WITHIN, typename T>
double learn_values(const T* grad, const T* x, T* out, int64_t n, Range range) {
  const float low = range.lo * range.step, high = range.hi * range.step;
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) {
    float v = wide(x[i]), g = wide(grad[i]), ratio = v / range.divisor, code = range.code(v);
    float slope = (ratio > range.lo) & (ratio < range.hi) ? (WITHIN ? code - ratio : 0) : code;
    total += double(g * slope);
    store(out + i, (v < low) | (v > high) ? 0 : g);
  }
  return total;
}

// ---- tensors ------------------------------------------------------------------------------------------------------

Tensor dense(const Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : x.contiguous();
}

Tensor like(const Tensor& x, at::ScalarType type) { // with its strides
  return at::empty_strided(x.sizes(), x.strides(), x.options().dtype(type));
}

// The same in memory that is used again: fresh pages cost more than what is computed in them. For what nobody keeps.
Tensor scratch(int place, const Tensor& x, at::ScalarType type) {
  static thread_local Tensor memory[2];
  Tensor& m = memory[place];
  int64_t bytes = x.numel() * int64_t(c10::elementSize(type));
  if (!m.defined() || m.numel() < bytes)
    m = Tensor(), m = at::empty({bytes}, at::kByte);
  return at::from_blob(m.mutable_data_ptr(), x.sizes(), x.strides(), x.options().dtype(type).requires_grad(false));
}

// A tensor in the layout of another.
Tensor laid_out(const Tensor& t, const Tensor& layout) {
  return t.strides() == layout.strides() ? t : like(layout, t.scalar_type()).copy_(t);
}

template <typename F>
void in_pieces(int64_t n, F&& body) { // body(piece, first, size)
  int64_t pieces = (n + PIECE - 1) / PIECE;
  at::parallel_for(0, pieces, GRAIN, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++)
      body(p, p * PIECE, std::min(PIECE, n - p * PIECE));
  });
}

// Rows of a weight.
template <typename F>
void in_rows(int64_t rows, int64_t inner, F&& body) { // body(row)
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN * PIECE / std::max<int64_t>(1, inner)), [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++)
      body(r);
  });
}

bool packs(int64_t lo, int64_t hi) {
  return hi - lo < 64;
}

struct Quantized {
  Tensor values;
  Tensor codes, outside; // if they are saved: a byte a value; a byte a piece that says whether a value of it is outside
};

// Quantized values of one step, in `out`; bytes and the sum of |x| where they are wanted.
Quantized quantize(
    const Tensor& x, Tensor out, float step, int64_t lo, int64_t hi, bool save, MaybeTensor sums, bool nonzero) {
  Tensor codes = save ? like(x, at::kByte) : Tensor();
  Range range(step, lo, hi);
  int64_t n = x.numel();
  std::vector<Sum> parts((n + PIECE - 1) / PIECE);
  uint8_t* bytes = save ? codes.mutable_data_ptr<uint8_t>() : nullptr;
  with_type(x.scalar_type(), [&](auto in) {
    with_type(out.scalar_type(), [&](auto result) {
      auto* from = data<decltype(in)>(x);
      auto* to = mutable_data<decltype(result)>(out);
      auto kernel = [&](auto SAVE, auto ADD, auto COUNT) {
        in_pieces(n, [&](int64_t p, int64_t i, int64_t size) {
          parts[p] = quantize_values<SAVE(), ADD(), COUNT()>(
              from + i, to + i, SAVE() == NOTHING ? nullptr : bytes + i, size, range);
        });
      };
      std::true_type yes;
      std::false_type no;
      auto with = [&](auto SAVE) {
        if (!sums)
          kernel(SAVE, no, no);
        else
          nonzero ? kernel(SAVE, yes, yes) : kernel(SAVE, yes, no);
      };
      if (!save)
        with(std::integral_constant<Save, NOTHING>());
      else if (packs(lo, hi))
        with(std::integral_constant<Save, CODES>());
      else
        with(std::integral_constant<Save, BITS>());
    });
  });
  Tensor outside;
  if (save) {
    outside = at::empty({int64_t(parts.size())}, at::kByte);
    std::transform(parts.begin(), parts.end(), outside.mutable_data_ptr<uint8_t>(), [](auto& part) { return part.outside; });
  }
  if (sums) {
    Sum all;
    for (auto& part : parts)
      all = {all.total + part.total, all.count + part.count};
    double* to = sums->mutable_data_ptr<double>();
    to[0] += all.total, to[1] += double(all.count);
  }
  return {out, codes, outside};
}

Tensor restore(const Tensor& codes, float step, int64_t lo, at::ScalarType type) {
  Tensor out = scratch(0, codes, type);
  with_type(type, [&](auto t) {
    auto* to = mutable_data<decltype(t)>(out);
    in_pieces(codes.numel(), [&](int64_t, int64_t i, int64_t size) {
      restore_values(codes.const_data_ptr<uint8_t>() + i, to + i, size, step, int(lo), CODE);
    });
  });
  return out;
}

Tensor restore_weight(const Tensor& codes, const Tensor& steps, int64_t lo, Tensor out) {
  auto type = out.scalar_type();
  int64_t rows = codes.size(0), inner = codes.numel() / rows;
  with_type(type, [&](auto t) {
    auto* to = mutable_data<decltype(t)>(out);
    in_rows(rows, inner, [&](int64_t r) {
      float step = steps.const_data_ptr<float>()[r];
      restore_values(codes.const_data_ptr<uint8_t>() + r * inner, to + r * inner, inner, step, int(lo), 255);
    });
  });
  return out;
}

// A gradient that nobody else holds is masked where it lies.
bool ours(const Tensor& grad) {
  return grad.use_count() == 1 && grad.storage().use_count() == 1 && !at::GradMode::is_enabled() &&
      grad.is_non_overlapping_and_dense();
}

// `pieces`: which pieces have values without the flags; by default all may.
template <uint8_t FLAGS>
Tensor mask(Tensor grad, const Tensor& codes, const Tensor& pieces = {}) {
  bool writable = ours(grad) || grad.strides() != codes.strides();
  Tensor from = laid_out(grad, codes), out = writable ? from : at::empty_like(from);
  const uint8_t* some = writable && pieces.defined() ? pieces.const_data_ptr<uint8_t>() : nullptr;
  with_type(from.scalar_type(), [&](auto t) {
    using T = decltype(t);
    in_pieces(from.numel(), [&](int64_t p, int64_t i, int64_t size) {
      if (!some || some[p])
        mask_values<FLAGS>(data<T>(from) + i, codes.const_data_ptr<uint8_t>() + i, mutable_data<T>(out) + i, size);
    });
  });
  return out;
}

Tensor mask_weight(Tensor grad, const Tensor& weight, const Tensor& steps, int64_t lo, int64_t hi, int64_t apart) {
  bool writable = grad.scalar_type() == at::kFloat && (ours(grad) || grad.strides() != weight.strides());
  Tensor from = laid_out(grad, weight), out = writable ? from : like(weight, at::kFloat);
  int64_t rows = weight.size(0), inner = weight.numel() / rows;
  with_type(from.scalar_type(), [&](auto t) {
    in_rows(rows, inner, [&](int64_t r) {
      mask_by_range(
          data<decltype(t)>(from) + r * inner,
          weight.const_data_ptr<float>() + r * inner,
          out.mutable_data_ptr<float>() + r * inner,
          inner,
          Range(steps.const_data_ptr<float>()[r], lo, hi),
          int(apart));
    });
  });
  return out;
}

void no_second_derivative() {
  TORCH_CHECK(!at::GradMode::is_enabled(), "second derivatives of a quantized layer need GDRQ_KERNELS=off");
}

// ---- ReLU: its backward pass reads the byte that is saved anyway -----------------------------------------------------

// How many functions and tensors hold a node. torch keeps nodes in an intrusive_ptr now, in a shared_ptr before.
template <typename T>
int64_t readers(T* node) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return int64_t(c10::raw::intrusive_ptr::use_count(node));
  else
    return node->shared_from_this().use_count() - 1;
}

template <typename T, typename... Args>
auto new_node(const Args&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return c10::make_intrusive<T>(args...);
  else
    return std::make_shared<T>(args...);
}

// Whether nobody looks at gradients that reach this node, or leave it.
bool is_unseen(torch::autograd::Node& node) {
  return node.pre_hooks().empty() && node.post_hooks().empty() && node.tensor_pre_hooks().empty() &&
      node.retains_grad_hooks().empty();
}

// Stands in the graph in place of a ReLU's backward pass, which would read the output that the ReLU saved in float.
struct PositiveMask : torch::autograd::Node {
  Tensor codes;
  c10::weak_intrusive_ptr<c10::TensorImpl> output; // of the ReLU
  bool masked = false; // whether a layer, the only one who reads the output, does it together with its own mask

  explicit PositiveMask(const Tensor& x) : output(x.getIntrusivePtr()) {}

  // Whether one reader is left, and nobody can look at the gradient between it and this node, now or later.
  bool has_one_reader() {
    return output.expired() && readers(this) == 1 && is_unseen(*this);
  }

  variable_list apply(variable_list&& grads) override {
    no_second_derivative();
    Tensor grad = std::move(grads[0]);
    if (!grad.defined() || masked)
      return {grad};
    TORCH_CHECK(codes.defined(), "Trying to backward through the graph a second time: pass retain_graph=True");
    return {mask<POSITIVE>(std::move(grad), codes)};
  }

  void release_variables() override {
    codes.reset();
  }

  std::string name() const override {
    return "ReluBackward of gdrq_mm";
  }
};

using Relu = decltype(new_node<PositiveMask>(Tensor()));

// If x is the output of a ReLU, a new function of x for those who read it from now on, which waits for the bytes.
Relu in_place_of_relu(const Tensor& x) {
  auto function = x.grad_fn();
  auto* relu = dynamic_cast<torch::autograd::generated::ReluBackward0*>(function.get());
  if (!relu || relu->result_.has_hooks() || x.is_view() || !is_unseen(*relu))
    return Relu();
  Tensor saved = relu->result_.unpack(function); // raises, as ReLU would, if x was changed since
  if (!saved.defined() || saved.const_data_ptr() != x.const_data_ptr() || saved.strides() != x.strides())
    return Relu();
  auto node = new_node<PositiveMask>(x);
  node->set_next_edges(torch::autograd::edge_list(relu->next_edges()));
  node->add_input_metadata(x);
  torch::autograd::impl::set_gradient_edge(x, torch::autograd::Edge(node, 0));
  return node;
}

// Whether the function that made x does without x in its backward pass.
bool is_free(const Tensor& x) {
  auto function = x.grad_fn();
  std::string name = function ? function->name() : "";
  return !x.is_view() &&
      (name == "NativeBatchNormBackward0" || name == "CudnnBatchNormBackward0" || name == "ConvolutionBackward0" ||
       name == "AddmmBackward0" || name.find("::Layer>") != std::string::npos);
}

// ---- fake_quantize ------------------------------------------------------------------------------------------------

struct FakeQuantize : Function<FakeQuantize> {
  static bool saves(const Tensor& x, bool masked, bool grads) {
    return masked && grads && x.requires_grad();
  }

  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, float step, int64_t lo, int64_t hi, bool masked, MaybeTensor sums,
      bool nonzero, bool overwrite, bool grads, Relu relu) {
    Tensor x = dense(input);
    bool save = saves(input, masked, grads);
    overwrite = overwrite && save && x.is_same(input) && is_free(x);
    Tensor to = overwrite ? x : at::empty_like(x);
    auto [out, codes, outside] = quantize(x, to, step, lo, hi, save, sums, nonzero);
    if (save)
      ctx->save_for_backward({codes, outside});
    if (relu)
      relu->codes = codes;
    if (overwrite)
      ctx->mark_dirty({out});
    ctx->saved_data["masked"] = masked;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    no_second_derivative();
    Tensor none, grad = std::move(grads[0]);
    if (grad.defined() && ctx->saved_data["masked"].toBool()) {
      auto kept = ctx->get_saved_variables();
      grad = mask<INSIDE>(std::move(grad), kept[0], kept[1]);
    }
    return {grad, none, none, none, none, none, none, none, none, none};
  }
};

// ---- a layer --------------------------------------------------------------------------------------------------------

struct Geometry { // of a convolution; none for a linear layer
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

Tensor compute(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Geometry& g) {
  if (g.stride.empty())
    return at::linear(x, weight, bias);
  std::vector<int64_t> none(g.stride.size(), 0);
  return at::convolution(x, weight, bias, g.stride, g.padding, g.dilation, false, none, g.groups);
}

std::tuple<Tensor, Tensor, Tensor> compute_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Geometry& g, std::array<bool, 3> wanted) {
  if (!g.stride.empty()) {
    std::vector<int64_t> none(g.stride.size(), 0);
    return at::convolution_backward(
        grad, x, weight, at::OptionalIntArrayRef({weight.size(0)}), g.stride, g.padding, g.dilation, false, none,
        g.groups, wanted);
  }
  Tensor rows = grad.reshape({-1, grad.size(-1)}), gx, gw, gb;
  if (wanted[0])
    gx = rows.mm(weight).reshape(x.sizes());
  if (wanted[1])
    gw = rows.t().mm(x.reshape({-1, x.size(-1)}));
  if (wanted[2])
    gb = rows.sum(0);
  return {gx, gw, gb};
}

struct Layer : Function<Layer> {
  static bool saves(const Tensor& x, const Tensor& weight, int64_t lo, int64_t hi, bool masked, bool grads) {
    return grads && ((masked && x.requires_grad()) || (weight.requires_grad() && packs(lo, hi)));
  }

  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, float d, int64_t lo, int64_t hi, bool masked, MaybeTensor sums,
      bool nonzero, const Tensor& weight, const Tensor& codes, const Tensor& steps, int64_t wlo, int64_t whi,
      bool wmasked, int64_t wapart, MaybeTensor bias, Geometry geometry, at::ScalarType type, bool grads,
      Relu relu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor x = dense(input);
    bool learns = weight.requires_grad(), save = saves(input, weight, lo, hi, masked, grads);
    bool packed = save && packs(lo, hi), keep = grads && learns && !packed; // keep the quantized input itself
    auto [xq, bytes, outside] = quantize(x, keep ? like(x, type) : scratch(0, x, type), d, lo, hi, save, sums, nonzero);
    if (relu)
      relu->codes = bytes;
    MaybeTensor b = bias ? MaybeTensor(bias->to(type)) : MaybeTensor();
    Tensor out = compute(xq, restore_weight(codes, steps, wlo, scratch(1, codes, type)), b, geometry);
    if (!grads)
      return out;
    ctx->save_for_backward({bytes, keep ? xq : Tensor(), weight, codes, steps, outside});
    auto& saved = ctx->saved_data;
    saved["relu"] = reinterpret_cast<int64_t>(relu.get()); // alive as long as this node is, which has an edge to it
    saved["step"] = double(d), saved["lo"] = lo, saved["masked"] = masked, saved["wmasked"] = wmasked;
    saved["wlo"] = wlo, saved["whi"] = whi, saved["wapart"] = wapart, saved["groups"] = geometry.groups, saved["type"] = type;
    saved["stride"] = geometry.stride, saved["padding"] = geometry.padding, saved["dilation"] = geometry.dilation;
    saved["wanted"] = std::vector<bool>{input.requires_grad(), learns, bias && bias->requires_grad()};
    saved["sizes"] = input.sizes().vec(), saved["in"] = input.scalar_type();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    no_second_derivative();
    auto& saved = ctx->saved_data;
    variable_list out(19);
    if (!grads[0].defined())
      return out;
    auto kept = ctx->get_saved_variables();
    Tensor bytes = kept[0], xq = kept[1], weight = kept[2], codes = kept[3], steps = kept[4], outside = kept[5];
    auto type = saved["type"].toScalarType();
    auto flags = saved["wanted"].toBoolList();
    std::array<bool, 3> wanted{flags[0], flags[1], flags[2]};
    Geometry g{saved["stride"].toIntVector(), saved["padding"].toIntVector(), saved["dilation"].toIntVector(),
               saved["groups"].toInt()};
    if (!xq.defined()) // without a gradient of the weight only its shape is read
      xq = wanted[1] ? restore(bytes, float(saved["step"].toDouble()), saved["lo"].toInt(), type)
                     : at::empty({}, weight.options().dtype(type)).expand(saved["sizes"].toIntVector());
    Tensor wq = restore_weight(codes, steps, saved["wlo"].toInt(), scratch(1, codes, type));
    auto [gx, gw, gb] = compute_backward(grads[0], xq, wq, g, wanted);
    xq.reset(), wq.reset(), grads.clear();
    if (wanted[0]) {
      auto* relu = reinterpret_cast<PositiveMask*>(saved["relu"].toInt());
      if (saved["masked"].toBool() && relu && relu->has_one_reader()) {
        gx = mask<INSIDE | POSITIVE>(std::move(gx), bytes);
        relu->masked = true;
      } else if (saved["masked"].toBool()) {
        gx = mask<INSIDE>(std::move(gx), bytes, outside);
      }
      out[0] = gx.to(saved["in"].toScalarType());
    }
    if (wanted[1])
      out[7] = saved["wmasked"].toBool()
          ? mask_weight(
                std::move(gw), weight, steps, saved["wlo"].toInt(), saved["whi"].toInt(), saved["wapart"].toInt())
          : gw.to(weight.scalar_type());
    if (wanted[2])
      out[14] = gb.to(weight.scalar_type());
    return out;
  }
};

// ---- a learned step -------------------------------------------------------------------------------------------------

struct LearnedStep : Function<LearnedStep> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, const Tensor& step, int64_t lo, int64_t hi, double scale, bool within) {
    Tensor x = dense(input);
    Tensor out = quantize(x, at::empty_like(x), step.item<float>(), lo, hi, false, MaybeTensor(), false).values;
    ctx->save_for_backward({x, step});
    auto& saved = ctx->saved_data;
    saved["lo"] = lo, saved["hi"] = hi, saved["scale"] = scale, saved["within"] = within;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    no_second_derivative();
    variable_list result(6);
    if (!grads[0].defined())
      return result;
    auto kept = ctx->get_saved_variables();
    auto& saved = ctx->saved_data;
    Tensor x = kept[0], grad = laid_out(grads[0], x), out = at::empty_like(x);
    Range range(kept[1].item<float>(), saved["lo"].toInt(), saved["hi"].toInt());
    bool within = saved["within"].toBool();
    std::vector<double> parts((x.numel() + PIECE - 1) / PIECE);
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      in_pieces(x.numel(), [&](int64_t p, int64_t i, int64_t size) {
        auto* kernel = within ? learn_values<true, T> : learn_values<false, T>;
        parts[p] = kernel(data<T>(grad) + i, data<T>(x) + i, mutable_data<T>(out) + i, size, range);
      });
    });
    double total = 0;
    for (double part : parts)
      total += part;
    float slope = range.step > 0 ? float(total) * float(saved["scale"].toDouble()) : 0;
    result[0] = out;
    result[1] = at::full_like(kept[1], slope);
    return result;
  }
};

// ---- weights of a whole model -----------------------------------------------------------------------------------------

// sum|w| of each filter of all weights, one after the other, float64.
Tensor sums_of_filters(at::TensorList weights) {
  int64_t total = 0;
  for (auto& w : weights)
    total += w.size(0);
  Tensor out = at::empty({total}, at::kDouble);
  double* to = out.mutable_data_ptr<double>();
  for (auto& w : weights) {
    int64_t rows = w.size(0), inner = w.numel() / rows;
    const float* from = w.const_data_ptr<float>();
    in_rows(rows, inner, [&](int64_t r) {
      double sum = 0;
      const float* row = from + r * inner;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < inner; i++)
        sum += double(std::fabs(row[i]));
      to[r] = sum;
    });
    to += rows;
  }
  return out;
}

// MaybeTensor of all weights as bytes, code - lo, in the layout of the weight; `steps` has a step for each filter. No byte
// stands for NaN: the step of a filter with such a weight becomes NaN, so that what it computes is.
std::vector<Tensor> codes_of_weights(
    at::TensorList weights, Tensor steps, at::IntArrayRef lo, at::IntArrayRef hi, at::IntArrayRef apart) {
  std::vector<Tensor> out;
  float* step = steps.mutable_data_ptr<float>();
  for (size_t k = 0; k < weights.size(); k++) {
    const Tensor& w = weights[k];
    out.push_back(like(w, at::kByte));
    int64_t rows = w.size(0), inner = w.numel() / rows;
    uint8_t* to = out.back().mutable_data_ptr<uint8_t>();
    const float* from = w.const_data_ptr<float>();
    in_rows(rows, inner, [&](int64_t r) {
      Range range(step[r], lo[k], hi[k]);
      int none = 0;
      auto code = [&](auto code_of) {
#pragma omp simd reduction(| : none)
        for (int64_t i = r * inner; i < (r + 1) * inner; i++) {
          to[i] = uint8_t(int(code_of(from[i])) - int(range.lo));
          none |= from[i] != from[i];
        }
      };
      if (apart[k] == 2)
        code([&](float w) { return range.odd_code(w); });
      else
        code([&](float w) { return range.code(w); });
      if (none)
        step[r] = NAN;
    });
    step += rows;
  }
  return out;
}

Tensor weight_of_codes(const Tensor& codes, const Tensor& steps, int64_t lo) {
  return restore_weight(codes, steps, lo, like(codes, at::kFloat));
}

// ---- the operators ------------------------------------------------------------------------------------------------------

float divided(const Tensor& threshold, int64_t top) {
  return threshold.item<float>() / float(top);
}

Tensor fake_quantized(
    const Tensor& x, float step, int64_t lo, int64_t hi, bool masked, const MaybeTensor& sums, bool nonzero, bool overwrite) {
  bool grads = at::GradMode::is_enabled();
  auto relu = FakeQuantize::saves(x, masked, grads) ? in_place_of_relu(x) : Relu();
  return FakeQuantize::apply(x, step, lo, hi, masked, sums, nonzero, overwrite, grads, relu);
}

Tensor fake_quantize(
    const Tensor& x, const Tensor& step, int64_t lo, int64_t hi, bool masked, const MaybeTensor& sums, bool nonzero,
    int64_t top) {
  return fake_quantized(x, divided(step, top), lo, hi, masked, sums, nonzero, false);
}

// The same; the result may lie in the memory of x, which nobody else reads.
Tensor fake_quantize_(
    const Tensor& x, const Tensor& step, int64_t lo, int64_t hi, bool masked, const MaybeTensor& sums, bool nonzero,
    int64_t top) {
  return fake_quantized(x, divided(step, top), lo, hi, masked, sums, nonzero, true);
}

Tensor layer(
    const Tensor& x, const Tensor& step, int64_t lo, int64_t hi, bool masked, const MaybeTensor& sums, bool nonzero,
    int64_t top, const Tensor& weight, const Tensor& codes, const Tensor& steps, int64_t wlo, int64_t whi, bool wmasked,
    int64_t wapart, const MaybeTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  Geometry geometry{stride.vec(), padding.vec(), dilation.vec(), groups};
  bool grads = at::GradMode::is_enabled();
  auto relu = x.requires_grad() && Layer::saves(x, weight, lo, hi, masked, grads) ? in_place_of_relu(x) : Relu();
  return Layer::apply(
      x, divided(step, top), lo, hi, masked, sums, nonzero, weight, codes, steps, wlo, whi, wmasked, wapart, bias, geometry,
      type_in_use(x), grads, relu);
}

Tensor learned_step(const Tensor& x, const Tensor& step, int64_t lo, int64_t hi, double scale, bool within) {
  return LearnedStep::apply(x, step, lo, hi, scale, within);
}

} // namespace

TORCH_LIBRARY(gdrq_mm, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor step, int lo, int hi, bool masked, Tensor(a!)? sums, bool nonzero, "
      "int top) -> Tensor",
      &fake_quantize);
  m.def(
      "fake_quantize_(Tensor(a!) x, Tensor step, int lo, int hi, bool masked, Tensor(b!)? sums, bool nonzero, "
      "int top) -> Tensor(a!)",
      &fake_quantize_);
  m.def(
      "layer(Tensor x, Tensor step, int lo, int hi, bool masked, Tensor(a!)? sums, bool nonzero, int top, Tensor weight, "
      "Tensor codes, Tensor steps, int wlo, int whi, bool wmasked, int wapart, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor",
      &layer);
  m.def("learned_step(Tensor x, Tensor step, int lo, int hi, float scale, bool within) -> Tensor", &learned_step);
  m.def("weight_of_codes(Tensor codes, Tensor steps, int lo) -> Tensor", &weight_of_codes);
  m.def("sums_of_filters(Tensor[] weights) -> Tensor", &sums_of_filters);
  m.def("codes_of_weights(Tensor[] weights, Tensor(a!) steps, int[] lo, int[] hi, int[] apart) -> Tensor[]", &codes_of_weights);
}
