"""Trains the digits flow model from scratch, on one CPU core.

    python examples/train_digits_flow.py --out fastflow/demo/digits.safetensors

writes the checkpoint that the package ships; the same command gives the same file, bit for bit, on one machine with one torch
version. It took 2 minutes of CPU time (one core of an AMD EPYC, torch 2.13) for 2,500 steps of 256 images, and ended at a mean
square velocity error of 0.324 on the training images and 0.339 on the 360 held-out ones.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflow.demo import digits
from fastflow.demo.digits_model import CHECKPOINT, NULL, TOKENS, WIDTH, build_module


class FlowModel(nn.Module):
    """The transformer and the two tables of prompt embeddings, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_module()
        self.tokens = nn.Parameter(torch.randn(NULL + 1, TOKENS, WIDTH))
        self.pooled = nn.Parameter(torch.randn(NULL + 1, WIDTH))

    def forward(self, sample: Tensor, sigma: Tensor, prompts: Tensor) -> Tensor:
        """sample [N, 1, 8, 8] at sigma [N] under prompts [N] (0..10) -> velocity [N, 1, 8, 8]."""
        return self.transformer(
            hidden_states=sample,
            timestep=sigma * 1000.0,
            encoder_hidden_states=self.tokens[prompts],
            pooled_projections=self.pooled[prompts],
        ).sample

    def embeddings(self) -> digits.Embeddings:
        return digits.Embeddings(self.tokens.detach(), self.pooled.detach())


def draw_sigma(count: int, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    """Logit-normal noise levels, shifted towards noise as the sampling schedule is."""
    u = torch.sigmoid(spread * torch.randn(count, generator=generator))
    return shift * u / (1.0 + (shift - 1.0) * u)


def flow_loss(model: FlowModel, x0: Tensor, prompts: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean square error of the velocity `noise - x0` at x = (1 - sigma) x0 + sigma noise."""
    s = sigma[:, None, None, None]
    velocity = model((1.0 - s) * x0 + s * noise, sigma, prompts)
    return (velocity - (noise - x0)).square().mean()


@torch.no_grad()
def held_out_loss(model: FlowModel, args: argparse.Namespace) -> float:
    """The loss on the 360 test images, eight fixed draws of noise and noise level each."""
    data, generator = digits.load_digits(), torch.Generator().manual_seed(1)
    x0, prompts = data.test_images.repeat(8, 1, 1, 1), data.test_labels.repeat(8)
    sigma = draw_sigma(len(x0), args.shift, args.spread, generator)
    return float(flow_loss(model, x0, prompts, sigma, torch.randn(x0.shape, generator=generator)))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 2 % of the steps, then half a cosine down to 2 % of the peak."""
    warm = max(1, args.steps // 50)
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / (args.steps - warm))))


def train(args: argparse.Namespace) -> tuple[FlowModel, dict[str, float]]:
    """Returns the moving average of the weights, and the record of the training."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data = digits.load_digits()
    model = FlowModel()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    running, started = math.nan, time.perf_counter()
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=args.steps, loss=math.nan)
        for step in range(args.steps):
            index = torch.randint(len(data.train_images), (args.batch,), generator=generator)
            x0, prompts = data.train_images[index], data.train_labels[index]
            dropped = torch.rand(args.batch, generator=generator) < args.dropout
            prompts = torch.where(dropped, NULL, prompts)
            sigma = draw_sigma(args.batch, args.shift, args.spread, generator)
            noise = torch.randn(x0.shape, generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.zero_grad(set_to_none=True)
            loss = flow_loss(model, x0, prompts, sigma, noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
            running = float(loss.detach()) if step == 0 else 0.99 * running + 0.01 * float(loss.detach())
            progress.update(task, advance=1, loss=running)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    return average, {"train_loss": round(running, 4), "held_out_loss": round(held_out_loss(average.eval(), args), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of the prompts replaced by the null prompt")
    parser.add_argument("--shift", type=float, default=1.5)
    parser.add_argument("--spread", type=float, default=1.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number gives other last bits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)  # gradients of the embedding tables are summed in a fixed order
    model, record = train(args)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    print(record)
    digits.save_checkpoint(model.transformer, model.embeddings(), args.out, settings | record)


if __name__ == "__main__":
    main()
