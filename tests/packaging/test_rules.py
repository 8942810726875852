"""The bans of .pre-commit-config.yaml catch what they are meant to catch, and let the rest pass."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from tests.packaging.repository import ROOT

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which pre-commit brings")


@cache
def hooks() -> dict[str, dict[str, Any]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    return {hook["id"]: hook for hook in config["repos"][0]["hooks"]}


def caught(hook: str, line: str, path: str) -> bool:
    """Whether `hook` objects to `line` in `path`, as pre-commit would run it."""
    rule = hooks()[hook]
    looked_at = re.search(rule.get("files", ""), path) and not re.search(rule.get("exclude", "^$"), path)
    return bool(looked_at and re.search(rule["entry"], line))


@pytest.mark.parametrize(
    ("hook", "line", "path"),
    [
        ("environment", "value = os.environ['X']", "fastflow/ops/step.py"),
        ("environment", "os.getenv('X')", "kernels/step.py"),
        ("tolerances", "torch.testing.assert_close(a, b, rtol=1e-5, atol=0)", "tests/ops/test_step.py"),
        ("swallowed-errors", "    except Exception as error:", "fastflow/x.py"),
        ("swallowed-errors", "    except (BaseException, ValueError):", "tests/x.py"),
        ("swallowed-errors", "    except:", "bench/x.py"),
        ("top-level-kernels", "from kernels import x", "fastflow/x.py"),
        ("top-level-kernels", "    import kernels.step as s", "tests/x.py"),
        ("fast-math", 'FLAGS = ["-ffast-math"]', "setup.py"),
        ("fast-math", "--use_fast_math", "csrc/cuda/x.cu"),
        ("todo", "# TODO: later", "fastflow/x.py"),
        ("whitespace", "x = 1 ", "fastflow/x.py"),
    ],
)
def test_it_is_caught(hook: str, line: str, path: str) -> None:
    assert caught(hook, line, path)


@pytest.mark.parametrize(
    ("hook", "line", "path"),
    [
        ("environment", "value = os.environ['X']", "fastflow/_env.py"),
        ("environment", "os.environ['CXX']", "setup.py"),
        ("tolerances", "REPLAY = dict(rtol=1e-5)", "tests/tolerance.py"),
        ("tolerances", "assert_close(a, b, rtol=0, atol=bound)", "tests/ops/test_step.py"),
        ("swallowed-errors", "except ValueError as error:", "fastflow/x.py"),
        ("swallowed-errors", "except BuildFailed as error:", "setup.py"),
        ("top-level-kernels", "import fastflow.kernels", "fastflow/x.py"),
        ("top-level-kernels", "from .kernels import x", "fastflow/x.py"),
        ("todo", "# TODO: https://example.org/1", "fastflow/x.py"),
    ],
)
def test_it_passes(hook: str, line: str, path: str) -> None:
    assert not caught(hook, line, path)
