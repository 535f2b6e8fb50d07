"""What an engine may be told."""

import pytest
import torch

from moemerge.bundle.reader import open_bundle
from moemerge.errors import InvalidRecipe, NotFound
from moemerge.runner.options import EngineOptions, choose_dtype
from moemerge.runner.policies import Policy
from tests.bundles import open_engine, write_bundle

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block_tokens": 0}, "block tokens is 0, expected at least 1"),
        ({"device_memory": 0}, "device memory is 0 bytes"),
        ({"cache_memory": -5}, "cache memory is -5 bytes"),
        ({"policy": "lifo"}, "policy 'lifo' is unknown; there are mixed, grouped, fcfs"),
        ({"max_batch": 0}, "max batch is 0, expected at least 1"),
        ({"max_wait_s": -1.0}, "max wait is -1.0 seconds"),
        ({"max_wait_s": float("nan")}, "max wait is nan"),
        ({"quantum_s": float("inf")}, "quantum is inf"),
        ({"shares": {"plain": 0.0}}, "share of plain is 0.0"),
        ({"shares": {"plain": float("nan")}}, "share of plain is nan"),
        ({"patience_s": -0.1}, "patience_s is -0.1"),
        ({"min_hold_s": float("nan")}, "min_hold_s is nan"),
        ({"drain_s": -1.0}, "drain_s is -1.0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_when_options_are_made(options, complaint):
    with pytest.raises(InvalidRecipe, match=complaint):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is unknown; there are auto, float32"),
        ({"device": "toaster"}, "device 'toaster' is unknown; there are cpu and cuda"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": ""}, "device ''"),
        ({"device": "cuda:77"}, "device 'cuda:77': there are"),
        ({"resident": "0"}, "resident is 0, expected at least 1"),
        ({"resident": "-1"}, "resident is '-1', expected all, a number of variants, or a size"),
        ({"resident": "many"}, "resident is 'many'"),
        ({"resident": "10B"}, "resident is 10B, which leaves no room for variant plain"),
        ({"resident": "1", "pinned": ("large",)}, "no room for variant plain beside large, pinned"),
        (
            {"resident": "2", "pinned": ("large", "odd")},
            "no room for variant plain beside large, odd, pinned",
        ),
    ],
)
def test_what_does_not_go_with_the_bundle_or_the_machine_is_refused(options, complaint, mixtral_bundle):
    with pytest.raises(InvalidRecipe, match=complaint):
        open_engine(mixtral_bundle, **options)


@pytest.mark.parametrize("option", ["variants", "pinned", "shares"])
def test_variants_that_the_bundle_has_not_are_not_found(option, mixtral_bundle):
    value = {"huge": 2.0} if option == "shares" else ("huge",)
    with pytest.raises(NotFound, match="no variant 'huge'; it holds plain, large"):
        open_engine(mixtral_bundle, **{option: value})


@pytest.mark.parametrize("resident", ["all", "2", "1MiB"])
def test_only_variants_that_are_served_can_be_pinned(resident, mixtral_bundle):
    with pytest.raises(NotFound, match="no variant 'odd' is served; there are plain, large"):
        open_engine(mixtral_bundle, variants=("plain", "large"), pinned=("odd",), resident=resident)


def test_policies_have_a_patience_of_their_own_that_may_be_replaced():
    fcfs, mixed = EngineOptions(policy="fcfs"), EngineOptions(policy="mixed")
    assert fcfs.chosen_policy() is Policy.FCFS
    assert fcfs.patience().patience_s == 0
    assert fcfs.patience().drain_s == float("inf"), "in order of arrival nobody is interrupted"
    assert 0 < mixed.patience().patience_s < mixed.patience().drain_s < float("inf")
    assert EngineOptions(policy="fcfs", drain_s=2.0).patience().drain_s == 2.0


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
        ("F16", torch.float32),  # slow and narrow on a CPU
        ("F64", torch.float32),
    ],
)
def test_computes_as_stored_where_that_is_sensible(stored, chosen, tmp_path):
    bundle = open_bundle(write_bundle(tmp_path, dtype=stored))
    assert choose_dtype(bundle, "auto", CPU) == chosen
    assert choose_dtype(bundle, "float16", CPU) == torch.float16
