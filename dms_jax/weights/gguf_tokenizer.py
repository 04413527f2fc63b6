"""The tokenizer in a GGUF file's metadata, rebuilt with the `tokenizers` library.

GGUF stores vocabulary, merges or scores, and the name of the pre-tokenizer; the regular expressions that the
names stand for are below. An unknown name is an error: a wrong split gives wrong tokens without a sign.
"""

from collections.abc import Mapping
from typing import Any

from dms_jax.config import ConfigError

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
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise ConfigError(f"tokenizer.ggml.model={kind!r}: cannot be rebuilt, pass tokenizer= to load")
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: n for n, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ConfigError("tokenizer.ggml.tokens: the same token twice, pass tokenizer= to load")
    tokenizer, add_bos = _byte_level(metadata, vocab) if kind == "gpt2" else _sentencepiece(metadata, vocab)
    _add_tokens(tokenizer, metadata)
    names = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in SPECIAL.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    _add_ends(tokenizer, vocab, names, add_bos, add_eos)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]):
    """Byte-level BPE (GPT-2's alphabet) with the pre-tokenizer that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(f"tokenizer.ggml.pre={pre!r}: cannot be rebuilt, pass tokenizer= to load")
    split, add_bos = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
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

    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = score_merges(vocab, metadata["tokenizer.ggml.scores"])
    model = models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
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
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False):
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
