"""The contract of every quantizer."""

from ftcore.testing import QuantizerContract

pytest_plugins = ["ftcore.testing"]


class TestInt8(QuantizerContract):
    plugin = "quantizer/bnb_int8"
    error = 0.05


class TestNF4(QuantizerContract):
    plugin = "quantizer/bnb_nf4"
    size = 0.7


class TestFP8(QuantizerContract):
    plugin = "quantizer/fp8"
    error = 0.1


class TestFP8WithABackwardPassIn16Bits(QuantizerContract):
    plugin = "quantizer/fp8"
    settings = ("quantizer.backward=bf16",)
    size = 0.6
    error = 0.1
