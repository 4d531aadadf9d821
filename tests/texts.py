"""Texts that tokenizers get wrong."""

TEXTS = [
    "",
    "Hello world",
    "I'll WE'RE don't HelloWorld fooBAR",
    "naïve café ☕ 🙂👩\u200d👩\u200d👧 e\u0301 ﬁ①",
    "日本語 한국어 中文 ქართული ру́сский",
    "2024 12345 3.14 x=1",
    "def f(a, b):\n    return a**b  # ok\n\n\n",
    "\r\n\r\n\t x \u3000y\u00a0z",
    "a" * 50 + " " * 37 + "b ",
    "  leading and trailing  ",
    "half <|im_start|>user\nhi<|im_end|> </s><s> <unk>",
    "\0\ufeff\x7f",
]
