"""The tokenizer in a GGUF file's metadata, rebuilt with the `tokenizers` library.

GGUF stores vocabulary, merges or scores, and the name of the pre-tokenizer; the regular expressions that the
names stand for are below. An unknown name is an error: a wrong split gives wrong tokens without a sign.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dms_jax.config import ConfigError, require, take

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# tokenizer.ggml.pre -> (kind of splitting, whether BOS is added unless the file says)
PRE_TOKENIZERS = {
    "smollm": ("digits", False),
    "llama-bpe": ("llama3", True),
    "llama3": ("llama3", True),
    "llama-v3": ("llama3", True),
    "qwen2": ("qwen2", False),
    "deepseek-r1-qwen": ("qwen2", False),
    "gpt-2": ("gpt2", False),
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """A transformers tokenizer, None if the file has none; ConfigError on a kind that is not known here."""
    kind = take(metadata, "tokenizer.ggml.model", str, None)
    if kind is None:
        return None
    require(kind in ("gpt2", "llama"), "tokenizer.ggml.model", kind, "cannot be rebuilt, pass tokenizer= to load")
    tokens = take(metadata, "tokenizer.ggml.tokens", list[str])
    vocab = {token: n for n, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ConfigError("tokenizer.ggml.tokens: the same token twice, pass tokenizer= to load")
    names = {}
    for name, key in SPECIAL.items():
        token = take(metadata, f"tokenizer.ggml.{key}_token_id", int, None)
        if token is not None:
            require(0 <= token < len(tokens), f"tokenizer.ggml.{key}_token_id", token, f"of {len(tokens)} tokens")
            names[name] = tokens[token]
    add_eos = take(metadata, "tokenizer.ggml.add_eos_token", bool, False)
    template = take(metadata, "tokenizer.chat_template", str, None)
    with refused_by_name(lambda: "tokenizer.ggml"):
        tokenizer, add_bos = _byte_level(metadata, vocab) if kind == "gpt2" else _sentencepiece(metadata, vocab)
        _add_tokens(tokenizer, metadata)
        _add_ends(tokenizer, vocab, names, take(metadata, "tokenizer.ggml.add_bos_token", bool, add_bos), add_eos)
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **names
        )


@contextlib.contextmanager
def refused_by_name(where: Callable[[], str]) -> Iterator[None]:
    """Whatever the tokenizer libraries raise on a damaged file, a panic of their Rust part included, as ConfigError.

    where: what to name; called after an error, and may raise a better one.
    """
    try:
        yield
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{where()}: the tokenizer cannot be read ({type(error).__name__}: {reason})") from error


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]):
    """Byte-level BPE (GPT-2's alphabet) with the pre-tokenizer that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = take(metadata, "tokenizer.ggml.pre", str, None)
    require(pre in PRE_TOKENIZERS, "tokenizer.ggml.pre", pre, "cannot be rebuilt, pass tokenizer= to load")
    split, add_bos = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in take(metadata, "tokenizer.ggml.merges", list[str])]
    # Llama 3 takes a word that is in the vocabulary whole, even if its merges would not get there.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama3"))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = {
        "digits": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama3": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), bytes_only]),
        "qwen2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), "isolated"), bytes_only]),
        "gpt2": lambda: gpt2,
    }[split]()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, add_bos


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int]):
    """Llama 2's SentencePiece BPE: merges ordered by score, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = take(metadata, "tokenizer.ggml.unknown_token_id", int, 0)
    tokens, scores = metadata["tokenizer.ggml.tokens"], take(metadata, "tokenizer.ggml.scores", list[float])
    require(len(scores) == len(tokens), "tokenizer.ggml.scores", len(scores), f"scores of {len(tokens)} tokens")
    merges = score_merges(vocab, scores)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = take(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def score_merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored result first, then the longest left piece.

    With pieces a, b, ab (-1), abb (-2): (a, b), then (ab, b). The order is that of transformers.
    """
    merges = []
    for piece, n in vocab.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[n], -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])]


def _add_tokens(tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens are matched whole and skipped when decoding; user-defined ones are matched whole."""
    from tokenizers import AddedToken

    added = {CONTROL: [], USER_DEFINED: []}
    tokens, kinds = metadata["tokenizer.ggml.tokens"], take(metadata, "tokenizer.ggml.token_type", list[int], None)
    fit = kinds is None or len(kinds) == len(tokens)
    require(fit, "tokenizer.ggml.token_type", kinds and len(kinds), f"types of {len(tokens)} tokens")
    for token, kind in zip(tokens, kinds or [0] * len(tokens), strict=True):
        if kind in added:
            added[kind].append(AddedToken(token, special=kind == CONTROL, normalized=False))
    tokenizer.add_special_tokens(added[CONTROL])
    tokenizer.add_tokens(added[USER_DEFINED])


def _add_ends(tokenizer, vocab: Mapping[str, int], names: dict[str, str], add_bos: bool, add_eos: bool) -> None:
    """The post-processor that puts BOS before and EOS after a text, as far as the file asks for them."""
    from tokenizers import processors

    before = [names["bos_token"]] if add_bos and "bos_token" in names else []
    after = [names["eos_token"]] if add_eos and "eos_token" in names else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[
                *before,
                "$A",
                *after,
                *(f"{token}:1" for token in before),
                "$B:1",
                *(f"{t}:1" for t in after),
            ],
            special_tokens=[(token, vocab[token]) for token in dict.fromkeys((*before, *after))],
        )
