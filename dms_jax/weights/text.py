"""From text to token ids: the only place that says where a beginning-of-sequence token (BOS) stands.

A text begins with one BOS if its tokenizer puts one there, and never with two: a chat that was rendered and is then
given as a text has its own. What goes on a sequence gets none, and a chat has those that its template writes.
"""

from collections.abc import Sequence
from typing import Any

from dms_jax.config import ConfigError, require

Turn = dict[str, str]  # "role" and "content"
ANSWER = "(an earlier answer)"  # stands for what a template shows before the turn that is wanted


def encode_all(tokenizer: Any, texts: Sequence[str], begins: bool = True) -> list[list[int]]:
    """The ids of each text, without an end-of-sequence token behind it.

    begins: whether the texts begin a sequence, and are not a rendered chat.
    Raises:
      ConfigError: no tokenizer, or a text that is not Unicode.
    """
    require(tokenizer is not None, "tokenizer", None, "this model has none: pass token ids")
    for text in texts:
        check_unicode(text)
    ids = [list(one) for one in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    bos = getattr(tokenizer, "bos_token_id", None)
    if not begins or bos is None or list(tokenizer("")["input_ids"][:1]) != [bos]:
        return ids
    return [one if one[:1] == [bos] else [bos, *one] for one in ids]


def check_unicode(text: str) -> None:
    """Raises ConfigError for half of a surrogate pair, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"text={text[error.start : error.end]!r}: is not Unicode text ({error.reason})") from error


def encode(tokenizer: Any, text: str, begins: bool = True) -> list[int]:
    """`encode_all` of one text."""
    return encode_all(tokenizer, [text], begins)[0]


def has_chat(tokenizer: Any) -> bool:
    """Whether the model takes its prompts as a chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(tokenizer: Any, chat: Sequence[Turn], opens_answer: bool = False) -> str:
    """A chat as its template writes it; `opens_answer` adds what stands before the answer to its last turn.

    Raises:
      ConfigError: the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=opens_answer)
    except Exception as error:  # a template is a program: it may raise anything
        raise ConfigError(f"chat={[turn['role'] for turn in chat]}: the chat template refuses it ({error})") from error


def encode_turn(tokenizer: Any, content: str, first: bool = True) -> list[int]:
    """A user's turn as a chat, with what opens the answer; a plain text where the tokenizer has no chat template.

    first: whether it begins the chat. Otherwise it goes on behind an answer, which it closes:
      "<|im_end|>\\n<|im_start|>user\\nAnd then?<|im_end|>\\n<|im_start|>assistant\\n"
    Raises:
      ConfigError: the template refuses it, or does not show earlier answers.
    """
    if not has_chat(tokenizer):
        return encode(tokenizer, content, begins=first)
    turn = {"role": "user", "content": content}
    if first:
        return encode(tokenizer, rendered(tokenizer, [turn], opens_answer=True), begins=False)
    earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    _, shown, text = rendered(tokenizer, [*earlier, turn], opens_answer=True).partition(ANSWER)
    require(bool(shown), "chat_template", tokenizer.chat_template, "does not show earlier answers")
    return encode(tokenizer, text.lstrip(" "), begins=False)
