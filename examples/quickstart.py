"""The public API in forty lines: a dense-reward rollout of handwritten digits, and one policy-gradient step's log-probability.

python examples/quickstart.py
"""

import torch

import fastflow as ff
from fastflow.demo import digits

prompts, group = [3, 8], 4

# A network that you hold already (here a small diffusers SD3Transformer2DModel), and what its prompts are made of.
module, embeddings = digits.load_model()
model = ff.models.SD3(module)  # any model(sample, sigma, condition) -> velocity will do

trajectory = ff.rollout(
    model,
    shape=digits.SHAPE,
    sigmas=ff.sigma_schedule(10, shift=3.0),  # T + 1 noise levels, 1 .. 0
    dynamics=ff.FlowSDE(noise_level=0.7),  # Flow-GRPO's SDE; DanceSDE, CPS, ... are a word away
    seeds=ff.sample_seeds(base=0, epoch=0, prompt_ids=[0, 1], copies=group),  # all noise is a function of these
    condition=embeddings.condition(prompts),  # one entry per prompt, encoded once
    guidance=ff.CFG(2.0),
    negative=embeddings.negative(1),
    dense=ff.Completion(evaluations="all"),  # complete every state by ODE, in step with the main chain
    decode=digits.decode,
    reward=digits.DigitReward(prompts),
)

print(f"{trajectory.stats.calls} network calls, {trajectory.stats.evaluations} row evaluations")
print("states       ", tuple(trajectory.samples.shape), "  log-probabilities", tuple(trajectory.log_probs.shape))
print("mean reward by state  ", [round(float(r), 1) for r in trajectory.rewards.mean(0)])
print("mean gain by step     ", [round(float(g), 1) for g in trajectory.gains.mean(0)])

# Training replays a stored transition. At equal velocities its log-probability is the rollout's, bit for bit.
k = 4
move = trajectory.transition(k)
rows = [prompts[p] for p in trajectory.prompt_index]  # the digit of each sample
condition, negative = embeddings.condition(rows), embeddings.negative(len(rows))
with torch.no_grad():
    velocity, uncond = ff.evaluate(model, move.sample, move.sigma, condition, negative, ff.CFG(2.0))
log_prob = ff.log_prob(move.sample, velocity, move.next_sample, move.at, uncond=uncond, guidance=ff.CFG(2.0))
print("replayed bit for bit  ", torch.equal(log_prob, trajectory.log_probs[:, k]))
