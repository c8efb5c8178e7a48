"""Texts on which an export is compared with the trained model: conversations of many kinds, rendered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ftcore.chat import render
from ftcore.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftcore.specs import Plan

TEXTS = (
    "What is the capital of France? Answer briefly, and say one thing that it is known for.",
    "Write three short sentences about a cat that is afraid of rain, and end with a question.",
    "  Leading and trailing spaces,\ttabs,\n\nblank lines and    runs of spaces stay as they are.  ",
    "12345 + 67890 = 80235; 3.14159265 * 2 = 6.2831853; 1,000,000.00; 0x1F600; 1e-5; 50 %; 7/8; -42",
    'def add(a: int, b: int = 1) -> int:\n    """Sum."""\n    return a + b  # 2 + 1\n\nprint(add(2))\n',
    "for (int i = 0; i < n; i++) { if (x[i] != '\\0') { *p++ = x[i] ^ 0x5A; } } // C",
    '{"name": "Zoë", "ids": [1, 2, 3], "nested": {"ok": true, "none": null}, "path": "C:\\\\temp\\\\a.txt"}',
    '<p class="x">a &amp; b</p> <br/> [link](https://example.org/a?b=c&d=e#f) **bold** `code` | a | b |',
    "Ça coûte 9,99 €. Wie heißt du? ¿Dónde está? Łódź, Øresund, İstanbul, naïve café, ﬁne.",
    "Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк.",
    "你好，世界。今天的天气怎么样？請用一句話回答。日本語のテスト：カタカナ、ひらがな、漢字。",
    "안녕하세요? 오늘 날씨가 좋네요. 한국어 문장을 하나 써 주세요.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם, מה שלומך היום?",
    "नमस्ते दुनिया, आप कैसे हैं? สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง",
    "Emoji: 😀 👍🏽 👩‍👩‍👧 🇩🇪 ❤️; zero\u200bwidth no\u00a0break soft\u00adhyphen",
    "I'm, you're, he'd, we'll, they've, it's, DON'T, rock'n'roll, O'Neill; “quoted”, ‘so’ – and — dashes…",
    "camelCaseWord PascalCaseWord snake_case_word kebab-case-word SCREAMING_CASE HTTPServer2 x86_64 v1.2.3-rc1",
    "aaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbb !!!!!!!!!!!! ............ ------------ ============ ____________",
    "∑_{i=1}^{n} i² = n(n+1)/2, √2 ≈ 1.4142, α ≤ β ⇒ ¬(β < α), ∀x ∈ ℝ: x·0 = 0, 5 × 10⁻³ µm, ½ ± ¼",
    "$ ls -la ~/data | grep '\\.json$' > out.txt 2>&1 && echo \"done: $?\"\r\nC:\\> dir /s\r\n",
    "Translate to German: The quick brown fox jumps over the lazy dog while 27 birds watch.",
    "Explain in one sentence why the sky is blue. Then list: 1. red 2. green 3. blue",
    "From: a@example.org\nTo: b@example.org\nSubject: Re: Re: meeting at 10:30 (UTC+2), 2024-02-29\n\nSee you.",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism floccinaucinihilipilification",
    "Continue the series: Monday, Tuesday, Wednesday, ... and: 1, 1, 2, 3, 5, 8, 13, 21, ...",
    "SELECT name, COUNT(*) AS n FROM users WHERE age >= 18 GROUP BY name HAVING n > 1 ORDER BY n DESC;",
)
"""Shipped texts: prose, numbers, code, markup, many scripts, white space, punctuation.

All are in Unicode's composed form (NFC): some tokenizers bring text into it, and llama.cpp never does.
"""


def texts(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], bool]:
    """The texts, and whether they are rendered conversations: plain where there is no template that takes them.

    The run's own prompts come first, those of the data format's sample next, then the shipped ones.
    """
    own = plan.format.sample_prompts if plan.format else ()
    plain = list(dict.fromkeys([*plan.run.prompts, *own, *TEXTS]))
    if tokenizer.chat_template:
        try:
            return list(_conversations(tokenizer, plain)), True
        except Refused:  # a template of another kind, which wants images or a certain system message
            pass
    return plain, False


def _conversations(tokenizer: PreTrainedTokenizerBase, plain: Sequence[str]) -> Iterator[str]:
    """Every text as a question, and every one as an answer within a longer conversation."""
    for text in plain:
        yield render(tokenizer, [{"role": "user", "content": text}], generate=True)
    for i, text in enumerate(plain):
        asked, then = plain[i - 1], plain[i - 2]
        said = [("user", asked), ("assistant", text), ("user", then)]
        yield render(tokenizer, [{"role": role, "content": words} for role, words in said], generate=True)
