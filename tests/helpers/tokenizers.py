"""Small real tokenizers."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for turn in messages %}<t>{{ turn['role'][0] }}{{ turn['content'] }}<e> {% endfor %}"
    "{% if add_generation_prompt %}<t>a{% endif %}"
)


@functools.cache
def letters(before: str = "<b>", after: str = "", template: str | None = "{{ 1 }}") -> PreTrainedTokenizerFast:
    """A tokenizer of a few letters; `before` and `after`: what it puts around a text."""
    vocab = {token: n for n, token in enumerate(["<p>", "<b>", "<e>", "<t>", *"abcdefghu ", "ab", "abc", "gh"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c"), ("g", "h")], unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<b>", "<e>", "<t>"])
    around = [token for token in (before, "$A", after) if token]
    special = [(token, vocab[token]) for token in around if token in vocab]
    tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<b>", eos_token="<e>", chat_template=template)
