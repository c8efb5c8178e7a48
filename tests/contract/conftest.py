"""Which parts of the contracts run in CI's second step."""

import pytest

LATER = ("[triton-full]", "[auto-full]", "[auto-lora]")
"""The same kernels with all weights trained; and `auto`, which is the reference set where there is no GPU."""

ONE_OF_EACH_KIND = (
    *("TestLlama", "TestGemma3", "TestPhi3"),  # a plain decoder, one with other norms and windows, fused projections
    *("TestQwen3Moe", "TestQwen3VL"),  # experts, images
    *("TestBert", "TestWhisper", "TestCsm"),  # an encoder, an encoder and a decoder, two decoders
)
"""The families that do everything in the first step; the others load and are patched without a change there."""

LATER_FOR_OTHERS = (
    "test_a_second_model_stays_as_it_was",
    "test_every_trained_parameter_gets_a_gradient",
    "test_kernels_keep_loss_and_gradients[reference-full]",
    "test_kernels_keep_loss_and_gradients[triton-lora]",
    "test_merged_says_the_same",
    "test_recomputation_keeps_gradients",
    "test_saved_and_loaded_says_the_same",
    "test_three_steps_of_sft",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "test_contract_models" not in item.nodeid:
            continue
        whole = item.nodeid.split("::")[1] in ONE_OF_EACH_KIND
        if item.name.endswith(LATER) or (not whole and item.name.startswith(LATER_FOR_OTHERS)):
            item.add_marker(pytest.mark.slow)
