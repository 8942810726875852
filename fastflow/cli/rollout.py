"""`fastflow rollout`: its options, checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import fail
from .request import DIGITS, DYNAMICS, Request, parse_dense, parse_prompts, parse_size

HELP = """Rolls out a model: states, log-probabilities and, with --dense, a clean prediction from every state.

[bold]--model[/bold] is one of

- [cyan]digits[/cyan]: a small flow model of handwritten digits that ships with fastflow, rewarded by a real classifier;
- a folder saved by [cyan]StableDiffusion3Pipeline.save_pretrained[/cyan], or the hub id (owner/name) of one;
- a folder saved by [cyan]SD3Transformer2DModel.save_pretrained[/cyan] with its prompts in an embeddings.safetensors,
  as [cyan]fastflow.models.loading.save_embeddings[/cyan] writes it.

Writes trajectory.safetensors and summary.json into --out, and pictures where there is a decoder; for the digits
pictures and report.html beside the trajectory.

[bold]Examples[/bold]

  fastflow rollout --model digits --prompts 3,8 --group 16 --steps 10 --dense all --out out/digits

  fastflow rollout --model ./sd3 --prompts "a red fox" --prompts "a lighthouse" --guidance 4.5 --dense 4 --out out/sd3

  fastflow rollout --model ./sd3 --prompts @prompts.txt --dynamics cps --noise-level 0.8 --reward my_rewards:aesthetic
"""

_MODEL = "What to roll out"
_SAMPLER = "The sampler"
_RUN = "How it runs"


def command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help=f'A folder, a hub id, or "{DIGITS}".',
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "-p",
            metavar="TEXT",
            help="A prompt; repeat for more. @FILE reads one a line. For digits: 0 to 9, with commas. "
            "Default: all that the model knows.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    group: Annotated[int, typer.Option(min=1, metavar="N", help="Samples per prompt.", rich_help_panel=_MODEL)] = 16,
    negative: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Negative prompt of a pipeline, used when guidance is on.", rich_help_panel=_MODEL
        ),
    ] = "",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Image size as HEIGHTxWIDTH in pixels. Default: what the model was trained at.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Embeddings of a bare transformer.",
            rich_help_panel=_MODEL,
            show_default="MODEL/embeddings.safetensors",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Called as reward(images, info); gives one number per image.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Transitions from noise to image.", rich_help_panel=_SAMPLER)
    ] = 10,
    dynamics: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(DYNAMICS)}.", rich_help_panel=_SAMPLER)
    ] = "flow-sde",
    noise_level: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much noise a step adds (the eta of dance-sde and flow-ddim). Default: the dynamics' own.",
            rich_help_panel=_SAMPLER,
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Scale of classifier-free guidance; 1 turns it off. Default: 2 for digits, 4.5 for a pipeline.",
            rich_help_panel=_SAMPLER,
            show_default=False,
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Shift of the schedule. Default: the pipeline's own schedule, else 3.",
            rich_help_panel=_SAMPLER,
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        str,
        typer.Option(
            metavar="all|N|none",
            help="Clean predictions by ODE from every state: all (each remaining step), N (in N evaluations), none.",
            rich_help_panel=_SAMPLER,
        ),
    ] = "all",
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Base seed, from which every sample gets its own.", rich_help_panel=_SAMPLER),
    ] = 0,
    lockstep: Annotated[
        str,
        typer.Option(
            metavar="exact|full",
            help="exact: the main rows keep calls of their own, as a trainer replays them; full: one call per step.",
            rich_help_panel=_RUN,
        ),
    ] = "exact",
    max_rows: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Most rows in a network call.", rich_help_panel=_RUN, show_default="no limit"
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the network: float32, bfloat16, float16. States stay float32.",
            rich_help_panel=_RUN,
        ),
    ] = "float32",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...", rich_help_panel=_RUN
        ),
    ] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for what is written.", rich_help_panel=_RUN)] = Path(
        "out/rollout"
    ),
    progress: Annotated[bool, typer.Option(help="Show a progress bar.", rich_help_panel=_RUN)] = True,
) -> None:
    try:
        request = Request(
            model=model,
            prompts=parse_prompts(prompts or [], digits=model == DIGITS),
            group=group,
            negative=negative,
            size=parse_size(size),
            embeddings=embeddings,
            reward=reward,
            steps=steps,
            dynamics=dynamics,
            noise_level=noise_level,
            guidance=guidance,
            shift=shift,
            dense=parse_dense(dense),
            seed=seed,
            lockstep=lockstep,
            max_rows=max_rows,
            dtype=dtype,
            device=device,
            out=out,
            progress=progress,
        )
    except ValueError as error:
        fail(str(error))
    from .run import run

    run(request)
