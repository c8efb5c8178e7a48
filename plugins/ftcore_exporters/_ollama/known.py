"""Published chat templates by the SHA-256 of their text."""

from __future__ import annotations

import hashlib

KNOWN: dict[str, str] = {
    "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a": "Qwen2.5",
    "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb": "Qwen2.5-VL",
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "Qwen3",
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": "Qwen3",
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "Qwen3 Instruct 2507",
    "9d879ef91075acbfb2df7e441fd79d60bacfca989cf6d511d2af45c681e94f10": "Qwen3-VL",
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "Llama 3",
    "93c0e9aa3629bbd77e68dbc0f5621f6e6b23aa8d74b932595cdb8d64684526d7": "Llama 3.1",
    "d82792f95932f1c9cef5c4bd992f171225e3bf8c7b609b4557c9e1ec96be819f": "Llama 3.2",
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6": "Gemma and Gemma 2",
    "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29": "Gemma 3",
    "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa": "Phi-3",
    "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90": "Phi-3.5",
    "a41fb8727c4f1e722e53cb1ea935038a1177b8bdf09387f3b048f9da5255ef3e": "Phi-4",
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": "DeepSeek-R1 distillations",
    "dd2675619a64a449cdcdd2b93e605a0a50764cee41e344f244752bc93643936c": "DeepSeek-R1 distillations",
    "cef187400d62a59507aab3a642ea9a8d2a2ef263562bc3430560e116945273cf": "LFM2",
    "2294f49b51a0b9a1b0194add3f124237b5bd986599f43180eec49bba4de01365": "LFM2",
    "5504d163d879bfb6fd4135b7fa3d56768b2e69dd718338f7b146750289f46ab0": "LFM2",
    "6d65c8804847ad74eea912dd7eca3dc1cf7a457b53a77f47d841a14121910963": "LFM2.5",
    "e7deee034838db2bfc7487788a3013d8a307ab69f72f3c54a85f06fd76007d4e": "Mistral Nemo",
    "cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd": "Mistral v0.3",
    "bbc58aad99454df60138be9530c9601a0adfe3d8932cda975e1f10b2410ddc51": "Mistral v0.2",
    "fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e": "ChatML",
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "SmolLM2",
    "1d7acdbe98cb46074b89565fd3f628e234e5e6e8b5c6ef20820b093cd9bf8350": "ftcore's alpaca",
    "73cd496525eaab7bdfbe885c2be2f2d343d8a6cf9fa456cae8edb6898d0d6e90": "ftcore's chatml",
    "f4163f4293a48a1b058e058698be0e749fb7a1e0abc69a905ea0765099f9f554": "ftcore's mistral",
    "97b87c19201ccdcec81208c9abeb700b6e252eb16f36910cdef0bd0fb26b4c90": "ftcore's phi4",
    "cd5697d2f9274f27c269da8e37c47bbc00ff40230810f053efc05ce100b42a68": "ftcore's smollm2",
    "eb9fc573ad6e0ecc5227bd9c34c55aca99f35442822dcefbe838738bb24d85d8": "ftcore's vicuna",
    "9fe579a2c222698c7ba22d46e26466362fbe951569a89096c366267f9b82ab92": "ftcore's tiny models",
}
"""SHA-256 of the text, see `digest`, to whose template it is."""


def digest(template: str) -> str:
    """SHA-256 of a template's UTF-8 text with `\\n` for line breaks and without white space around it."""
    return hashlib.sha256("\n".join(template.splitlines()).strip().encode()).hexdigest()
