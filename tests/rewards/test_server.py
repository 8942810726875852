"""`ff.RewardServer` against a real server: what is sent, what comes back, and the rollout around it."""

from __future__ import annotations

import gc
import io
import multiprocessing
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow.rewards import read_request
from tests.rewards.judge import Judge, Reply, answer, good
from tests.rewards.judging import scores
from tests.rewards.rollouts import BATCH, STATES, assert_equal_rewards, local, roll, some_info
from tests.rollout.networks import SHAPE, transformer

TEXTS = ["a red cube", "eine blaue Kugel", "三只猫"]


@pytest.mark.parametrize("form", ["float32", "uint8"])
def test_a_rollout_judged_elsewhere_has_the_rewards_of_one_judged_here(form: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: its autoencoder decodes")
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        latent_channels=SHAPE[0], block_out_channels=(8,), norm_num_groups=4, layers_per_block=1
    ).eval()

    def decode(clean: Tensor, info: ff.Info) -> Tensor:
        images = (vae.decode(clean).sample / 2 + 0.5).clamp(0.0, 1.0)
        return images if form == "float32" else (images * 255).round().byte()

    network = ff.models.SD3(transformer())
    wanted = roll(local, network, decode=decode)
    with Judge() as judge, ff.RewardServer(judge.url) as server:
        assert_equal_rewards(roll(server, network, decode=decode), wanted)
        assert len(judge.bodies) == STATES
        assert {str(read_request(body)[0].dtype) for body in judge.bodies} == {f"torch.{form}"}


def test_the_server_sees_rows_and_prompts() -> None:
    seen: list[tuple[int, int, int, str]] = []

    def reply(body: bytes, n: int) -> Reply:
        images, info, prompts = read_request(body)
        assert prompts is not None
        columns = (info.prompt_index, info.sample_index, info.position)
        rows = list(zip(*(c.tolist() for c in columns), prompts, strict=True))
        seen.extend(rows)
        return answer([100.0 * p + 10.0 * b + i for p, b, i, _ in rows])

    headers = {"Authorization": "Bearer secret"}
    with Judge(reply) as judge, ff.RewardServer(f"{judge.url}?key=1", prompts=TEXTS, headers=headers) as server:
        traj = roll(server, max_decode=7)
        assert {h["Authorization"] for h in judge.headers} == {"Bearer secret"}
        assert set(judge.paths) == {"/score?key=1"} and "key" not in repr(server)
    assert sorted(seen) == [(b // 2, b, i, TEXTS[b // 2]) for b in range(BATCH) for i in range(STATES)]
    assert traj.rewards.tolist() == [[100.0 * (b // 2) + 10.0 * b + i for i in range(STATES)] for b in range(BATCH)]  # type: ignore[union-attr]


def test_requests_overlap() -> None:
    """No request is answered before all of them are there."""
    together = threading.Barrier(STATES)

    def reply(body: bytes, n: int) -> Reply:
        together.wait(20.0)
        return good(body)

    with Judge(reply) as judge, ff.RewardServer(judge.url, workers=STATES, retries=0) as server:
        assert_equal_rewards(roll(server), roll(local))


def test_images_may_be_written_over_after_the_call() -> None:
    """As by a decode that answers into one buffer."""
    buffer = torch.empty(BATCH, *SHAPE)
    may_answer = threading.Event()
    calls = 0

    def decode(clean: Tensor, info: ff.Info) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == STATES:
            may_answer.set()
        return buffer.copy_(clean)

    def slow(images: Tensor, info: ff.Info) -> tuple[bytes, str]:
        assert may_answer.wait(20.0)
        return images.numpy().tobytes(), "application/octet-stream"

    def reply(body: bytes, n: int) -> Reply:
        return answer(scores(np.frombuffer(body, np.float32).reshape(-1, *SHAPE)))

    with Judge(reply) as judge, ff.RewardServer(judge.url, encode=slow) as server:
        assert_equal_rewards(roll(server, decode=decode), roll(local))


def test_numpy_images_and_narrow_floats() -> None:
    images = torch.rand(3, 2, 4, 4).bfloat16()
    with Judge() as judge, ff.RewardServer(judge.url) as server:
        narrow = server(images, some_info()).result(20.0)
        assert narrow == scores(images.float().numpy()) == server(images.float().numpy(), some_info()).result(20.0)
        assert [read_request(body)[0].dtype for body in judge.bodies] == [torch.float32] * 2


def test_a_server_that_wants_pickled_jpegs() -> None:
    """The protocol of flow_grpo's reward servers, with the hooks that the docstring shows."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, which diffusers brings")

    def encode(images: Tensor, info: ff.Info) -> tuple[bytes, str]:
        rows = images.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        files = [io.BytesIO() for _ in rows]
        for row, file in zip(rows, files, strict=True):
            image.fromarray(row).save(file, "JPEG")
        return pickle.dumps({"images": [file.getvalue() for file in files]}), "application/octet-stream"

    def reply(body: bytes, n: int) -> Reply:
        pictures = [np.asarray(image.open(io.BytesIO(data), formats=["jpeg"])) for data in pickle.loads(body)["images"]]
        return 200, {}, pickle.dumps({"outputs": [round(float(p[..., 0].mean())) for p in pictures]})

    grey = torch.tensor([0.0, 0.2, 1.0])[:, None, None, None].expand(3, 3, 16, 16)
    with Judge(reply) as judge:
        server = ff.RewardServer(judge.url, encode=encode, decode=lambda body: pickle.loads(body)["outputs"])
        assert server(grey, some_info()).result(20.0) == [0, 51, 255]


def test_a_pickled_server_serves() -> None:
    images = torch.rand(3, *SHAPE)
    with Judge() as judge, ff.RewardServer(judge.url, prompts=TEXTS, workers=2) as server:
        wanted = server(images, some_info()).result(20.0)
        with pickle.loads(pickle.dumps(server)) as copy:
            assert repr(copy) == repr(server) and copy.prompts == server.prompts
            assert copy(images, some_info()).result(20.0) == wanted == scores(images.numpy())


def _in_child(server: ff.RewardServer, images: np.ndarray, out: Any) -> None:
    out.put(server(images, some_info()).result(20.0))


def test_a_server_goes_on_after_a_fork() -> None:
    images = np.random.default_rng(0).random((3, *SHAPE), dtype=np.float32)
    context = multiprocessing.get_context("fork")
    with Judge() as judge, ff.RewardServer(judge.url, timeout=20.0) as server:
        wanted = server(images, some_info()).result(20.0)
        out = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(server, images, out))
        child.start()
        child.join(60.0)
        assert child.exitcode == 0 and out.get() == wanted
        assert server(images, some_info()).result(20.0) == wanted, "the parent's threads are still there"


def test_a_server_that_nobody_holds_answers_what_it_was_asked() -> None:
    def reward(images: Tensor, info: ff.Info) -> Any:
        future = ff.RewardServer(judge.url)(images, info)
        gc.collect()
        return future

    with Judge() as judge:
        assert_equal_rewards(roll(reward), roll(local))
    for thread in [t for t in threading.enumerate() if t.name.startswith("reward-")]:
        thread.join(20.0)
        assert not thread.is_alive(), "threads go with their server"


ARGUMENTS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no text": (7, {}, TypeError, "url: wanted text such as"),
    "no scheme": ("127.0.0.1:8000/score", {}, ValueError, "url: wanted http://host:port/path"),
    "another scheme": ("ftp://host/score", {}, ValueError, "url: wanted http://host:port/path"),
    "no host": ("http:///score", {}, ValueError, "url: wanted http://host:port/path"),
    "a port that is none": ("http://host:99999/", {}, ValueError, "url: wanted http://host:port/path"),
    "a line break": ("http://host/a\nb", {}, ValueError, "url: wanted"),
    "a password": ("http://me:secret@host/", {}, ValueError, "use headers="),
    "no time": ("http://host/", {"timeout": 0.0}, ValueError, "timeout: wanted seconds above 0, got 0.0"),
    "time without end": (
        "http://host/",
        {"timeout": float("inf")},
        ValueError,
        "timeout: wanted seconds above 0, got inf",
    ),
    "None": ("http://host/", {"timeout": None}, TypeError, "timeout: wanted seconds, got NoneType"),
    "retries": ("http://host/", {"retries": -1}, ValueError, "retries: wanted 0 or more, got -1"),
    "backoff": ("http://host/", {"backoff": -1}, ValueError, "backoff: wanted seconds, 0 or more, got -1"),
    "workers": ("http://host/", {"workers": 0}, ValueError, "workers: wanted 1 or more, got 0"),
    "half a worker": ("http://host/", {"workers": 1.5}, TypeError, "workers: wanted an integer, got float"),
    "encode": ("http://host/", {"encode": "jpeg"}, TypeError, "encode: wanted a function or None, got str"),
    "decode": ("http://host/", {"decode": 1}, TypeError, "decode: wanted a function or None, got int"),
    "headers": ("http://host/", {"headers": ["a"]}, TypeError, r"headers: wanted \{name: text\}, got list"),
    "header value": ("http://host/", {"headers": {"A": 1}}, TypeError, r"headers\['A'\]: wanted text, got int"),
    "header lines": (
        "http://host/",
        {"headers": {"A": "b\r\nC: d"}},
        ValueError,
        r"headers\['A'\]: wanted .* one line",
    ),
    "type": ("http://host/", {"headers": {"content-type": "x"}}, ValueError, "wanted none, encode gives the type"),
    "one prompt": ("http://host/", {"prompts": "a cat"}, TypeError, "prompts: wanted a list of texts"),
    "numbers": ("http://host/", {"prompts": [1]}, TypeError, "prompts: wanted a list of texts"),
    "both": ("http://host/", {"prompts": ["a"], "encode": str}, ValueError, "prompts: wanted none beside encode"),
}


@pytest.mark.parametrize(("url", "keywords", "kind", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(url: Any, keywords: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        ff.RewardServer(url, **keywords)
    assert "secret" not in str(caught.value)


def test_images_that_cannot_be_sent_are_refused_before_they_wait() -> None:
    server = ff.RewardServer("http://127.0.0.1:9/")
    for images, kind, message in (
        ([torch.rand(3, 4, 4)] * 3, TypeError, r"wanted a tensor \[3, C, H, W\] from decode, got list; or give"),
        (torch.rand(2, 3, 4, 4), ValueError, r"wanted \[3, C, H, W\] from decode, got \[2, 3, 4, 4\]"),
        (
            torch.zeros(3, 3, 4, 4, dtype=torch.int64),
            TypeError,
            "wanted float numbers in 0..1 or uint8, got torch.int64",
        ),
        (np.zeros((3, 3, 4, 4), np.complex64), TypeError, "wanted float numbers in 0..1 or uint8, got complex64"),
    ):
        with pytest.raises(kind, match=f"images: {message}"):
            server(images, some_info())
    with pytest.raises(ValueError, match="prompts: wanted a text for every prompt, 2 at least, got 1"):
        ff.RewardServer("http://127.0.0.1:9/", prompts=["one"])(torch.rand(3, *SHAPE), some_info())


def test_a_request_that_is_none_of_ours() -> None:
    for body in (b"", b"\x80\x04pickle", b"\x02\0\0\0\0\0\0\0{}"):
        with pytest.raises(ValueError, match=rf"body: wanted safetensors of a RewardServer, got {len(body)} bytes"):
            read_request(body)


def test_an_encode_that_gives_something_else() -> None:
    server = ff.RewardServer("http://127.0.0.1:9/", encode=lambda images, info: b"")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"encode: wanted \(body, content type\), got bytes"):
        server(torch.rand(3, *SHAPE), some_info()).result(20.0)


def test_a_decode_hook_may_fail() -> None:
    message = r"reward for \(sample, state\) .*ValueError: subsection not found"
    with Judge() as judge, pytest.raises(ff.RolloutError, match=message):
        roll(ff.RewardServer(judge.url, decode=lambda body: body.index(b"?")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_images_on_a_gpu_are_taken_without_waiting() -> None:
    images = torch.rand(3, *SHAPE, device="cuda")
    wanted = scores(images.cpu().numpy())
    with Judge() as judge, ff.RewardServer(judge.url) as server:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                late = images * 1.0
                future = server(late, some_info())
                late.zero_()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert future.result(20.0) == wanted
