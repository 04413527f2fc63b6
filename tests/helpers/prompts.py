"""Data files and a chat tokenizer for tests of tasks."""

import json


def write_lines(path, *lines) -> str:
    """Writes a JSON Lines file; a string is written as it is."""
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return str(path)


class Chat:
    """A tokenizer with a chat template; its tokens are bytes."""

    chat_template = "there is one"

    def apply_chat_template(self, turn, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize and turn[0]["role"] == "user"
        return turn[0]["content"]

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [list(text.encode()) for text in texts]}


def asked(task, record) -> str:
    """What a task asks in a chat."""
    return bytes(task.prompt(record, Chat())).decode()
