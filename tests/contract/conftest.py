"""Which parts of the contracts run in CI's second step."""

import pytest

LATER = ("[triton-full]", "[auto-full]", "[auto-lora]")
"""The same kernels with all weights trained; and `auto`, which is the reference set where there is no GPU."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "test_contract_models" in item.nodeid and item.name.endswith(LATER):
            item.add_marker(pytest.mark.slow)
