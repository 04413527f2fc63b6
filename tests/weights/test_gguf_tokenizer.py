"""Tokenizers rebuilt from GGUF metadata, token for token against transformers' own classes."""

import functools
import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from dms_jax.config import ConfigError
from dms_jax.weights import gguf_tokenizer
from dms_jax.weights.gguf import open_gguf
from tests.helpers import texts

# Words in two normalisation forms, digits, whitespace runs and code, so that merges exist for every trap.
TRAINING = [texts.real_text(), texts.real_code(), *texts.VARIED * 3, "café e\u0301 " * 50]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@functools.cache
def trained(pre: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE of 3,000 tokens whose merges come from text split in the manner of `pre`."""
    splits = {"llama-bpe": TikTokenConverter().pattern, "qwen2": gguf_tokenizer._QWEN2}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in splits)
    parts = [byte_level]
    if pre in splits:
        parts = [pre_tokenizers.Split(Regex(splits[pre]), "isolated"), byte_level]
    if pre == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet))
    vocab = tokenizer.get_vocab()
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    return vocab, merges


def with_special(vocab):
    """Special tokens after the ordinary ones, and a user-defined one, as files of these families do."""
    return {**vocab, **{token: len(vocab) + n for n, token in enumerate([*SPECIAL, "<think>"])}}


def metadata(pre: str, vocab, merges, **more):
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if token in SPECIAL else 4 if token == "<think>" else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": vocab["<|endoftext|>"],
        "tokenizer.chat_template": CHAT,
        **more,
    }


def add(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def reference(pre: str, vocab, merges):
    """transformers' own tokenizer of the family."""
    if pre == "qwen2":
        return add(Qwen2Tokenizer(vocab=vocab, merges=merges))
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    if pre == "smollm":  # SmolLM2's tokenizer.json
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        parts = [pre_tokenizers.Digits(individual_digits=True), gpt2]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return add(tokenizer)


LONG = [texts.real_text(20_000), texts.real_code(20_000)]
CHATTY = [
    "<|im_start|>user\nhi  12<|im_end|>\n",
    "a<think> b</think><|endoftext|>",
    " <|im_end|> ",
    "<|im_end|>",
]
ALL = [*texts.VARIED, *LONG, *CHATTY]


def assert_same(mine, theirs, strings=ALL):
    for text in strings:
        got = mine(text)["input_ids"]
        assert got == theirs(text)["input_ids"], repr(text[:80])
        for skip in (False, True):
            assert mine.decode(got, skip_special_tokens=skip) == theirs.decode(got, skip_special_tokens=skip)


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "gpt-2"])
def test_byte_level_families(pre):
    vocab, merges = trained(pre)
    vocab = with_special(vocab)
    mine = gguf_tokenizer.build_tokenizer(metadata(pre, vocab, merges))
    assert_same(mine, reference(pre, vocab, merges))
    assert len(mine) == len(vocab)
    assert (mine.eos_token, mine.pad_token_id) == ("<|im_end|>", vocab["<|endoftext|>"])
    if pre != "qwen2":  # its NFC composes accents
        assert all(mine.decode(mine(text)["input_ids"]) == text for text in ALL)


def test_splits_tell_the_families_apart():
    """If two families split alike here, equality with the right one would prove nothing."""
    names = ("smollm", "llama-bpe", "qwen2", "gpt-2")
    vocab, merges = trained("gpt-2")
    vocab = with_special(vocab)
    built = [gguf_tokenizer.build_tokenizer(metadata(name, vocab, merges)) for name in names]
    for n, one in enumerate(built):
        for other in built[:n]:
            pieces = [[t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in ALL] for t in (one, other)]
            assert pieces[0] != pieces[1]


@pytest.fixture(scope="module")
def llama3():
    """Vocabulary, merges and reference of Llama 3's kind, through transformers' own converter of its file."""
    vocab, _ = trained("llama-bpe")
    byte = {character: bytes([n]) for n, character in bytes_to_unicode().items()}
    ranks = {b"".join(byte[character] for character in token): n for token, n in vocab.items()}
    # A word that its merges cannot reach: Llama 3 takes it whole all the same.
    ranks[b"xqzj"] = len(ranks)

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(lambda _: ranks)

    converter = Converter("-")
    _, merges = converter.extract_vocab_merges_from_model("-")
    special = dict.fromkeys([*SPECIAL, "<think>"])
    converter.extra_special_tokens = special.keys()
    full = {**vocab, "xqzj": ranks[b"xqzj"]}
    return with_special(full), merges, converter.converted()


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3(llama3, name):
    vocab, merges, theirs = llama3
    mine = gguf_tokenizer.build_tokenizer(metadata(name, vocab, merges))
    begin = [vocab["<|endoftext|>"]]  # stands in for <|begin_of_text|>
    for text in [*ALL, "xqzj", " xqzj"]:
        assert mine(text)["input_ids"] == begin + theirs.encode(text, add_special_tokens=False).ids, repr(text[:80])
        assert mine.decode(mine(text)["input_ids"][1:]) == text
    assert mine("xqzj", add_special_tokens=False)["input_ids"] == [vocab["xqzj"]]


def test_deepseek_r1_qwen_is_qwen2_with_bos():
    vocab, merges = trained("qwen2")
    vocab = with_special(vocab)
    flag = {"tokenizer.ggml.add_bos_token": True}
    mine = gguf_tokenizer.build_tokenizer(metadata("deepseek-r1-qwen", vocab, merges, **flag))
    theirs = reference("qwen2", vocab, merges)
    for text in ALL:
        assert mine(text)["input_ids"] == [vocab["<|endoftext|>"], *theirs(text)["input_ids"]]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_flags_for_bos_and_eos(llama3, bos, eos, tmp_path):
    vocab, merges, _ = llama3
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    mine = gguf_tokenizer.build_tokenizer(metadata("llama-bpe", vocab, merges, **flags))
    plain = mine("hello", add_special_tokens=False)["input_ids"]
    want = [vocab["<|endoftext|>"]] * bos + plain + [vocab["<|im_end|>"]] * eos
    assert mine("hello")["input_ids"] == want
    mine.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"] == want


def test_chat_template_and_round_trip_through_a_folder(tmp_path):
    vocab, merges = trained("smollm")
    mine = gguf_tokenizer.build_tokenizer(metadata("smollm", with_special(vocab), merges))
    mine.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert_same(again, mine)
    chat = [{"role": "user", "content": "hi"}]
    want = "<|im_start|>hi<|im_end|>\n"
    assert again.apply_chat_template(chat, tokenize=False) == mine.apply_chat_template(chat, tokenize=False) == want


# SentencePiece (Llama 2)


@pytest.fixture(scope="module")
def spm():
    """A vocabulary in Llama 2's form: three special tokens, 256 bytes, then pieces with falling scores."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(LONG, trainers.BpeTrainer(vocab_size=1500))
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(n) for n in range(len(pieces))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece(text: str, meta) -> list[int]:
    """The algorithm itself: join the best-scored neighbours until none are a piece; the rest is bytes."""
    vocab = {token: n for n, token in enumerate(meta["tokenizer.ggml.tokens"])}
    scores = meta["tokenizer.ggml.scores"]
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (scores[vocab[a + b]], -n) for n, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in vocab
        ]
        if not pairs:
            break
        n = -max(pairs)[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    ids = []
    for part in parts:
        ids += [vocab[part]] if part in vocab else [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def test_sentencepiece_llama(spm):
    mine = gguf_tokenizer.build_tokenizer(spm)
    vocab = {token: n for n, token in enumerate(spm["tokenizer.ggml.tokens"])}
    theirs = LlamaTokenizer(vocab=vocab, merges=gguf_tokenizer.score_merges(vocab, spm["tokenizer.ggml.scores"]))
    strings = [*texts.VARIED, *(text[n : n + 400] for text in LONG for n in range(0, 8000, 400))]
    for text in strings:
        if "<" in text:
            continue  # "<s>" in a text is the special token
        got = mine(text)["input_ids"]
        assert got == [1, *sentencepiece(text, spm)], repr(text[:80])
        assert mine.decode(got, skip_special_tokens=True) == text
        if text and not text.startswith(" "):  # there transformers adds no second space, SentencePiece does
            assert got[1:] == theirs(text, add_special_tokens=False)["input_ids"], repr(text[:80])
    assert mine("a</s>", add_special_tokens=False)["input_ids"][-1] == 2


def test_merges_from_scores_are_those_of_transformers(spm):
    from transformers.tokenization_utils_base import generate_merges

    tokens, scores = spm["tokenizer.ggml.tokens"], spm["tokenizer.ggml.scores"]
    vocab = {token: n for n, token in enumerate(tokens)}
    want = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    assert gguf_tokenizer.score_merges(vocab, scores) == want


def test_space_prefix_can_be_off(spm):
    mine = gguf_tokenizer.build_tokenizer({**spm, "tokenizer.ggml.add_space_prefix": False})
    ids = mine("the", add_special_tokens=False)["input_ids"]
    assert mine.convert_ids_to_tokens(ids)[0][0] == "t" and mine.decode(ids) == "the"


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model='t5'.*pass tokenizer="),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre='tekken'.*pass tokenizer="),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre='default'.*pass tokenizer="),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "same token twice"),
    ],
)
def test_unknown_kinds_are_refused(change, message):
    vocab, merges = trained("smollm")
    with pytest.raises(ConfigError, match=message):
        gguf_tokenizer.build_tokenizer({**metadata("smollm", with_special(vocab), merges), **change})
    assert gguf_tokenizer.build_tokenizer({}) is None


# The real thing


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    return gguf_tokenizer.build_tokenizer(open_gguf(smollm2_file)[0])


def test_smollm2_token_for_token(smollm2, smollm2_file):
    theirs = AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    # transformers does not know the name "smollm" and leaves out the splitting of digits that SmolLM2's own
    # tokenizer.json (and llama.cpp) has: on text without digits the two agree as they are ...
    plain = ["".join(c for c in text if not c.isnumeric()) for text in ALL]
    assert_same(smollm2, theirs, plain)
    # ... and on all text with that one step put in.
    gpt2 = theirs.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    assert_same(smollm2, theirs, ALL)
    assert all(smollm2.decode(smollm2(text)["input_ids"]) == text for text in ALL)
    assert smollm2.all_special_ids and set(smollm2.added_tokens_decoder) == set(theirs.added_tokens_decoder)
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    mine, want = (t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (smollm2, theirs))
    assert mine == want and "<|im_start|>assistant" in mine
