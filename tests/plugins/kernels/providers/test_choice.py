"""Which provider an operator's kernels come from: what a user may say."""

from __future__ import annotations

import pytest

from seekforge.common.errors import OptionError
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.kernels.providers.choice import provider_fault, read_choice

SIZES = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}


def test_operators_are_named_or_left_to_the_cost_model() -> None:
    assert read_choice([]) == {}
    assert read_choice(["MoeRoute=flashinfer"]) == {"MoeRoute": "flashinfer"}
    assert read_choice(["auto"]) == {"MoeRoute": "auto"} == read_choice(["MoeRoute=auto"])
    assert (
        read_choice(["auto", "MoeRoute=triton"]) == {"MoeRoute": "triton"} == read_choice(["MoeRoute=triton", "auto"])
    )


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["flashinfer"], "'flashinfer' is no choice of kernels, expected OPERATOR=PROVIDER or auto"),
        (["Softmax=flashinfer"], "'Softmax' has no kernels; operators are AddRmsNormQuantize"),
        (["DsaAttention=flashinfer"], "DsaAttention has no kernels of provider 'flashinfer'; it has triton, or auto"),
        (["MoeRoute=cutlass"], "it has triton, flashinfer, or auto"),
        (["MoeRoute=triton", "MoeRoute=flashinfer"], "MoeRoute is given the providers triton and flashinfer"),
    ],
)
def test_what_nobody_provides_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_choice(texts)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"n_group": 1, "topk_group": 1}, ""),
        ({"E": 1024, "n_group": 32}, "n_routed_experts is 1024, kernels take a power of two from 16 to 512"),
        ({"E": 512, "n_group": 64}, "n_group is 64, kernels take a power of two from 1 to 32"),
        ({"n_group": 32, "topk_group": 20}, "topk_group is 20, kernels take at most 16"),
    ],
)
def test_a_provider_says_for_which_sizes_it_has_kernels(changed: dict[str, int], words: str) -> None:
    fault = provider_fault("MoeRoute", "flashinfer", SIZES | changed)
    assert (words in fault) if words else (fault == "")
    assert provider_fault("MoeRoute", "triton", SIZES | changed) == "", "Triton's take them all"


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 33])
def test_launches_have_the_arguments_of_tritons(tokens: int) -> None:
    bound = SIZES | {"T": tokens, "scale": 2.5}
    ours, theirs = (op_kernels("MoeRoute", provider) for provider in ("triton", "flashinfer"))
    launches = theirs.plan(bound, 90).launches
    assert [one.arguments for one in launches] == [one.arguments for one in ours.plan(bound, 90).launches]
    assert [one.grid for one in launches] == ([(-(-tokens // 4), 1, 1)] if tokens else [])
    (variant,) = theirs.variants(SIZES, 90)
    assert variant.num_warps == 4, "a warp for each token of a program"
    assert list(variant.types) == list(ours.variants(SIZES, 90)[0].types)
