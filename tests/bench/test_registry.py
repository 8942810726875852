"""The registry is consistent: what an entry names is there."""

from __future__ import annotations

import pytest

from bench import registry
from bench.machine import ROOT
from bench.registry import Entry


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_what_an_entry_names_is_there(entry: Entry) -> None:
    names = [v.name for v in entry.variants]
    assert len(set(names)) == len(names)
    assert registry.entry(entry.name) is entry
    assert (ROOT / entry.gate).exists()
    for variant in entry.variants:
        assert set(variant.against) <= set(names) - {variant.name}
        for shape in entry.shapes:
            assert set(variant.touches) <= set(entry.specs(shape))
            assert (entry.bytes_moved(variant, shape) > 0) == bool(variant.touches)


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="benchmark: wanted one of step, launch, log_prob_backward, policy, matching, rollout, got 'stride'",
    ):
        registry.entry("stride")
