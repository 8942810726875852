// SPDX-License-Identifier: Apache-2.0
// Which programs a call takes, over how many blocks, and where their scratch lies. A Launcher runs one program:
// launcher.template run<Program>(call, blocks) -> 0 or an error, each after those before it.
#pragma once

#include "finish.h"
#include "policy.h"
#include "rescale.h"
#include "step.h"

namespace fastflow {

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t tiles_of(int64_t numel) { return numel > 0 ? ceil_div(numel, TILE) : 1; }

// How many floats of each kind a call needs for a tile, a group and a row. `means`: it has shift or drift, or gradients
// in them.
struct Needs {
  int sums, marks, groups, rows;
};
inline Needs needs_of(bool backward, int64_t numel, bool clamp, bool means) {
  const bool shared = !backward && tiles_of(numel) > WHOLE_TILES;
  const int sums = backward ? (clamp ? 3 : 0) : means ? 3 : clamp ? 2 : shared ? 1 : 0;
  return {sums, backward || means || shared, (backward ? 3 : 1) + (means ? 1 : 0), backward || means};
}

// Four-byte words of scratch. `groups`: rescaled groups of a row, 0 without a rescale.
inline int64_t scratch_words(bool backward, int64_t batch, int64_t numel, int64_t groups, bool clamp, bool means) {
  const Needs needs = needs_of(backward, numel, clamp, means);
  return batch * ((needs.sums + needs.marks) * tiles_of(numel) + needs.groups * groups + needs.rows);
}

// What a GPU holds at a time: 4 blocks on each of 132 multiprocessors, an H100's or H200's.
constexpr int64_t RESIDENT = 528, WAVES = 6;

// Tiles of a block: they share what its threads do before and after their loop over them, a fifth of a tile's work or more.
// At least WAVES times what a GPU holds stays to be spread.
inline int span_of(int64_t tiles) { return tiles >= 4 * WAVES * RESIDENT ? 4 : tiles >= 2 * WAVES * RESIDENT ? 2 : 1; }

// Blocks of a row: where there is much to do, each takes more tiles. Short rows share a block.
inline Geometry row_geometry(int64_t batch, int64_t numel) {
  Geometry g;
  g.tiles = tiles_of(numel);
  if (g.tiles <= WHOLE_TILES) {
    g.span = static_cast<int>(g.tiles);
    while (g.log_team > 5 && (4 << g.log_team) >= numel) --g.log_team;
  } else {
    g.span = span_of(batch * g.tiles);
  }
  const int64_t spans = ceil_div(g.tiles, g.span);
  g.spans = Divisor(spans);
  g.blocks = spans * ceil_div(batch, THREADS >> g.log_team);
  return g;
}

inline Geometry tile_geometry(int64_t batch, int64_t numel) {
  Geometry g;
  g.tiles = tiles_of(numel);
  g.spans = Divisor(g.tiles);
  g.blocks = batch * g.tiles;
  return g;
}

inline Geometry token_geometry(const Call& call) {
  Geometry g;
  g.tiles = tiles_of(call.numel);
  const int64_t blocks = ceil_div(call.groups, Tokens<SQUARES>::per_block(call.channels));
  g.spans = Divisor(blocks);
  g.blocks = call.batch * blocks;
  return g;
}

// Whether a quad of every row starts on a boundary of its size.
inline bool on_quads(const Tensor& t, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(t.data) % (4 * bytes) == 0 && t.stride % 4 == 0) || !t;
}

inline bool all_on_quads(const Call& call) {
  bool aligned = on_quads(call.mask, 1);
  for (const Tensor* t : {&call.sample, &call.velocity, &call.uncond, &call.noise, &call.given, &call.next_sample,
                          &call.clean, &call.ode_next, &call.mean, &call.grad_velocity, &call.grad_uncond,
                          &call.ref_velocity, &call.ref_uncond, &call.old_mean})
    aligned = aligned && on_quads(*t, bytes_of(t->dtype));
  if (call.reduce == NONE) aligned = aligned && on_quads(call.log_prob, 4) && on_quads(call.grad, 4);
  return aligned;
}

// Whether a replay is scored beside shift or drift, and nothing else is asked of it: one pass gives all three.
inline bool compares(const Call& call) {
  const bool scored = call.given && call.log_prob && call.reduce != NONE && (call.shift || call.drift);
  return scored && !(call.next_sample || call.clean || call.ode_next || call.mean || call.flags);
}

inline bool rescales(const Call& call) { return call.uncond && call.rescale != RESCALE_NONE && call.numel > 0; }

// Fills in what is derived from the call; `scratch` holds scratch_words().
inline void derive(Call& call, bool backward, float* scratch) {
  const bool active = rescales(call), clamp = active && call.rescale == RESCALE_CLAMP;
  const int64_t tiles = tiles_of(call.numel);
  call.reduces = call.log_prob && call.reduce != NONE;
  call.marked = (call.mask && call.reduces) || call.flags;
  call.quad = all_on_quads(call) ? 4 : INT32_MAX;
  call.groups = !active ? 0 : clamp ? 1 : call.outer * call.inner;
  call.by_slab = Divisor(call.channels * call.inner);
  call.by_inner = Divisor(call.inner);
  call.compared = !backward && compares(call);
  const bool means = backward ? call.grad_shift || call.grad_drift : call.shift || call.drift;
  const Needs needs = needs_of(backward, call.numel, clamp, means);
  float* next = scratch;
  const auto take = [&](int64_t words) { return (next += words) - words; };
  call.sums = take(call.batch * tiles * needs.sums);
  call.marks = reinterpret_cast<uint32_t*>(take(call.batch * tiles * needs.marks));
  call.counts = needs.rows ? take(call.batch) : nullptr;
  const int64_t groups = call.batch * call.groups;
  call.factors = active ? take(groups) : nullptr;
  call.ref_factors = active && means && call.ref_uncond ? take(groups) : nullptr;
  call.on_guided = active && backward ? take(groups) : nullptr;
  call.on_velocity = active && backward ? take(groups) : nullptr;
}

// The same of the means of a matching loss. Its gradient, where masked, needs scratch_words().
inline int64_t matching_words(int64_t batch, int64_t numel) { return batch * tiles_of(numel) * (MEAN_COUNT + 1); }

template <int PURPOSE, class Launcher>
int sum_groups(Call& call, Launcher& launcher) {
  if (call.rescale == RESCALE_TOKEN) {
    call.geometry = token_geometry(call);
    return launcher.template run<Tokens<PURPOSE>>(call, call.geometry.blocks);
  }
  call.geometry = tile_geometry(call.batch, call.numel);
  const int error = launcher.template run<RowTiles<ANY, ANY, PURPOSE>>(call, call.geometry.blocks);
  return error ? error : launcher.template run<FinishRows<PURPOSE == SQUARES ? FACTORS : SLOPES>>(call, call.batch);
}

template <int SAMPLE_, int VELOCITY_>
struct Dtypes {
  static constexpr int SAMPLE = SAMPLE_, VELOCITY = VELOCITY_;
};

// Runs what is compiled for the dtypes of a call, or for any. `plain`: the former can serve the call.
template <class Run>
int run_for_dtypes(const Call& call, bool plain, const Run& run) {
  const int sample = call.sample.dtype, velocity = call.velocity.dtype;
  if (plain && sample == FLOAT32 && velocity == FLOAT32) return run(Dtypes<FLOAT32, FLOAT32>());
  if (plain && sample == FLOAT32 && velocity == BFLOAT16) return run(Dtypes<FLOAT32, BFLOAT16>());
  if (plain && sample == BFLOAT16 && velocity == BFLOAT16) return run(Dtypes<BFLOAT16, BFLOAT16>());
  return run(Dtypes<ANY, ANY>());
}

// Whether Inputs of the call's dtypes can serve it.
inline bool uniform(const Call& call) {
  bool same = !call.factors && call.reduce != NONE && !call.grad_drift;
  for (const Tensor* t : {&call.given, &call.old_mean}) same = same && (!*t || t->dtype == call.sample.dtype);
  for (const Tensor* t : {&call.ref_velocity, &call.grad_velocity, &call.grad_uncond})
    same = same && (!*t || t->dtype == call.velocity.dtype);
  return same;
}

template <int SAMPLE, int VELOCITY, class Launcher>
int run_step_of(const Call& call, Launcher& launcher) {
  const int64_t blocks = call.geometry.blocks;
  const bool drawn = call.seeds && !call.given && !call.noise;
  if (call.uncond) {
    if (drawn) return launcher.template run<Step<SAMPLE, VELOCITY, true, true>>(call, blocks);
    return launcher.template run<Step<SAMPLE, VELOCITY, false, true>>(call, blocks);
  }
  if (drawn) return launcher.template run<Step<SAMPLE, VELOCITY, true, false>>(call, blocks);
  return launcher.template run<Step<SAMPLE, VELOCITY, false, false>>(call, blocks);
}

// The factors of the velocity's guidance, and of the reference network's.
template <class Launcher>
int find_factors(Call& call, Launcher& launcher) {
  if (!call.factors) return 0;
  if (const int error = sum_groups<SQUARES>(call, launcher)) return error;
  if (!call.ref_factors) return 0;
  Call reference = call;
  reference.velocity = call.ref_velocity;
  reference.uncond = call.ref_uncond;
  reference.factors = call.ref_factors;
  reference.rows = Tensor();
  return sum_groups<SQUARES>(reference, launcher);
}

template <class Launcher>
int count_scored(Call& call, Launcher& launcher) {
  call.geometry = tile_geometry(call.batch, call.numel);
  const int error = launcher.template run<CountTiles>(call, call.geometry.blocks);
  return error ? error : launcher.template run<FinishRows<COUNTS>>(call, call.batch);
}

template <class Launcher>
int run_means(Call& call, Launcher& launcher) {
  if (!call.shift && !call.drift) return 0;
  if (call.mask)
    if (const int error = count_scored(call, launcher)) return error;
  call.geometry = tile_geometry(call.batch, call.numel);
  const int error = run_for_dtypes(call, uniform(call), [&](auto of) {
    using Of = decltype(of);
    return launcher.template run<RowTiles<Of::SAMPLE, Of::VELOCITY, DIFFERENCES>>(call, call.geometry.blocks);
  });
  return error ? error : launcher.template run<FinishRows<MEANS>>(call, call.batch);
}

// Writes every output of the call. `scratch` may be null where scratch_words() is 0.
template <class Launcher>
int run_step(Call call, float* scratch, Launcher& launcher) {
  if (call.batch == 0) return 0;
  derive(call, false, scratch);
  if (const int error = find_factors(call, launcher)) return error;
  if (const int error = run_means(call, launcher)) return error;
  if (call.compared) return 0;
  call.geometry = row_geometry(call.batch, call.numel);
  const bool plain = call.geometry.log_team == 8 && !call.factors;
  const int error = run_for_dtypes(call, plain, [&](auto of) {
    using Of = decltype(of);
    return run_step_of<Of::SAMPLE, Of::VELOCITY>(call, launcher);
  });
  if (error || call.geometry.spans.divisor == 1 || !(call.reduces || call.flags)) return error;
  return launcher.template run<FinishRows<SCORES>>(call, call.batch);
}

// Writes the gradients in velocity and, where there is a slot, uncond.
template <class Launcher>
int run_log_prob_backward(Call call, float* scratch, Launcher& launcher) {
  if (call.batch == 0 || call.numel == 0) return 0;
  derive(call, true, scratch);
  if (call.mask && (call.reduce == MEAN || call.grad_shift || call.grad_drift))
    if (const int error = count_scored(call, launcher)) return error;
  if (const int error = find_factors(call, launcher)) return error;
  if (call.factors)
    if (const int error = sum_groups<GRADIENT>(call, launcher)) return error;
  const bool one_tile = tiles_of(call.numel) == 1;
  call.geometry = one_tile ? row_geometry(call.batch, call.numel) : tile_geometry(call.batch, call.numel);
  const bool plain = call.geometry.log_team == 8 && uniform(call);
  return run_for_dtypes(call, plain, [&](auto of) {
    using Of = decltype(of);
    return launcher.template run<Gradient<Of::SAMPLE, Of::VELOCITY>>(call, call.geometry.blocks);
  });
}

// Whether noise is drawn for a float32 clean sample and velocities in bfloat16.
inline bool draws_for_bfloat16(const Call& call) {
  bool same = call.sample.dtype == FLOAT32 && !call.given && !call.noise;
  for (const Tensor* t : {&call.velocity, &call.old_mean, &call.ref_velocity, &call.grad_velocity})
    same = same && (!*t || t->dtype == BFLOAT16);
  return same;
}

// Writes the means of a matching loss. `scratch` holds matching_words().
template <class Launcher>
int run_matching(Call call, float* scratch, Launcher& launcher) {
  if (call.batch == 0) return 0;
  derive(call, false, nullptr);
  call.marked = static_cast<bool>(call.mask);
  call.geometry = tile_geometry(call.batch, call.numel);
  call.sums = scratch;
  call.marks = reinterpret_cast<uint32_t*>(scratch + call.geometry.blocks * MEAN_COUNT);
  const int64_t blocks = call.geometry.blocks;
  const int error = draws_for_bfloat16(call) ? launcher.template run<MatchingTiles<FLOAT32, BFLOAT16>>(call, blocks)
                                             : launcher.template run<MatchingTiles<ANY, ANY>>(call, blocks);
  return error ? error : launcher.template run<FinishRows<MATCHING>>(call, call.batch);
}

template <class Launcher>
int run_matching_backward(Call call, float* scratch, Launcher& launcher) {
  if (call.batch == 0 || call.numel == 0) return 0;
  derive(call, true, scratch);
  if (call.mask)
    if (const int error = count_scored(call, launcher)) return error;
  call.geometry = tile_geometry(call.batch, call.numel);
  const int64_t blocks = call.geometry.blocks;
  if (draws_for_bfloat16(call)) return launcher.template run<MatchingGradient<FLOAT32, BFLOAT16>>(call, blocks);
  return launcher.template run<MatchingGradient<ANY, ANY>>(call, blocks);
}

}  // namespace fastflow
