"""Options of `fastflow rollout`, as typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastflow.cli.request import DYNAMICS, Request, parse_dense, parse_prompts, parse_size


def test_prompts_as_typed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox, running\n\n  a cat \n")
    assert parse_prompts(["one, two", f"@{file}"], digits=False) == ["one, two", "a red fox, running", "a cat"]
    assert parse_prompts(["3,8", "0"], digits=True) == ["3", "8", "0"]
    assert parse_prompts([], digits=True) == []


@pytest.mark.parametrize(
    ("given", "digits", "words"),
    [
        (["3,x"], True, "knows 0 to 9, got 'x'"),
        (["10"], True, "got '10'"),
        (["@missing.txt"], False, "cannot read missing.txt: No such file"),
    ],
)
def test_prompts_that_are_wrong(given: list[str], digits: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_prompts(given, digits)


def test_an_empty_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        parse_prompts([f"@{tmp_path / 'empty'}"], digits=False)


def test_dense() -> None:
    assert [parse_dense(text) for text in ("all", "none", "4")] == ["all", None, 4]
    for text in ("0", "-1", "some", "1.5"):
        with pytest.raises(ValueError, match="--dense: wanted all, none or a number"):
            parse_dense(text)


def test_size() -> None:
    assert parse_size("512x768") == (512, 768)
    assert parse_size(None) is None
    for text in ("512", "axb", "1x2x3"):
        with pytest.raises(ValueError, match="--size: wanted HEIGHTxWIDTH"):
            parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dynamics", "sde"), f"--dynamics: wanted one of {', '.join(DYNAMICS)}, got 'sde'"),
        (("--dynamics", "ode", "--noise-level", "0.5"), "--noise-level: ode has no noise knob"),
        (("--lockstep", "both"), "--lockstep: wanted one of exact, full"),
        (("--dtype", "int8"), "--dtype: wanted one of float32, bfloat16, float16"),
        (("--dense", "most"), "--dense: wanted all, none"),
        (("--reward", "mine"), "--reward: wanted MODULE:FUNCTION, got 'mine'"),
        (("--model", "digits", "--size", "8x8"), "--size: the digits model brings its own"),
        (("--model", "digits", "--prompts", "12"), "--prompts: the digits model knows 0 to 9"),
    ],
)
def test_a_wrong_option_is_one_line(fastflow, arguments: tuple[str, ...], words: str) -> None:
    result = fastflow("rollout", *(() if "--model" in arguments else ("--model", "folder")), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("fastflow: ")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_out_must_not_be_a_file(fastflow, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = fastflow("rollout", "--model", "folder", "--out", tmp_path / "file")
    assert (result.exit_code, "--out: wanted a folder, got the file" in result.stderr) == (2, True)


def test_a_request_as_a_command(tmp_path: Path) -> None:
    request = Request(
        model="digits", prompts=["3", "8"], group=4, negative="", size=None, embeddings=None, reward=None, steps=5,
        dynamics="cps", noise_level=0.5, guidance=None, shift=None, dense=None, seed=1, lockstep="full", max_rows=None,
        dtype="float32", device="auto", out=tmp_path, progress=True,
    )  # fmt: skip
    assert request.command() == (
        "fastflow rollout --model digits --prompts 3 --prompts 8 --group 4 --steps 5 --dynamics cps --noise-level 0.5 "
        f"--dense none --seed 1 --lockstep full --dtype float32 --out {tmp_path}"
    )
