// SPDX-License-Identifier: Apache-2.0
// What a policy loss makes of its rows' numbers, in double: losses, the derivatives in each row's three means, and what
// is told of the batch. It has tens of rows, so double costs nothing, and exp rounds to the same float everywhere.
#pragma once

#include <cmath>
#include <limits>

#include "transition.h"

namespace fastflow {

enum Objective { PPO, GUARD, GUARD_RATIO, DPPO };
enum Divergence { KL_NONE, KL_GAUSSIAN, KL_STEPLESS, KL_MEAN, KL_VELOCITY, KL_LOG_RATIO };

enum PolicyInfo { LOSS, ROWS, RATIO_MEAN, RATIO_MAX, RATIO_MIN, CLIP_FRACTION, APPROX_KL, DIVERGENCE, POLICY_INFO };

constexpr double BEYOND = std::numeric_limits<double>::infinity();  // every ratio

struct PolicyTerms {
  double below, above, kl_weight, divergence;  // 1 - clip, 1 + clip
  int objective, kl;
};

struct PolicyRow {
  double log_prob, shift, drift, old_log_prob, advantage, weight, b, std, length;
};

struct PolicyResult {
  double loss, kl, ratio, log_ratio, on_log_prob, on_shift, on_drift;
  bool outside;
};

FASTFLOW_FN PolicyResult policy_row(const PolicyRow& r, const PolicyTerms& t) {
  PolicyResult out{};
  const double std = r.std > 0.0 ? r.std : 1.0, variance = 2.0 * std * std;
  const bool guard = t.objective == GUARD || t.objective == GUARD_RATIO;
  const bool spread = r.std > 0.0;  // without it no Gaussian is there to be far from
  const double far = spread ? r.drift / variance : 0.0, slope = guard ? std : 1.0;
  out.log_ratio = r.log_prob - r.old_log_prob;
  out.ratio = exp(guard ? (out.log_ratio + far) * std : out.log_ratio);
  double weight = r.weight;
  if (t.objective == GUARD) weight = weight / r.length;
  const double plain = -r.advantage * out.ratio;
  bool live;
  if (t.objective == DPPO) {
    const bool left = (r.advantage > 0.0 && out.ratio > 1.0) || (r.advantage < 0.0 && out.ratio < 1.0);
    out.outside = left && far > t.divergence;
    live = !out.outside;
    out.loss = live ? plain * weight : 0.0;
  } else {
    const double bounded = out.ratio < t.below ? t.below : out.ratio > t.above ? t.above : out.ratio;
    const double clipped = -r.advantage * bounded;
    out.outside = out.ratio < t.below || out.ratio > t.above;
    live = !out.outside || plain > clipped;
    out.loss = (plain > clipped || plain != plain ? plain : clipped) * weight;
  }
  const double on_ratio = live ? -r.advantage * weight * out.ratio * slope : 0.0;
  out.on_log_prob = on_ratio;
  out.on_drift = guard && spread ? on_ratio / variance : 0.0;
  double on_shift = 0.0;
  if (t.kl == KL_LOG_RATIO) {
    out.kl = 0.5 * out.log_ratio * out.log_ratio;
    out.on_log_prob = out.on_log_prob + t.kl_weight * out.log_ratio;
  } else if (t.kl != KL_NONE) {
    on_shift = t.kl == KL_VELOCITY ? 1.0 : r.b * r.b;
    if (t.kl == KL_GAUSSIAN || t.kl == KL_STEPLESS) on_shift = spread ? on_shift / variance : 0.0;
    if (t.kl == KL_STEPLESS) on_shift = on_shift * r.length;
    out.kl = on_shift * r.shift;
  }
  out.on_shift = t.kl_weight * on_shift;
  out.loss = out.loss + t.kl_weight * out.kl;
  return out;
}

// A batch: PolicyCall of fastflow/backends/base.py, whose order `read_policy` in reader.h has.
struct PolicyCall {
  int64_t batch;
  // float32 [batch]; shift, drift and weight may be absent. coef: rows of 16, `coef_stride` apart (0: one for all).
  const float *log_prob, *shift, *drift, *old_log_prob, *advantage, *weight, *coef;
  int64_t coef_stride;
  bool gaussian;  // rows with std 0 do not count
  PolicyTerms terms;
  float *info, *rows;  // [POLICY_INFO]; [5, batch]: ratio, kl, and the loss's derivatives in log_prob, shift, drift
};

FASTFLOW_FN bool policy_counts(const PolicyCall& call, int64_t row) {
  return !call.gaussian || call.coef[row * call.coef_stride + STD] > 0.0f;
}

// Writes a row's outputs, in a batch of which `rows` count, and says what it gives to the batch's info.
FASTFLOW_FN void finish_policy_row(const PolicyCall& call, int64_t row, double rows, double (&info)[POLICY_INFO]) {
  const float* t = call.coef + row * call.coef_stride;
  const PolicyRow in{call.log_prob[row], call.shift ? call.shift[row] : 0.0, call.drift ? call.drift[row] : 0.0,
                     call.old_log_prob[row], call.advantage[row], call.weight ? call.weight[row] : 1.0,
                     t[B], t[STD], static_cast<double>(t[SIGMA]) - static_cast<double>(t[SIGMA_NEXT])};
  const PolicyResult out = policy_row(in, call.terms);
  const bool live = policy_counts(call, row);
  float* to = call.rows + row;
  to[0] = static_cast<float>(out.ratio);
  to[call.batch] = static_cast<float>(out.kl);
  to[2 * call.batch] = live ? static_cast<float>(out.on_log_prob / rows) : 0.0f;
  to[3 * call.batch] = live ? static_cast<float>(out.on_shift / rows) : 0.0f;
  to[4 * call.batch] = live ? static_cast<float>(out.on_drift / rows) : 0.0f;
  info[LOSS] = live ? out.loss : 0.0;
  info[ROWS] = live ? 1.0 : 0.0;
  info[RATIO_MEAN] = live ? out.ratio : 0.0;
  info[RATIO_MAX] = live ? out.ratio : -BEYOND;
  info[RATIO_MIN] = live ? out.ratio : BEYOND;
  info[CLIP_FRACTION] = live && out.outside ? 1.0 : 0.0;
  info[APPROX_KL] = live ? 0.5 * out.log_ratio * out.log_ratio : 0.0;
  info[DIVERGENCE] = live ? out.kl : 0.0;
}

// Info k of no row, of one row more (in the order of the rows), and of the batch.
FASTFLOW_FN double policy_start(int k) {
  return k == RATIO_MAX ? -BEYOND : k == RATIO_MIN ? BEYOND : 0.0;
}
FASTFLOW_FN double policy_join(int k, double all, double more) {
  if (k == RATIO_MAX) return more > all || more != more ? more : all;  // NaN stays
  if (k == RATIO_MIN) return more < all || more != more ? more : all;
  return all + more;
}
FASTFLOW_FN float policy_info(int k, double all, double rows) {
  return static_cast<float>(k == ROWS || k == RATIO_MAX || k == RATIO_MIN ? all : all / rows);
}

}  // namespace fastflow
