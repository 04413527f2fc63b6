"""Varied text for tokenizers, and long real text that every Python installation has."""

import inspect

VARIED = [
    "", " ", "  ", "\n", "\n\n", "\t\tx", "a", " a", "  a", "a ", "a  ", "a\n\n  b", "\r\n\r\nx", " \n \n ",
    "Hello, world!", "don't I'M we'LL you'Ve 'tis it's 'S", "HTTPServer2 camelCase snake_case kebab-case",
    "1", "12", "123", "1234", "12345678901",
    " 1 22  333   4444", "3.14159e-10", "0x1F600", "x=1;y =2",
    "1,000,000",     "½ ² ٣ Ⅷ 一二三 １２３",
    "a1b2c3", "  12", "a   1", "\n\n12", "(1)", "1st 2nd", "2024-05-06T07:08:09Z",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n", "\tif (a!=b) { c += ++d; }\r\n",
    "<div class=\"x\">&nbsp;</div>", "\\frac{a}{b} + \\boxed{042} $x^{2}$", "!!!???...---",
    "a--b", "?!\n\n!?",
    "日本語のテキスト、そして한국어와 中文字符。", "Привет, мир! Ёлка", "γειά σου Κόσμε",
    "مرحبا بالعالم", "हिन्दी में पाठ", "ไทย",
    "naïve café résumé Łańcucki", "e\u0301 n\u0303 A\u030a (decomposed)", "ﬁ ligature, Å Ω",
    "😀 👩‍👩‍👧‍👦 🇵🇱 ❤️",
    "𝒳𝓎𝓏 𐍈",
    "zero\u200bwidth\u00a0nbsp\u3000wide\u2028line", "tabs\tand\x0bvertical\x0cfeeds", "\x00\x01\x7f",
    "\ufffd", "ß→SS",
    "endoftext im_start <s> </s> <unk> <|x|>", "  lots   of    spaces     here      ", "x" * 300, "ab " * 100,
    "a\u0000b", "tail space then number 7 ", "   \n   \n\t 9", "''''''", "'ll 'LL 'll", "word'word",
]  # fmt: skip


def real_text(characters: int = 40_000) -> str:
    """Prose from docstrings of the standard library, the same on every machine with this Python."""
    import argparse
    import collections
    import decimal
    import difflib
    import doctest
    import functools
    import heapq
    import logging
    import pickle
    import random
    import statistics
    import string
    import textwrap
    import unittest

    modules = [argparse, difflib, doctest, heapq, random, statistics, string, pickle, decimal, collections]
    modules += [functools, logging, textwrap, unittest]
    pieces = []
    for module in modules:
        pieces.append(inspect.getdoc(module) or "")
        for name, member in sorted(vars(module).items()):
            if getattr(member, "__module__", None) == module.__name__ and not name.startswith("_"):
                pieces.append(f"{name}: {inspect.getdoc(member) or ''}")
    text = "\n\n".join(pieces)
    assert len(text) >= characters, len(text)
    return text[:characters]


def real_code(characters: int = 40_000) -> str:
    import argparse

    return inspect.getsource(argparse)[:characters]
